"""What a person sees of a run of the examples: a line for each step, and no libraries' warnings."""

import importlib
import inspect
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rmt.job.console import LOG, step_line
from tests.distributed import REPOSITORY
from tests.tiny_run import RMT, TinyInputs, run

REPORT = {
    "rmt budget": 3.0,
    "rmt thought length": 2.676,
    "rmt match rate": 0.2344,
    "rmt reward": 0.2659,
    "rmt warm-up loss": 0.0,
    "rmt next-token accuracy": 0.6348,
    "rmt asked hard": 0.6,
    "lm loss": 1.6026,
    "rmt rollout seconds": 3.25,
    "rmt update seconds": 13.5,
}


def test_a_step_is_one_line():
    assert step_line(13, 20, REPORT) == (
        "step 13/20 | budget 3 | thought 2.7 | match 23.4% | reward 0.266 | next token 63.5% | "
        "ntp loss 1.603 | 16.8 s"
    )


def test_a_step_shows_what_was_measured():
    unmeasured = ("rmt thought length", "rmt match rate", "rmt reward")
    warm_up = REPORT | dict.fromkeys(unmeasured, math.nan) | {"rmt warm-up loss": 8.9949}
    assert step_line(3, 20, warm_up) == (
        "step  3/20 | budget 3 | warm-up loss 8.995 | next token 63.5% | ntp loss 1.603 | 16.8 s"
    )
    assert step_line(3, 20, {"lm loss": 2.0}) == "step  3/20 | ntp loss 2.000"
    assert step_line(3, 20, {}) == "step  3/20 | skipped"


def test_megatron_logs_a_step_as_the_console_expects():
    training = importlib.import_module("megatron.training.training")
    assert {"loss_dict", "iteration"} <= inspect.signature(training.training_log).parameters.keys()
    assert "print_rank_last(log_string)" in inspect.getsource(training.training_log)


@pytest.mark.multiprocess
def test_a_run_shows_a_line_for_each_step_and_keeps_megatrons_in_a_file(
    inputs: TinyInputs, tmp_path: Path
):
    """Two pipeline stages: the first prints what is set up, the last what is measured."""
    saved = tmp_path / "saved"
    flags = [*RMT, "--exit-interval", "2", "--pipeline-model-parallel-size", "2"]
    flags += ["--save", str(saved), "--save-interval", "9"]
    finished = run(tmp_path / "logs", 2, [*inputs.flags(), *flags])
    screen = re.findall("^(?:step|A line|.*iteration).*$", finished.log, re.MULTILINE)
    assert screen[0] == f"A line for each step; all that Megatron prints is in {saved / LOG}"
    assert [line.split(" | ")[0] for line in screen[1:]] == ["step 1/6", "step 2/6"]
    for line, metrics in zip(screen[1:], finished.metrics, strict=True):
        assert f" | reward {metrics['reward']:.3f} | " in line
        assert f" | ntp loss {metrics['ntp loss']:.3f} | " in line

    log = (saved / LOG).read_text()
    lines = re.findall(r"^.* iteration +(\d)/ .* rmt reward: (\S+) ", log, re.MULTILINE)
    assert lines[0] == ("1", f"{finished.metrics[0]['reward']:.6E}")
    assert [number for number, _ in lines] == ["1", "2"]
    for printed in ("end of arguments", "INFO:megatron.core"):
        assert printed in log
        assert printed not in finished.log


WARNER = """
import sys, warnings
from megatron_rmt.job import console

console.leave_out_library_warnings()

def warn(file, text, category=UserWarning, stacklevel=1):
    names = {"warnings": warnings, "text": text, "category": category, "stacklevel": stacklevel}
    code = "def call(): warnings.warn(text, category, stacklevel=stacklevel)"
    exec(compile(code, file, "exec"), names)
    names["call"]()

library, own = sys.argv[1:]
warn(library, "Apex is not installed. Falling back to Torch Norm")
warn(library, "Transformer Engine is not installed")
warn(library, "use another function", FutureWarning)
warn(own, "decoding runs uncaptured layers")
exec(compile("warn(own, 'a caller is blamed', stacklevel=2)", library, "exec"))
exec(compile("warn(own, 'the library is blamed', stacklevel=3)", library, "exec"))
"""


def _warn(*options: str) -> str:
    library = str(Path(pytest.__file__).parent / "library.py")
    own = str(REPOSITORY / "megatron_rmt/rollout/captured_layers.py")
    command = [sys.executable, *options, "-c", WARNER, library, own]
    return subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True).stderr


def test_warnings_of_libraries_become_one_line_and_our_own_are_shown():
    shown = _warn()
    assert "UserWarning: decoding runs uncaptured layers" in shown
    assert "UserWarning: a caller is blamed" in shown
    assert "UserWarning: the library is blamed" in shown
    assert shown.splitlines()[-1] == (
        "3 warnings of libraries were left out (apex or Transformer Engine not installed, "
        "deprecations): PYTHONWARNINGS=default shows them"
    )
    assert "Apex is not installed." not in shown


def test_whoever_asks_for_warnings_gets_them_all():
    shown = _warn("-W", "default")
    assert "UserWarning: Apex is not installed." in shown
    assert "FutureWarning: use another function" in shown
    assert "left out" not in shown
