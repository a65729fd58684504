"""RMT in a job that exists: started by ``megatron_rmt.run``, or with two lines added."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import REPOSITORY
from tests.tiny_run import RMT, Run, TinyInputs, run

JOB = REPOSITORY / "examples/existing_job"
FLAGS = ["--train-iters", "3", "--minimum-document-tokens", "20"]
PRINTED = ("lm loss", "grad norm", "learning rate")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The job as it is, with the two lines, and in the hands of ``megatron_rmt.run``."""
    folder = tmp_path_factory.mktemp("job")
    script = shutil.copy(JOB / "pretrain.py", folder / "pretrain.py")
    two_lines = folder / "two_lines.py"
    patching = ["patch", "--output", two_lines, script, JOB / "two_lines.patch"]
    subprocess.run(patching, check=True, capture_output=True)
    # The wheel's helper is compiled already, and it holds no Makefile to compile it again.
    unpatched = folder / "unpatched.py"
    unpatched.write_text(
        "import runpy\n"
        "from megatron.core.datasets import utils\n"
        "utils.compile_helpers = lambda: None\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "import sys\n"
        "assert 'megatron_rmt.job.patches' not in sys.modules\n"
    )
    runner = folder / "runner.py"
    runner.write_text(
        "import sys\n"
        f"sys.argv[0:1] = ['megatron_rmt.run', {str(script)!r}]\n"
        "from megatron_rmt.run import main\n"
        "main()\n"
    )
    return {"unpatched": unpatched, "two lines": two_lines, "run": runner}


