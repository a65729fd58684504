"""Two nodes on one machine: one is lost in a step, comes back, and training goes on."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.recipe import recipe_flags
from megatron_rmt.job.console import LOG
from tests.distributed import REPOSITORY
from tests.tiny_run import PRETRAIN, RMT, TRAINING, TinyInputs, read_metrics, run

pytestmark = pytest.mark.faults

# Saved after steps 2 and 4, which is the last; the node is lost in it.
STEPS, INTERVAL = 4, 2
PATIENCE = 240.0  # seconds, on a machine with much else to do
# The lost node's address sorts first, so that it is rank 0 in both of its lives; the rendezvous is
# the other's.
LOST, HOST = "127.0.0.1", "127.0.0.2"

# The example, with a node that stands still in a step where it is told to.
PROGRAM = f"""
import os, runpy, signal
from pathlib import Path

import megatron_rmt

if __name__ == "__main__":
    megatron_rmt.patch()
    import torch
    from megatron_rmt.job import patches

    torch.set_num_threads(1)
    run_step = patches.run_step

    def stand_still(original, call, training):
        if call["iteration"] + 1 == int(os.environ.get("STAND_STILL_IN_STEP", 0)):
            Path(os.environ["STANDS_STILL"]).touch()
            signal.pause()
        return run_step(original, call, training)

    patches.run_step = stand_still
    runpy.run_path({str(PRETRAIN)!r}, run_name="__main__")
"""


class Node:
    """``examples/pretrain_rmt.sh`` as a node of its own: one torchrun agent with one rank."""

    def __init__(self, address: str, environment: dict[str, str], flags: list[str], log: Path):
        # Each flag of torchrun's can be given as PET_<NAME>. A lost node is missed after 3 s.
        host = str(address == HOST).lower()
        conf = f"is_host={host},keep_alive_interval=1,keep_alive_max_attempt=3"
        own = {"PET_LOCAL_ADDR": address, "PET_RDZV_CONF": conf}
        with open(log, "ab") as output:
            self.agent = subprocess.Popen(
                ["bash", str(REPOSITORY / "examples/pretrain_rmt.sh"), *flags],
                env=environment | own,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def kill(self) -> None:
        """SIGKILL for every process: none of them says goodbye."""
        if self.agent.poll() is None:
            children = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text()
            self.agent.kill()
            self.agent.wait()
            for worker in map(int, children.split()):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker, signal.SIGKILL)


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    started: list[Node] = []
    yield started
    for node in started:
        node.kill()


@pytest.fixture
def environment(inputs: TinyInputs, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "program.py").write_text(PROGRAM)
    launched = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RECIPE")
    inherited = {name: value for name, value in os.environ.items() if name not in launched}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return inherited | {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CHECKPOINT": str(inputs.checkpoint),
        "DATA": str(inputs.data),
        "SAVE": str(tmp_path / "saved"),
        "ENTRY_POINT": str(tmp_path / "program.py"),
        "NNODES": "2",
        "NPROC_PER_NODE": "1",
        "MASTER_ADDR": HOST,
        "MASTER_PORT": port,
        "STANDS_STILL": str(tmp_path / "stands_still"),
    }


def _wait_for(path: Path, nodes: list[Node], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert all(node.agent.poll() is None for node in nodes), log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_lost_node_comes_back_and_training_goes_on_as_if_nothing_had_been(
    inputs: TinyInputs, environment: dict[str, str], nodes: list[Node], tmp_path: Path
):
    flags = [*TRAINING, *RMT, "--exit-interval", str(STEPS), "--save-interval", str(INTERVAL)]
    log, saved = tmp_path / "log", tmp_path / "saved"
    nodes.append(Node(HOST, environment, flags, log))
    to_be_lost = environment | {"STAND_STILL_IN_STEP": str(STEPS)}
    nodes.append(Node(LOST, to_be_lost, flags, log))
    _wait_for(tmp_path / "stands_still", nodes, log)
    nodes[1].kill()
    nodes.append(Node(LOST, environment, flags, log))
    for node in (nodes[0], nodes[2]):
        assert node.agent.wait(PATIENCE) == 0, log.read_text()[-3000:]

    lines = read_metrics(saved / "rmt_metrics.jsonl")
    assert [line["iteration"] for line in lines] == [1, 2, 3, 3, 4]
    loaded = re.findall(
        r"loaded checkpoint from (\S+) .*at iteration (\d+)", (saved / LOG).read_text()
    )
    assert loaded == [(str(inputs.checkpoint), "0"), (str(saved), "2")]
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == str(STEPS)

    recipe = REPOSITORY / "examples/pretrain_rmt.args"
    unsaved = recipe_flags(recipe, [*flags, "--load", "--save"], environment)
    uninterrupted = run(tmp_path / "logs", 2, [*unsaved, *flags]).metrics
    assert lines == [*uninterrupted[:3], *uninterrupted[2:]]
