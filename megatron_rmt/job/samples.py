"""A few rollouts of a step as text, and how uncertain one text is, for people to read.

``rmt_samples.jsonl`` holds a rollout a line, which are also a table in wandb; ``rmt_texts.jsonl``
the tokens of one sample of the step. ``ShownRollout`` and ``ShownText`` say what their keys mean.

The rank that logs (the last one of all) shows what it rolled out itself: the first chosen positions
of its own samples, each with its whole group. As everything random in a step is a function of the
step, a resumed run writes the same rows again.
"""

import codecs
import itertools
import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from megatron_rmt.algorithm.rewards import is_right
from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.job.metrics import append_lines, metrics_path
from megatron_rmt.job.tracking import never_ending_training
from megatron_rmt.prompt.prompt import Prompt
from megatron_rmt.rollout.responses import Rollout
from megatron_rmt.rollout.trunk import Sample
from megatron_rmt.update.report import TIERS
from megatron_rmt.update.scoring import continuation, text_before
from megatron_rmt.update.tree import ReasonedSample

POSITIONS = 4
CONTEXT_CHARACTERS = 200
TRUTH_TOKENS = 8
TEXT_TOKENS = 1024
TABLE = "rmt samples"
# Of no use in a table's cell.
_NOT_IN_TABLE = ("tokens", "log_probs")


@dataclass(frozen=True)
class ShownRollout:
    """One rollout as text; bytes that are no UTF-8 are replaced, special tokens left out.

    iteration: 1 for the first step. budget: tokens of thought asked for. context: the end of what
    stood before the position. truth: how the text really goes on, a few tokens of it. thought: up
    to the end marker, or to the end of the response where there is none. prediction: empty if it
    could not be read. reward: match and length together, as trained on. advantage: over its group;
    0 in all of a group without variance.
    right: well formed, and how the text goes on. sample: of the whole run, from 0. token: of the
    sample, the last one before the prediction, from 0. rollout: of the group, from 0. entropy: of
    the token to be predicted, nats. thought_tokens: length of the thought. tokens: text of each of
    the whole response; a character of several tokens stands with the last of them. log_probs: of
    each, nats, when it was drawn; null where it was not drawn but written.
    """

    iteration: int
    budget: int
    context: str
    truth: str
    thought: str
    prediction: str
    reward: float
    advantage: float
    right: bool
    sample: int
    token: int
    rollout: int
    entropy: float
    thought_tokens: int
    tokens: list[str]
    log_probs: list[float | None]


@dataclass(frozen=True)
class ShownText:
    """The first tokens of one sample of a step, with the entropies by which positions are chosen.

    iteration: 1 for the first step. sample: of the whole run, from 0. tokens: text of each, as in
    ``ShownRollout``; empty for special tokens. entropies: of the prediction of each token from
    those before it, nats; null where it does not count. tiers: "easy", "medium" or "hard"; null
    where the token may not be chosen. chosen: indices of the tokens that are predicted by rollouts.
    """

    iteration: int
    sample: int
    tokens: list[str]
    entropies: list[float | None]
    tiers: list[str | None]
    chosen: list[int]


def is_shown(settings: Settings, iteration: int) -> bool:
    """Whether rollouts of this step (0 for the first) are shown: the first after the warm-up, whose
    answers are written, and every ``--rmt-log-samples-interval`` th after that."""
    since_warm_up = iteration - settings.warmup_iters
    interval = settings.log_samples_interval
    return interval > 0 and since_warm_up >= 0 and since_warm_up % interval == 0


def read_samples(
    prompt: Prompt, reasoned: Sequence[ReasonedSample], entropies: Tensor, iteration: int
) -> list[ShownRollout]:
    """All rollouts of the first ``POSITIONS`` positions of a rank's samples.

    entropies: of the rows of all samples, ``[rows]`` in nats. iteration: 0 for the first step.
    """
    of_samples = entropies.split([len(of.sample) for of in reasoned])
    places = [
        (of.sample, position, round(float(own[position.row]), 3))
        for of, own in zip(reasoned, of_samples, strict=True)
        for position in of.positions
    ]
    shown = []
    for sample, position, entropy in places[:POSITIONS]:
        context = prompt.text(text_before(sample, position.row))[-CONTEXT_CHARACTERS:]
        following = continuation(prompt, sample, position.row)
        truth = [prompt.bytes_of[token] for token in following]
        boxed = prompt.template.answer == "boxed"
        for number, (rollout, response) in enumerate(
            zip(position.rollouts, position.responses, strict=True)
        ):
            tokens = rollout.tokens.tolist()
            shown.append(
                ShownRollout(
                    iteration=iteration + 1,
                    budget=position.budget,
                    context=context,
                    truth=prompt.text(following[:TRUTH_TOKENS]),
                    thought=_thought(prompt, tokens),
                    prediction=response.prediction.decode(errors="replace"),
                    reward=round(position.rewards[number], 6),
                    advantage=round(position.advantages[number], 6),
                    right=is_right(response, truth, boxed=boxed),
                    sample=sample.index,
                    token=int(sample.columns[position.row]),
                    rollout=number,
                    entropy=entropy,
                    thought_tokens=response.thought_length,
                    tokens=_texts(prompt, tokens),
                    log_probs=_log_probs(rollout),
                )
            )
    return shown