@pytest.fixture(scope="module")
def unpatched(
    inputs: TinyInputs, programs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    folder = tmp_path_factory.mktemp("unpatched") / "logs"
    return run(folder, 2, [*inputs.flags(), *FLAGS], programs["unpatched"])


@pytest.mark.multiprocess
@pytest.mark.parametrize("way", ["two lines", "run"])
def test_without_rmt_every_printed_digit_is_the_jobs_own(
    inputs: TinyInputs, programs: dict[str, Path], unpatched: Run, tmp_path: Path, way: str
):
    patched = run(tmp_path / "logs", 2, [*inputs.flags(), *FLAGS], programs[way])
    for name in PRINTED:
        digits = unpatched.printed(name)
        assert len(set(digits)) == 3, name
        assert patched.printed(name) == digits
    assert "trained on 12 documents, 2-way" in patched.log


@pytest.mark.multiprocess
def test_both_ways_train_the_job_with_rmt_alike(
    inputs: TinyInputs, programs: dict[str, Path], unpatched: Run, tmp_path: Path
):
    flags = [*inputs.flags(), *FLAGS, *RMT]
    by_lines = run(tmp_path / "lines", 1, flags, programs["two lines"])
    by_run = run(
        tmp_path / "run", 2, [*flags, "--tensor-model-parallel-size", "2"], programs["run"]
    )
    assert len(by_lines.metrics) == len(by_run.metrics) == 3
    for line, other in zip(by_lines.metrics, by_run.metrics, strict=True):
        assert line["rollout checksum"] == other["rollout checksum"]
        assert line["ntp loss"] == pytest.approx(other["ntp loss"], rel=1e-5)
        assert line["grad norm"] == pytest.approx(other["grad norm"], rel=1e-5)
    # The job's own batches: padding bears no loss, so fewer predictions count than with packing.
    assert float(unpatched.printed("lm loss")[0]) == pytest.approx(
        by_lines.metrics[0]["ntp loss"], rel=0.2
    )
    assert unpatched.printed("grad norm") != by_lines.printed("grad norm")


@pytest.mark.multiprocess
@pytest.mark.slow
def test_the_second_job_trains_alike_in_one_process_and_with_interleaved_stages(
    inputs: TinyInputs, tmp_path: Path
):
    """A weighted blend, a skipped corpus, a batch that grows, validation."""
    web = inputs.data.with_name("second")
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{inputs.data}{suffix}", f"{web}{suffix}")
    flags = inputs.flags()
    for name in ("--train-iters", "--global-batch-size"):
        at = flags.index(name)
        del flags[at : at + 2]
    flags += ["--data-path", "0.7", str(inputs.data), "0.3", str(web), "--split", "80,10,10"]
    flags += ["--train-samples", "16", "--step-batch-size-schedule", "0:2 256:4"]
    flags += ["--corpus-loss-weights", "1", "0.5", "--eval-interval", "3", "--eval-iters", "2"]
    # Else it is that of one micro-batch, too few for interleaved stages.
    flags += ["--eval-global-batch-size", "4"]
    rmt = [*RMT, "--rmt-skip-sources", "second", "--rmt-eval-samples", "4"]
    interleaved = ["--pipeline-model-parallel-size", "2"]
    interleaved += ["--num-virtual-stages-per-pipeline-rank", "2"]
    job = JOB / "pretrain_blend.py"
    alone = run(tmp_path / "alone", 1, [*flags, *rmt], job)
    staged = run(tmp_path / "staged", 2, [*flags, *rmt, *interleaved], job)
    assert [line["iteration"] for line in staged.metrics] == [1, 2, 3, 3, 4, 5, 5, 5]
    assert 0 < sum(line["skipped samples"] for line in alone.metrics) < len(alone.metrics)
    for line, other in zip(staged.metrics, alone.metrics, strict=True):
        # Stages pad their micro-batches to one size.
        expected = {name: value for name, value in other.items() if name != "padding"}
        assert {name: line[name] for name in expected} == pytest.approx(
            expected, rel=1e-4, abs=1e-5
        )
    # Megatron's local layers split no sequence without RMT, so not in an evaluation either.
    unmeasured = [*flags, "--split", "100,0,0", "--eval-iters", "0", *rmt[:-2]]
    whole = run(tmp_path / "whole", 1, unmeasured, job).metrics
    shared = [*unmeasured, *interleaved, "--context-parallel-size", "2"]
    for line, other in zip(run(tmp_path / "shared", 4, shared, job).metrics, whole, strict=True):
        assert line["rollout checksum"] == other["rollout checksum"]
        for name in ("ntp loss", "grad norm", "skipped samples"):
            assert line[name] == pytest.approx(other[name], rel=1e-4), name
    # Without --rmt it is the job's own.
    plain = run(tmp_path / "plain", 2, [*flags, *interleaved], job)
    assert float(plain.printed("lm loss")[0]) == pytest.approx(
        float(run(tmp_path / "one", 1, flags, job).printed("lm loss")[0]), rel=1e-5
    )


def test_the_patch_adds_two_lines():
    lines = (JOB / "two_lines.patch").read_text().splitlines()
    changes = [line for line in lines if line[:1] in "+-" and not line.startswith(("+++", "---"))]
    assert [line[1:] for line in changes if line[1:]] == [
        "import megatron_rmt",
        "megatron_rmt.patch()",
    ]
    readme = (JOB / "README.md").read_text()
    assert "+import megatron_rmt" in readme
    assert "+megatron_rmt.patch()" in readme


def _start(*words: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "megatron_rmt.run", *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_a_script_runs_as_python_would_run_it(tmp_path: Path):
    """Its name, flags, folder and neighbours are its own; patched before its first line."""
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "neighbour.py").write_text("VALUE = 3\n")
    (folder / "script.py").write_text(
        "import sys\n"
        "from neighbour import VALUE\n"
        "from megatron.training import training\n"
        "assert hasattr(training.train_step, 'megatron_rmt_original')\n"
        "import __main__\n"
        "assert __main__.VALUE == 3\n"
        "print(__name__, sys.argv[0], sys.argv[1:3], sys.path[0])\n"
        "sys.exit(VALUE)\n"
    )
    ended = _start("job/script.py", "--flag", "a b", cwd=tmp_path)
    assert ended.returncode == 3, ended.stderr
    expected = f"__main__ job/script.py ['--flag', 'a b'] {folder}"
    assert ended.stdout.splitlines()[-1] == expected


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "megatron_rmt.run: no script given; usage: python -m megatron_rmt.run SCRIPT.py"),
        (["nowhere.py"], "megatron_rmt.run: there is no script nowhere.py in "),
        (["-m"], "megatron_rmt.run: -m needs the name of a module;"),
    ],
)
def test_a_wrong_call_is_answered_with_one_sentence(words: list[str], sentence: str):
    ended = _start(*words)
    assert ended.returncode == 1
    assert ended.stderr.startswith(sentence)
    assert ended.stderr.count("\n") == 1
