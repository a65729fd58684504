"""Two nodes on one machine: one is lost, comes back, and training resumes from its checkpoint."""

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

from tests.distributed import REPOSITORY
from tests.tiny_run import PRETRAIN, RMT, TinyInputs, read_metrics

STEPS, INTERVAL = 6, 2
SILENCE = 2  # seconds, after which a node is taken for lost
PATIENCE = 180.0  # seconds, on a machine with much else to do


class Node:
    """A torchrun agent with one rank, known to the other by an address of its own."""

    def __init__(self, address: str, store: str, script: list[str], log: Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        command += ["--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
        command += ["--rdzv-id", "two-nodes", "--rdzv-endpoint", store, "--local-addr", address]
        host = str(store.startswith(f"{address}:")).lower()
        conf = f"is_host={host},keep_alive_interval=1,keep_alive_max_attempt={SILENCE}"
        environment = os.environ | {
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        }
        with open(log, "ab") as output:
            self.agent = subprocess.Popen(
                [*command, "--rdzv-conf", conf, *script],
                env=environment,
                stdout=output,
                stderr=output,
            )

    def workers(self) -> list[int]:
        path = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def lose(self) -> None:
        """The machine hangs, is taken for lost, and is gone: no process of it says goodbye."""
        workers = self.workers()
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        self.agent.kill()
        self.agent.wait()
        # A rank that fails before its node is taken for lost has the others wait for that node.
        time.sleep(2 * SILENCE)
        for worker in workers:
            os.kill(worker, signal.SIGKILL)

    def stop(self) -> None:
        if self.agent.poll() is None:
            for process in [*self.workers(), self.agent.pid]:
                os.kill(process, signal.SIGKILL)
            self.agent.wait()


@pytest.fixture
def store() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    started: list[Node] = []
    yield started
    for node in started:
        node.stop()


def _wait_for_checkpoint(tracker: Path, nodes: list[Node], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not (tracker.exists() and tracker.read_text()):
        assert all(node.agent.poll() is None for node in nodes), log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)


@pytest.mark.multiprocess
def test_a_lost_node_comes_back_and_training_resumes(
    inputs: TinyInputs, store: str, nodes: list[Node], tmp_path: Path
):
    saved, metrics, log = tmp_path / "saved", tmp_path / "metrics.jsonl", tmp_path / "log"
    # As in a real job: the run's own checkpoint once there is one, before that the converted one.
    words = inputs.flags(resume_from=saved)
    words += ["--pretrained-checkpoint", str(inputs.checkpoint), *RMT]
    words += ["--train-iters", str(STEPS), "--save", str(saved), "--save-interval", str(INTERVAL)]
    words += ["--rmt-metrics-file", str(metrics), "--distributed-timeout-minutes", "1"]
    script = [str(PRETRAIN), *words]
    for address in ("127.0.0.1", "127.0.0.2"):
        nodes.append(Node(address, store, script, log))
    _wait_for_checkpoint(saved / "latest_checkpointed_iteration.txt", nodes, log)
    nodes[1].lose()
    before = len(read_metrics(metrics))
    assert before < STEPS, "the node was lost too late to show anything"
    nodes.append(Node("127.0.0.2", store, script, log))
    for node in (nodes[0], nodes[2]):
        assert node.agent.wait(PATIENCE) == 0, log.read_text()[-3000:]

    lines = read_metrics(metrics)
    iterations = [line["iteration"] for line in lines]
    resumed = next(
        i for i in range(1, len(lines)) if iterations[i] <= iterations[i - 1] or i == before
    )
    start = iterations[resumed]
    assert (start - 1) % INTERVAL == 0
    assert start > 1, "the second life began at the first step"
    assert iterations == [*range(1, resumed + 1), *range(int(start), STEPS + 1)]
    # A step that both lives did is the same step.
    again = {line["iteration"]: line for line in lines[resumed:]}
    for line in lines[:resumed]:
        assert again.get(line["iteration"], line) == line
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == str(STEPS)
    loaded = re.findall(
        r"successfully loaded checkpoint from (\S+) .*at iteration (\d+)", log.read_text()
    )
    assert (str(saved), str(int(start) - 1)) in loaded
