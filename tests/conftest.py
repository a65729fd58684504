"""Settings of all tests.

Without a GPU the CPU stands in for CUDA in the test process (``tests.distributed`` installs it), so
never load a Hugging Face model in it: use a subprocess.

Nothing is compiled but where a test asks for it (``compiled``): each of the many processes would
spend seconds on it.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import pytest
import torch

from megatron_rmt.cpu.compiled import is_available
from tests import distributed, tiny_checkpoints, tiny_run
from tests.tiny_run import PRETRAIN, RMT, STEPS, Run, TinyInputs, run
from tests.training_curves import Start


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "multiprocess: starts other processes; runs after the rest")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("multiprocess") is not None)


@pytest.fixture
def single_process_megatron() -> None:
    """Megatron's parallel state in this process: TP = PP = DP = 1."""
    distributed.single_process_megatron()


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``cpu.compiled.fused`` functions are compiled in this process."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    find_out = is_available
    with torch._dynamo.config.patch(disable=False):
        find_out.cache_clear()
        try:
            if not find_out():
                pytest.skip("there is no C++ compiler, or Python's headers are missing")
            yield
        finally:
            find_out.cache_clear()


@pytest.fixture(params=["eager", "compiled"])
def compiled(request: pytest.FixtureRequest) -> None:
    """Once without and once with ``compiling``."""
    if request.param == "compiled":
        request.getfixturevalue("compiling")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    """A tiny model's checkpoint and corpus, for whole runs."""
    return tiny_run.build_inputs(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session", name="tiny_checkpoints")
def make_tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the tiny Hugging Face models of ``tests.tiny_checkpoints``."""
    return tiny_checkpoints.make_models(tmp_path_factory.mktemp("huggingface"))


@pytest.fixture
def source(tiny_checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of a model, to be spoiled."""
    return Path(shutil.copytree(tiny_checkpoints / "llama", tmp_path / "source"))


@pytest.fixture(scope="session")
def start(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """``start(ranks, flags)``: a run from the converted checkpoint, or from a run's."""

    def start_run(
        ranks: int,
        flags: Sequence[str],
        resume_from: Path | None = None,
        program: Path = PRETRAIN,
    ) -> Run:
        directory = tmp_path_factory.mktemp("run") / "logs"
        return run(directory, ranks, [*inputs.flags(resume_from), *flags], program)

    return start_run


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reference leaves its last checkpoint."""
    return tmp_path_factory.mktemp("uninterrupted")


@pytest.fixture(scope="session")
def reference(start: Start, saved: Path) -> Run:
    """Six steps of one process."""
    return start(1, [*RMT, "--save", str(saved), "--save-interval", str(STEPS)])


@pytest.fixture(scope="session")
def stopped(start: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A run that saved and ended after step 3."""
    directory = tmp_path_factory.mktemp("stopped")
    flags = ["--save", str(directory), "--save-interval", "3", "--exit-interval", "3"]
    return directory, start(1, [*RMT, *flags])
