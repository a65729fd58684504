"""A few rollouts of a step as text, for people to read: JSON lines, and a table in wandb.

The rank that logs (the last one of all) shows what it rolled out itself: the first chosen positions
of its own samples, each with its whole group. As everything random in a step is a function of the
step, a resumed run writes the same rows again.
"""

import itertools
import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from torch import Tensor

from megatron_rmt.job.metrics import append_lines, metrics_path
from megatron_rmt.mid_training import MidTraining
from megatron_rmt.rollout.trunk import Trunk
from megatron_rmt.update.packing import TreeSource
from megatron_rmt.update.scoring import continuation, read_responses

POSITIONS = 4
CONTEXT_CHARACTERS = 200
TRUTH_TOKENS = 8
TABLE = "rmt samples"


@dataclass(frozen=True)
class Sample:
    """One rollout as text; bytes that are no UTF-8 are replaced, special tokens left out.

    iteration: 1 for the first step. context: the end of what stood before the position. truth: how
    the text really goes on, a few tokens of it. thought: up to the end marker, or to the end of the
    response where there is none. prediction: empty if it could not be read. reward: match and
    length together, as trained on.
    """

    iteration: int
    context: str
    truth: str
    thought: str
    prediction: str
    reward: float


def read_samples(
    training: MidTraining,
    sources: Sequence[TreeSource],
    rewards: Sequence[Tensor],
    iteration: int,
) -> list[Sample]:
    """All rollouts of the first ``POSITIONS`` positions of a rank's micro-batches, in the first
    step after the warm-up, whose answers are written, and every ``--rmt-log-samples-interval`` th
    after that; none in the others.

    sources, rewards: of each micro-batch as read; rewards are ``[positions, group]`` fp32.
    iteration: 0 for the first step.
    """
    interval = training.args.rmt_log_samples_interval
    since_warm_up = iteration - training.args.rmt_warmup_iters
    if interval == 0 or since_warm_up < 0 or since_warm_up % interval:
        return []
    places = [
        (source, reward, index)
        for source, reward in zip(sources, rewards, strict=True)
        for index in range(len(source.rows))
    ]
    shown = []
    for source, reward, index in places[:POSITIONS]:
        row = source.rows[index]
        context = _context(training, source.trunk, row)
        truth = _text(training, continuation(training, source.trunk, row, TRUTH_TOKENS))
        own = source.responses.positions(index, index + 1)
        (read,) = read_responses(training, own)
        for rollout, response in enumerate(read):
            tokens = own.tokens[0, rollout, : int(own.lengths[0, rollout])].tolist()
            thought = _thought(training, tokens)
            prediction = response.prediction.decode(errors="replace")
            value = round(float(reward[index, rollout]), 6)
            shown.append(Sample(iteration + 1, context, truth, thought, prediction, value))
    return shown


def _text(training: MidTraining, tokens: Sequence[int]) -> str:
    return b"".join(training.bytes_of[token] for token in tokens).decode(errors="replace")


def _context(training: MidTraining, trunk: Trunk, row: int) -> str:
    rows = range(int(trunk.document_first[row]), row + 1)
    document = [int(trunk.tokens[r]) for r in rows if trunk.columns[r] >= 0]
    return _text(training, document)[-CONTEXT_CHARACTERS:]


def _thought(training: MidTraining, tokens: Sequence[int]) -> str:
    """Of a response: the text before the end of thought, without an end token and what follows."""
    written = itertools.takewhile(lambda token: token not in training.stop, tokens)
    text = b"".join(training.bytes_of[token] for token in written)
    return text.partition(training.template.close.encode())[0].decode(errors="replace")


def samples_path(args: Namespace) -> Path | None:
    """``rmt_samples.jsonl`` next to the metrics file; None if there is no such file."""
    metrics = metrics_path(args)
    return None if metrics is None else metrics.with_name("rmt_samples.jsonl")


def write_samples(args: Namespace, shown: Sequence[Sample]) -> None:
    """Append ``shown`` to the file, and log them as a table where this rank has a wandb run."""
    from megatron.training.global_vars import get_wandb_writer

    if not shown:
        return
    path = samples_path(args)
    if path is not None:
        append_lines(path, [json.dumps(asdict(sample), ensure_ascii=False) for sample in shown])
    wandb = get_wandb_writer()
    if wandb:
        columns = [field.name for field in fields(Sample)]
        rows = [list(asdict(sample).values()) for sample in shown]
        wandb.log({TABLE: wandb.Table(columns=columns, data=rows)}, shown[0].iteration)
