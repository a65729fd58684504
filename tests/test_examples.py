"""examples/pretrain_rmt.sh: every way of launching it gives each rank the same command line."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from examples.recipe import recipe_flags

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPT = str(EXAMPLES / "pretrain_rmt.sh")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

ENTRY_POINT = """
import json, os, sys
record = {"world size": os.environ["WORLD_SIZE"], "flags": sys.argv[1:]}
open(f"{os.environ['RECORDS']}/{os.environ['RANK']}.json", "w").write(json.dumps(record))
"""


@pytest.fixture
def environment(tmp_path):
    """Of a user who wants to launch a pre-training script of their own, with a small recipe."""
    for name in ("checkpoint", "records"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint" / "model_flags.txt").write_text("--num-layers 2 --swiglu\n")
    (tmp_path / "pretrain.py").write_text(ENTRY_POINT)
    (tmp_path / "recipe.args").write_text(
        "@${CHECKPOINT}/model_flags.txt  # the model\n"
        "--data-path ${DATA}\n"
        "--save ${SAVE:-runs/default}\n"
        "--lr 1e-6\n"
    )
    launcher_variables = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "SAVE", "MASTER_PORT", "NNODES")
    inherited = {k: v for k, v in os.environ.items() if k not in launcher_variables}
    return inherited | {
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "CHECKPOINT": str(tmp_path / "checkpoint"),
        "DATA": "a corpus/with spaces",
        "RECIPE": str(tmp_path / "recipe.args"),
        "ENTRY_POINT": str(tmp_path / "pretrain.py"),
        "RECORDS": str(tmp_path / "records"),
        "NPROC_PER_NODE": "2",
    }


EXPECTED = [
    *("--num-layers", "2", "--swiglu", "--data-path", "a corpus/with spaces"),
    *("--save", "runs/default", "--lr", "1e-3", "--new-flag"),
]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "launcher",
    [["bash", SCRIPT], [*TORCHRUN, SCRIPT], [*TORCHRUN, "--no-python", SCRIPT]],
    ids=["bash", "torchrun", "torchrun --no-python"],
)
def test_every_launch_form_runs_the_recipe_on_every_rank(launcher, environment):
    run = subprocess.run(
        [*launcher, "--lr", "1e-3", "--new-flag"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    records = Path(environment["RECORDS"])
    assert sorted(path.name for path in records.iterdir()) == ["0.json", "1.json"]
    for path in records.iterdir():
        assert json.loads(path.read_text()) == {"world size": "2", "flags": EXPECTED}
    assert run.stdout.count(environment["ENTRY_POINT"]) == 1, "the command is printed once"


@pytest.mark.multiprocess
def test_two_nodes_meet_at_the_address_that_they_are_given(environment):
    nodes = environment | {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_PORT": _free_port()}
    agents = [
        subprocess.Popen(["bash", SCRIPT], env=nodes, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0]
    records = sorted(Path(environment["RECORDS"]).iterdir())
    assert [path.name for path in records] == ["0.json", "1.json"]
    assert {json.loads(path.read_text())["world size"] for path in records} == {"2"}
    for output in outputs:
        assert f"--rdzv-endpoint 127.0.0.1:{nodes['MASTER_PORT']}" in output


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


# No Slurm runs here: these take the place of its commands, for a job of two nodes on this machine.
SRUN = """#!/usr/bin/env bash
shift
trap 'kill -TERM $(jobs -p)' TERM
for node in 1 2; do "$@" & done
status=0
for node in 1 2; do wait -n || status=$?; done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >>"$RECORDS/../scontrol.log"
if [[ $1 == show ]]; then printf '127.0.0.1\\nother\\n'; fi
"""


@pytest.fixture
def slurm(environment, tmp_path):
    """A job's environment, and the log of its calls of scontrol."""
    commands = tmp_path / "slurm"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    job |= {"PATH": f"{commands}:{environment['PATH']}", "NPROC_PER_NODE": "1", "MAX_RESTARTS": "0"}
    return environment | job | {"MASTER_PORT": _free_port(), "SAVE": str(tmp_path / "saved")}


def _submit(slurm, *flags):
    sbatch = ["bash", str(EXAMPLES / "slurm.sbatch"), *flags]
    return subprocess.run(
        sbatch, env=slurm, cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=120
    )


def _requeues(slurm):
    log = Path(slurm["RECORDS"]).parent / "scontrol.log"
    return [line for line in log.read_text().splitlines() if line.startswith("requeue")]