def read_text(
    prompt: Prompt,
    reasoned: Sequence[ReasonedSample],
    entropies: Tensor,
    tiers: Tensor,
    iteration: int,
) -> ShownText | None:
    """The first of a rank's samples that has a chosen position; None where none has.

    entropies, tiers: of the rows of all samples, ``[rows]``, in nats, and -1 where a row may not be
    chosen. iteration: 0 for the first step.
    """
    lengths = [len(of.sample) for of in reasoned]
    for of, own, tier in zip(reasoned, entropies.split(lengths), tiers.split(lengths), strict=True):
        if of.positions:
            tokens, rows = _tokens_and_their_rows(of.sample)
            place = {row: index for index, row in enumerate(rows) if row is not None}
            return ShownText(
                iteration=iteration + 1,
                sample=of.sample.index,
                tokens=_texts(prompt, tokens),
                entropies=[None if row is None else round(float(own[row]), 3) for row in rows],
                tiers=[
                    None if row is None or tier[row] < 0 else TIERS[int(tier[row])] for row in rows
                ],
                chosen=[place[one.row] for one in of.positions if one.row in place],
            )
    return None


def _tokens_and_their_rows(sample: Sample) -> tuple[list[int], list[int | None]]:
    """The first tokens of the user's sample, and the row that predicts each; None where none does,
    or its prediction does not count."""
    tokens: list[int] = []
    rows: list[int | None] = []
    before = None
    text = (sample.columns >= 0).nonzero()[:, 0].tolist()
    for row in text:
        follows = before is not None and int(sample.columns[row] - sample.columns[before]) == 1
        tokens.append(int(sample.tokens[row]))
        rows.append(before if follows and bool(sample.labelled[before]) else None)
        before = row
    if text and bool(sample.labelled[text[-1]]):
        tokens.append(int(sample.labels[text[-1]]))
        rows.append(text[-1])
    return tokens[:TEXT_TOKENS], rows[:TEXT_TOKENS]


def _thought(prompt: Prompt, tokens: Sequence[int]) -> str:
    """Of a response: the text before the end of thought, without an end token and what follows."""
    written = itertools.takewhile(lambda token: token not in prompt.stop, tokens)
    text = b"".join(prompt.bytes_of[token] for token in written)
    return text.partition(prompt.template.close.encode())[0].decode(errors="replace")


def _texts(prompt: Prompt, tokens: Sequence[int]) -> list[str]:
    """The text of each token; together they are ``prompt.text(tokens)``."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    last = len(tokens) - 1
    return [
        decoder.decode(prompt.bytes_of[token], final=index == last)
        for index, token in enumerate(tokens)
    ]


def _log_probs(rollout: Rollout) -> list[float | None]:
    return [
        round(value, 3) if drawn else None
        for value, drawn in zip(rollout.log_probs.tolist(), rollout.drawn.tolist(), strict=True)
    ]


def write_samples(args: Namespace, shown: Sequence[ShownRollout]) -> None:
    """Append ``shown`` to ``rmt_samples.jsonl`` next to the metrics file, if there is one, and log
    them as a table where this rank has a wandb run."""
    from megatron.training.global_vars import get_wandb_writer

    if not shown:
        return
    rows = [asdict(one) for one in shown]
    _append(args, "rmt_samples.jsonl", rows)
    wandb = get_wandb_writer()
    if wandb:
        columns = [name for name in rows[0] if name not in _NOT_IN_TABLE]
        with never_ending_training("the table of samples in wandb"):
            table = wandb.Table(
                columns=columns, data=[[row[name] for name in columns] for row in rows]
            )
            wandb.log({TABLE: table}, shown[0].iteration)


def write_text(args: Namespace, shown: ShownText | None) -> None:
    """Append ``shown`` to ``rmt_texts.jsonl`` next to the metrics file, if there is one."""
    if shown is not None:
        _append(args, "rmt_texts.jsonl", [asdict(shown)])


def _append(args: Namespace, name: str, rows: Sequence[dict[str, object]]) -> None:
    metrics = metrics_path(args)
    if metrics is not None:
        append_lines(metrics.with_name(name), [json.dumps(row, ensure_ascii=False) for row in rows])
