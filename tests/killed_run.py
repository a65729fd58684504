"""A training run that is killed again and again, and started again each time, until it is done.

What it leaves, weights, optimizer and metrics, must be bit for bit that of a run nobody disturbed.
``python -m tests.killed_run --folder FOLDER --picture PNG`` plots both loss curves with the kills
marked, where FOLDER is what the test left under pytest's ``--basetemp``.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.distributed import REPOSITORY
from tests.tiny_run import PRETRAIN, RMT, TinyInputs

STEPS, SAVE_INTERVAL = 30, 3
# Where a kill may fall. late save: the data of a checkpoint are written, its name is not.
PHASES = ("start", "trunk", "rollout", "update", "save", "late save")
VICTIMS = ("rank", "agent")
PATIENCE = 300.0  # seconds for one life, on a machine with much else to do
SECONDS_A_KILL = 60.0  # on average: 20 kills take at most 20 minutes
_MARK = "RMT_KILLED_RUN"

# The example, which kills itself (or its agent) a moment after it has come to a phase of a step.
PROGRAM = f"""
import functools, json, os, runpy, signal, threading, time
from pathlib import Path

kill = json.loads(os.environ.get("KILL", "null"))
if kill and int(os.environ["RANK"]) != kill["rank"]:
    kill = None

def strike():
    time.sleep(kill["delay"])
    victim = os.getpid() if kill["victim"] == "rank" else os.getppid()
    Path(os.environ["SAVE"]).with_name("struck").touch()
    os.kill(victim, signal.SIGKILL)

def strike_when_written(folder):
    while not (folder / "metadata.json").exists():
        time.sleep(0.0005)
    strike()

def arm(target=strike, *args):
    threading.Thread(target=target, args=args, daemon=True).start()

if kill and kill["phase"] == "start":
    arm()

import megatron_rmt

if __name__ == "__main__":
    megatron_rmt.patch()
    import torch
    from megatron.training import training
    from megatron_rmt import step
    from megatron_rmt.job import patches, train_step

    torch.set_num_threads(1)
    now = [None]

    def watched(module, name, phase):
        function = getattr(module, name)

        def wrapper(*args, **kwargs):
            if kill and [phase, now[0]] == [kill["phase"], kill["step"]]:
                now[0] = None
                arm()
            return function(*args, **kwargs)

        setattr(module, name, wrapper)

    run_step, save_checkpoint = patches.run_step, training.save_checkpoint

    def counted(original, call, run):
        now[0] = call["iteration"] + 1
        return run_step(original, call, run)

    # The example patches again, and knows by its attributes what is patched already.
    @functools.wraps(save_checkpoint)
    def saved(iteration, *args, **kwargs):
        if kill and iteration == kill["step"]:
            folder = Path(os.environ["SAVE"], f"iter_{{iteration:07d}}")
            if kill["phase"] == "save":
                arm()
            elif kill["phase"] == "late save":
                arm(strike_when_written, folder)
        return save_checkpoint(iteration, *args, **kwargs)

    patches.run_step, training.save_checkpoint = counted, saved
    watched(step, "_lay_out", "trunk")
    watched(step, "_respond", "rollout")
    watched(train_step, "make_forward_step", "update")
    runpy.run_path({str(PRETRAIN)!r}, run_name="__main__")
"""


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: ``delay`` seconds after ``phase`` of step ``step`` (of a start: the one that it
    goes on from) began on rank ``rank``, to that rank or to its torchrun agent.

    struck: it was sent, before the life came to its end.
    """

    phase: str
    step: int
    delay: float
    victim: str
    rank: int
    struck: bool = True


def planned_kills(seed: int, count: int, ranks: int) -> Iterator[tuple[str, int, float, str, int]]:
    """(phase, steps behind the last checkpoint, delay, victim, rank) of ``count`` kills."""
    draw = random.Random(seed)
    for index in range(count):
        phase = PHASES[index % len(PHASES)]
        fixed = {"start": 0, "save": SAVE_INTERVAL, "late save": SAVE_INTERVAL}
        behind = fixed.get(phase, draw.randint(SAVE_INTERVAL - 1, 2 * SAVE_INTERVAL))
        longest = {"start": 8.0, "late save": 0.02}.get(phase, 0.25)
        yield phase, behind, draw.uniform(0, longest), draw.choice(VICTIMS), draw.randrange(ranks)


