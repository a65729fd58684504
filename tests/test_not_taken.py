"""Steps that are not taken: counted, put aside, left to the next run."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine

from megatron_rmt.job.not_taken import QUARANTINE, Progress, left_to_the_next_run, skipped
from megatron_rmt.rollout.trunk import UserBatch
from tests.tiny_step import tiny_prompt

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("single_process_megatron")]


def _args(metrics: Path | None, most: int = 3, save: str | None = "saved") -> Namespace:
    file = None if metrics is None else str(metrics)
    options = {"rmt_metrics_file": file, "rmt_max_bad_steps": most, "save": save}
    return Namespace(**options, micro_batch_size=2, consumed_train_samples=8)


def _skip(args: Namespace, progress: Progress, iteration: int = 4) -> tuple:
    # Tokens that the tokenizer does not know are not written as text.
    tokens = torch.tensor([[2, 3, 11, 99], [4, -1, 5, 10]])
    batch = UserBatch(tokens, torch.arange(4).repeat(2, 1), tokens, torch.ones(2, 4))
    return skipped(args, iteration, ValueError("a is bad."), [batch], tiny_prompt(), progress)


def test_a_bad_step_is_counted_and_its_samples_are_put_aside(tmp_path: Path, capsys):
    metrics, progress = tmp_path / "metrics.jsonl", Progress()
    machine = get_rerun_state_machine()
    machine.state = RerunState.WILL_RERUN_FROM_CHECKPOINT
    result = _skip(_args(metrics), progress)
    assert result == ({}, 1, False, False, 0, None, None, 0)
    assert progress.bad_in_a_row == 1
    # Megatron goes on as after a step of its own.
    assert machine.state is RerunState.NOT_RUNNING_YET
    assert machine.current_iteration == 5
    line = {"iteration": 5, "skipped": 1.0, "skipped in a row": 1.0}
    assert json.loads(metrics.read_text()) == line
    rows = [json.loads(row) for row in (tmp_path / QUARANTINE).read_text().splitlines()]
    assert rows == [
        {"iteration": 5, "not finite": "a is bad.", "sample": 8, "text": "ab "},
        {"iteration": 5, "not finite": "a is bad.", "sample": 9, "text": "cd</t>"},
    ]
    said = "RMT, iteration 5: a is bad; bad step 1 of --rmt-max-bad-steps 3 in a row: skipped.\n"
    assert capsys.readouterr().err == said


def test_as_many_in_a_row_as_are_allowed_end_the_run_and_their_samples_are_there(tmp_path: Path):
    args, progress = _args(tmp_path / "metrics.jsonl", most=2), Progress()
    _skip(args, progress)
    sentence = (
        r"^RMT, iteration 6: a is bad; bad step 2 of --rmt-max-bad-steps 2 in a row; the step"
    )
    with pytest.raises(SystemExit, match=sentence):
        _skip(args, progress, iteration=5)
    rows = (tmp_path / QUARANTINE).read_text().splitlines()
    assert [json.loads(row)["iteration"] for row in rows] == [5, 5, 6, 6]


def test_where_none_is_allowed_the_first_ends_the_run_and_writes_nothing(tmp_path: Path):
    with pytest.raises(SystemExit, match=r"^RMT, iteration 5: a is bad; the step was not taken"):
        _skip(_args(tmp_path / "metrics.jsonl", most=0), Progress())
    assert not [*tmp_path.iterdir()]


def test_without_a_metrics_file_samples_are_put_nowhere():
    assert _skip(_args(None, save=None), Progress())[1] == 1


@pytest.mark.parametrize(
    ("save", "iteration", "held", "saves"),
    [
        ("saved", 3, 2, True),
        ("saved", 3, 3, False),  # disk holds it
        ("saved", 0, None, False),  # nothing has been trained yet
        (None, 3, 2, False),
    ],
)
def test_what_disk_does_not_hold_is_saved_before_a_job_that_was_told_to_stop_ends(
    save: str | None, iteration: int, held: int | None, saves: bool
):
    result = left_to_the_next_run(_args(None, save=save), iteration, Progress(held=held))
    assert result == ({}, 1, saves, True, 0, None, None, 0)
