"""Settings of all tests.

Without a GPU the CPU stands in for CUDA in the test process (``tests.distributed`` installs it), so
never load a Hugging Face model in it: use a subprocess.

Nothing is compiled but where a test asks for it (``compiled``): each of the many processes would
spend seconds on it.
"""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import pytest
import torch

from megatron_rmt.cpu.compiled import is_available
from tests import distributed, tiny_checkpoints, tiny_run


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
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tiny_run.TinyInputs:
    """A tiny model's checkpoint and corpus, for whole runs."""
    return tiny_run.build_inputs(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session", name="tiny_checkpoints")
def make_tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the tiny Hugging Face models of ``tests.tiny_checkpoints``."""
    return tiny_checkpoints.make_models(tmp_path_factory.mktemp("huggingface"))
