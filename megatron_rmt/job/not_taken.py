"""Steps that are not taken: bad ones are skipped, and a job that is to stop leaves one to the next.

Both end like a step of Megatron's own that its optimizer skips; nothing has moved but the samples
that were read.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine

from megatron_rmt.job.metrics import append_lines, metrics_path, write_metrics
from megatron_rmt.prompt.prompt import Prompt
from megatron_rmt.rollout.trunk import UserBatch
from megatron_rmt.step import global_sample_indices

QUARANTINE = "rmt_quarantine.jsonl"

# What Megatron's train_step returns: metrics, skipped, checkpoint, exit, exit code, gradient norm,
# zeros in the gradient, largest attention score.
Result = tuple[dict[str, Any], int, bool, bool, int, float | None, int | None, float]


@dataclass
class Progress:
    """What a process knows of the steps behind it. bad_in_a_row: skipped since the last good one.
    held: the iteration whose state lies on disk already, None for no step yet."""

    bad_in_a_row: int = 0
    held: int | None = None


def skipped(
    args: Namespace,
    iteration: int,
    problem: Exception,
    batches: Sequence[UserBatch],
    prompt: Prompt,
    progress: Progress,
) -> Result:
    """Skip the bad step ``iteration`` (0 for the first), and write its samples where they are seen.

    Collective over the data-parallel ranks.

    Raises:
        SystemExit: as many in a row as ``--rmt-max-bad-steps`` says, or more.
    """
    progress.bad_in_a_row += 1
    most = args.rmt_max_bad_steps
    text = f"RMT, iteration {iteration + 1}: {str(problem).rstrip('.')}"
    if most:
        _quarantine(args, iteration, str(problem), batches, prompt, progress.bad_in_a_row)
        text += f"; bad step {progress.bad_in_a_row} of --rmt-max-bad-steps {most} in a row"
    if progress.bad_in_a_row >= most:
        raise SystemExit(
            f"{text}; the step was not taken and no checkpoint written: restart from the last "
            "checkpoint, and if it happens again look at the data there, the learning rate and the "
            "hardware (--rmt-max-bad-steps N skips such steps)."
        )
    if dist.get_rank() == dist.get_world_size() - 1:
        print(f"{text}: skipped.", file=sys.stderr, flush=True)
    # Megatron's own machine may have asked for the passes again.
    machine = get_rerun_state_machine()
    machine.state = RerunState.NOT_RUNNING_YET
    machine.current_iteration = iteration + 1
    return {}, 1, False, False, 0, None, None, 0


def left_to_the_next_run(args: Namespace, iteration: int, progress: Progress) -> Result:
    """Let Megatron save the state after ``iteration`` steps, unless disk holds it, and exit."""
    saves = bool(args.save) and iteration > 0 and progress.held != iteration
    if dist.get_rank() == dist.get_world_size() - 1:
        text = f"RMT: told to stop in step {iteration + 1}, which is left to the run that resumes."
        print(text, file=sys.stderr, flush=True)
    return {}, 1, saves, True, 0, None, None, 0


def _quarantine(
    args: Namespace,
    iteration: int,
    problem: str,
    batches: Sequence[UserBatch],
    prompt: Prompt,
    in_a_row: int,
) -> None:
    """Append the step's samples, as text, and a line to the metrics. The last rank writes."""

    def known(tokens: list[int]) -> str:
        return prompt.text([token for token in tokens if 0 <= token < len(prompt.bytes_of)])

    indices = global_sample_indices(args, len(batches))
    own = [
        {"iteration": iteration + 1, "not finite": problem, "sample": index, "text": known(tokens)}
        for batch, numbers in zip(batches, indices, strict=True)
        for index, tokens in zip(numbers, batch.tokens.tolist(), strict=True)
    ]
    group = parallel_state.get_data_parallel_group()
    rows = [own] * dist.get_world_size(group)
    if len(rows) > 1:
        dist.all_gather_object(rows, own, group=group)
    path = metrics_path(args)
    if path is None or dist.get_rank() != dist.get_world_size() - 1:
        return
    write_metrics(path, iteration + 1, {"skipped": 1, "skipped in a row": in_a_row})
    lines = sorted((row for of in rows for row in of), key=lambda row: row["sample"])
    append_lines(path.with_name(QUARANTINE), [json.dumps(row, ensure_ascii=False) for row in lines])
