"""Settings of all tests.

Without a GPU the CPU stands in for CUDA in the test process (``tests.distributed`` installs it), so
never load a Hugging Face model in it: use a subprocess.
"""

from pathlib import Path

import pytest

from tests import distributed, tiny_checkpoints, tiny_run


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "multiprocess: starts other processes; runs after the rest")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("multiprocess") is not None)


@pytest.fixture
def single_process_megatron() -> None:
    """Megatron's parallel state in this process: TP = PP = DP = 1."""
    distributed.single_process_megatron()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tiny_run.TinyInputs:
    """A tiny model's checkpoint and corpus, for whole runs."""
    return tiny_run.build_inputs(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session", name="tiny_checkpoints")
def make_tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the tiny Hugging Face models of ``tests.tiny_checkpoints``."""
    return tiny_checkpoints.make_models(tmp_path_factory.mktemp("huggingface"))