@dataclass(frozen=True)
class Launcher:
    """Starts the same run again and again, in ``folder``."""

    folder: Path
    inputs: TinyInputs
    ranks: int
    flags: Sequence[str] = ()

    @property
    def saved(self) -> Path:
        """The run's --save."""
        return self.folder / "saved"

    def latest(self) -> int:
        """Iteration of the last whole checkpoint, 0 if there is none."""
        tracker = self.saved / "latest_checkpointed_iteration.txt"
        return int(tracker.read_text()) if tracker.exists() else 0

    def live(self, kill: Kill | None = None) -> int:
        """One life of the run, to its end or to ``kill``; the exit code of its agent.

        Raises:
            AssertionError: a process of it outlives it, or it does not end.
        """
        self.folder.mkdir(exist_ok=True)
        program = self.folder / "program.py"
        program.write_text(PROGRAM)
        start = ["--load", str(self.saved), "--pretrained-checkpoint", str(self.inputs.checkpoint)]
        flags = [flag for flag in self.inputs.flags() if flag != "--finetune"]
        flags[flags.index("--load") : flags.index("--load") + 2] = start
        flags[flags.index("--train-iters") + 1] = str(STEPS)
        flags += [*RMT, "--save", str(self.saved), "--save-interval", str(SAVE_INTERVAL)]
        flags += ["--tensor-model-parallel-size", str(self.ranks), *self.flags]
        mark = f"{_MARK}={self.folder}"
        launched = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        environment = {k: v for k, v in os.environ.items() if k not in launched} | {
            "SAVE": str(self.saved),
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "RECIPE": str(self.folder / "recipe.args"),
            "ENTRY_POINT": str(program),
            "KILL": json.dumps(vars(kill) if kill else None),
            _MARK: str(self.folder),
        }
        (self.folder / "recipe.args").write_text("")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
        command += [str(self.ranks), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        command += [str(REPOSITORY / "examples/recipe.py"), *flags]
        with open(self.folder / "log", "ab") as log:
            agent = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=self.folder
            )
            try:
                code = agent.wait(PATIENCE)
                self._wait_until_gone(mark)
                return code
            finally:
                _kill_all(mark, agent)

    def _wait_until_gone(self, mark: str) -> None:
        # A rank whose agent dies first finds that out once Megatron is imported.
        deadline = time.monotonic() + 60
        while left := _marked(mark):
            if time.monotonic() > deadline:
                raise AssertionError(f"{len(left)} processes outlive their run: {left}")
            time.sleep(0.05)


def _marked(mark: str) -> dict[int, str]:
    """(process id: command) of the living processes whose environment holds ``mark``."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            running = re.search(r"^State:\s+[^ZX]", (folder / "status").read_text(), re.MULTILINE)
            if running and mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = command.decode(errors="replace")[:200]
    return found


def _kill_all(mark: str, agent: "subprocess.Popen[bytes]") -> None:
    for process in _marked(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    agent.wait()


def run_killed(launcher: Launcher, seed: int, count: int) -> list[Kill]:
    """Run to the end through ``count`` kills; the kills that were sent, kept in kills.json too.

    Raises:
        AssertionError: a life that nobody killed does not end with exit code 0, or all of them
            together take longer than ``SECONDS_A_KILL`` a kill.
    """
    kills: list[Kill] = []
    until = time.monotonic() + SECONDS_A_KILL * count
    for phase, behind, delay, victim, rank in planned_kills(seed, count, launcher.ranks):
        if time.monotonic() > until:
            raise AssertionError(f"{len(kills)} of {count} kills took {SECONDS_A_KILL * count:g} s")
        step = min(launcher.latest() + behind, STEPS)
        kill = Kill(phase, step, delay, victim, rank)
        sent = launcher.folder / "struck"
        sent.unlink(missing_ok=True)
        code = launcher.live(kill)
        if code != 0 and not sent.exists():
            raise AssertionError((launcher.folder / "log").read_text(errors="replace")[-3000:])
        kills.append(replace(kill, struck=code != 0))
        (launcher.folder / "kills.json").write_text(json.dumps([vars(kill) for kill in kills]))
    code = launcher.live()
    if code != 0:
        raise AssertionError((launcher.folder / "log").read_text(errors="replace")[-3000:])
    return kills


def metrics_lines(launcher: Launcher) -> list[str]:
    """The lines of the run's metrics file without the timings, those written twice included."""
    lines = (launcher.saved / "rmt_metrics.jsonl").read_text().splitlines()
    return [
        json.dumps({k: v for k, v in json.loads(line).items() if not k.endswith("seconds")})
        for line in lines
    ]


def main() -> None:
    """Plot the loss of a killed run over the undisturbed run's, as the test left them."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="holds quiet and killed")
    parser.add_argument("--picture", type=Path, required=True, help="PNG to write")
    options = parser.parse_args()
    losses = {}
    for name in ("quiet", "killed"):
        path = options.folder / name / "saved/rmt_metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        losses[name] = {line["iteration"]: line["ntp loss"] for line in lines}
    kills = [
        Kill(**kill) for kill in json.loads((options.folder / "killed/kills.json").read_text())
    ]
    struck = [kill for kill in kills if kill.struck]
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    axes.plot(*_points(losses["quiet"]), lw=6, alpha=0.3, label="undisturbed run")
    axes.plot(*_points(losses["killed"]), lw=1.2, c="black", label="killed run")
    # A row of its own for each phase, below the curves.
    lowest = min(losses["quiet"].values())
    height = 0.05 * (max(losses["quiet"].values()) - lowest)
    for row, phase in enumerate(PHASES, start=1):
        own = [kill for kill in struck if kill.phase == phase]
        axes.plot(
            [kill.step for kill in own],
            [lowest - row * height] * len(own),
            "x",
            label=f"SIGKILL, {phase} ({len(own)})",
        )
    axes.set(xlabel="step", ylabel="NTP loss (nats)")
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(options.picture, dpi=110)
    print(f"{len(struck)} kills, {len(lines)} steps taken for {len(losses['quiet'])}")


def _points(curve: dict[int, float]) -> tuple[list[int], list[float]]:
    return [*curve], [*curve.values()]


if __name__ == "__main__":
    main()
