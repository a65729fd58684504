"""examples/pretrain_rmt.sh: every way of launching it gives each rank the same command line."""

import json
import os
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