@pytest.mark.multiprocess
def test_a_slurm_job_runs_on_its_nodes_and_is_done(slurm):
    job = _submit(slurm, "--lr", "1e-3")
    assert job.returncode == 0, job.stderr
    records = sorted(Path(slurm["RECORDS"]).iterdir())
    assert [path.name for path in records] == ["0.json", "1.json"]
    record = json.loads(records[0].read_text())
    assert record["world size"] == "2"
    assert record["flags"][-3:] == ["--exit-signal-handler", "--lr", "1e-3"]
    assert "+ srun --kill-on-bad-exit=1 bash examples/pretrain_rmt.sh" in job.stdout
    assert f"--rdzv-id 7.0 --rdzv-endpoint 127.0.0.1:{slurm['MASTER_PORT']}" in job.stdout
    assert _requeues(slurm) == []


def test_a_slurm_job_is_put_back_while_it_makes_progress(slurm):
    _that_fails(slurm)
    saved = Path(slurm["SAVE"])
    for attempt in range(1, 4):
        assert _submit(slurm).returncode == 0
        assert _requeues(slurm) == ["requeue 7"] * attempt
    given_up = _submit(slurm)
    assert given_up.returncode == 1
    assert "No progress since step 0 in 3 attempts" in given_up.stderr
    (saved / "latest_checkpointed_iteration.txt").write_text("100\n")
    assert _submit(slurm).returncode == 0
    assert _requeues(slurm) == ["requeue 7"] * 4


def _that_fails(slurm):
    """The ranks are of no interest, only how the step ends."""
    (Path(slurm["PATH"].split(":")[0]) / "srun").write_text("#!/usr/bin/env bash\nexit 5\n")


FOREIGN = ("", "\n", "release", "last[$(touch executed)]", "a b c d", "0 last[$(touch executed)]")
FOREIGN += ("-1 1", "08 2", "1" * 40, "\x00\xff\n", "0 99")


@pytest.mark.faults
@pytest.mark.parametrize("name", ["latest_checkpointed_iteration.txt", "requeued.txt"])
@pytest.mark.parametrize("content", FOREIGN)
def test_what_files_of_a_slurm_job_hold_is_never_counted_with(slurm, name, content):
    _that_fails(slurm)
    saved = Path(slurm["SAVE"])
    saved.mkdir()
    (saved / name).write_text(content, encoding="latin-1")
    for attempt in range(1, 4):
        ended = _submit(slurm)
        assert ended.returncode == 0, ended.stderr
        assert ended.stderr.count("\n") == ended.stderr.count("null byte")
        assert _requeues(slurm) == ["requeue 7"] * attempt
    assert _submit(slurm).returncode == 1
    assert not (EXAMPLES.parent / "executed").exists()


def test_bookkeeping_without_a_newline_counts(slurm):
    _that_fails(slurm)
    saved = Path(slurm["SAVE"])
    saved.mkdir()
    (saved / "latest_checkpointed_iteration.txt").write_text("100")
    (saved / "requeued.txt").write_text("100 3")
    given_up = _submit(slurm)
    assert given_up.returncode == 1
    assert "No progress since step 100 in 3 attempts" in given_up.stderr


def test_a_folder_where_nobody_can_count_is_not_put_back(slurm):
    _that_fails(slurm)
    Path(slurm["SAVE"]).write_text("a file")
    ended = _submit(slurm)
    assert ended.returncode == 1
    assert ended.stderr.endswith("not put back in the queue, as nobody counts.\n")
    assert not (Path(slurm["RECORDS"]).parent / "scontrol.log").read_text().count("requeue")


@pytest.mark.parametrize(("given", "seconds"), [({}, "110"), ({"TIMEOUT": "9"}, "9")])
def test_ranks_that_are_told_to_stop_have_nearly_two_minutes(slurm, given, seconds):
    variable = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    (Path(slurm["PATH"].split(":")[0]) / "srun").write_text(
        f"#!/usr/bin/env bash\necho ${variable}"
    )
    job = slurm | {f"TORCH_ELASTIC_SHUTDOWN_{name}": value for name, value in given.items()}
    assert f"\n{seconds}\n" in _submit(job).stdout
    python = Path(slurm["RECORDS"]).parent / "python"
    python.write_text(f"#!/usr/bin/env bash\n[[ $1 == -c ]] || echo ${variable}")
    python.chmod(0o755)
    ended = subprocess.run(
        ["bash", SCRIPT], env=job | {"PYTHON": str(python)}, capture_output=True, text=True
    )
    assert ended.stdout.endswith(f"\n{seconds}\n")


def test_a_slurm_job_out_of_time_stops_its_ranks_and_is_put_back(slurm, tmp_path):
    stop = tmp_path / "stopped"
    script = f"trap 'touch {stop}; exit 0' TERM\nkill -USR1 $PPID\nsleep 60 >/dev/null 2>&1 & wait"
    (Path(slurm["PATH"].split(":")[0]) / "srun").write_text(f"#!/usr/bin/env bash\n{script}\n")
    assert _submit(slurm).returncode == 0
    assert stop.exists()
    assert _requeues(slurm) == ["requeue 7"]


@pytest.mark.parametrize("command", [["bash", SCRIPT], [sys.executable, SCRIPT]])
def test_a_failing_entry_point_fails_the_launch(command, environment):
    Path(environment["ENTRY_POINT"]).write_text("raise SystemExit(7)")
    run = subprocess.run(command, env=environment | {"NPROC_PER_NODE": "1"}, capture_output=True)
    assert run.returncode != 0


def test_flags_of_the_command_line_replace_those_of_recipe_and_model(environment):
    flags = recipe_flags(
        Path(environment["RECIPE"]),
        ["--num-layers=3", "--data-path", "x", "y"],
        {"CHECKPOINT": environment["CHECKPOINT"], "SAVE": "/saved"},
    )
    assert flags == ["--swiglu", "--save", "/saved", "--lr", "1e-6"]


def test_a_variable_that_is_not_set_is_named_with_its_flag(environment):
    variables = {"CHECKPOINT": environment["CHECKPOINT"]}
    with pytest.raises(ValueError, match=r"DATA is not set, .* for --data-path"):
        recipe_flags(Path(environment["RECIPE"]), [], variables)


def test_a_folder_that_is_no_converted_checkpoint_is_named(environment, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere/model_flags.txt does not exist: CHECKPOINT"):
        recipe_flags(
            Path(environment["RECIPE"]), [], {"CHECKPOINT": str(tmp_path / "nowhere"), "DATA": "x"}
        )


def test_the_recipe_that_we_ship_is_complete_with_checkpoint_and_data(environment):
    flags = recipe_flags(EXAMPLES / "pretrain_rmt.args", [], environment)
    assert flags[:3] == ["--num-layers", "2", "--swiglu"]
    assert not [word for word in flags if word.startswith(("@", "#", "$"))]
    assert flags[flags.index("--load") + 1] == flags[flags.index("--save") + 1]


def test_a_flag_given_again_replaces_the_one_of_an_included_recipe(tmp_path):
    (tmp_path / "base.args").write_text("--lr 1\n--betas 1 2\n--data ${NOWHERE}\n")
    recipe = tmp_path / "recipes" / "own.args"
    recipe.parent.mkdir()
    recipe.write_text("@../base.args\n--data x y\n--lr=2\n")
    assert recipe_flags(recipe, [], {}) == ["--betas", "1", "2", "--data", "x", "y", "--lr=2"]


def test_memory_of_changing_sizes_is_one_segment_unless_asked_otherwise(environment):
    name = "PYTORCH_CUDA_ALLOC_CONF"
    Path(environment["ENTRY_POINT"]).write_text(f"import os; print('by', os.environ.get('{name}'))")
    unset = {k: v for k, v in environment.items() if "ALLOC_CONF" not in k}
    for given, value in (
        ({}, "expandable_segments:True"),
        ({name: "garbage_collection_threshold:0.8"}, "garbage_collection_threshold:0.8"),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, "None"),
    ):
        run = subprocess.run(
            [sys.executable, SCRIPT], env=unset | given, capture_output=True, text=True, check=True
        )
        assert f"by {value}" in run.stdout


def test_runs_stay_off_the_network_unless_asked(environment):
    Path(environment["ENTRY_POINT"]).write_text(
        "import os; print('mode', os.environ['WANDB_MODE'])"
    )
    for given, mode in ({}, "offline"), ({"WANDB_MODE": "online"}, "online"):
        own = {k: v for k, v in environment.items() if k != "WANDB_MODE"} | given
        run = subprocess.run(
            [sys.executable, SCRIPT], env=own, capture_output=True, text=True, check=True
        )
        assert f"mode {mode}" in run.stdout
