"""A few rollouts of a step as text, for people to read: JSON lines, and a table in wandb.

The rank that logs (the last one of all) shows what it rolled out itself: the first chosen positions
of its own samples, each with its whole group. As everything random in a step is a function of the
step, a resumed run writes the same rows again.
"""

import itertools
import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.job.metrics import append_lines, metrics_path
from megatron_rmt.job.tracking import never_ending_training
from megatron_rmt.prompt.prompt import Prompt
from megatron_rmt.update.scoring import continuation, text_before
from megatron_rmt.update.tree import ReasonedSample

POSITIONS = 4
CONTEXT_CHARACTERS = 200
TRUTH_TOKENS = 8
TABLE = "rmt samples"


@dataclass(frozen=True)
class ShownRollout:
    """One rollout as text; bytes that are no UTF-8 are replaced, special tokens left out.

    iteration: 1 for the first step. budget: tokens of thought asked for. context: the end of what
    stood before the position. truth: how the text really goes on, a few tokens of it. thought: up
    to the end marker, or to the end of the response where there is none. prediction: empty if it
    could not be read. reward: match and length together, as trained on.
    """

    iteration: int
    budget: int
    context: str
    truth: str
    thought: str
    prediction: str
    reward: float


def is_shown(settings: Settings, iteration: int) -> bool:
    """Whether rollouts of this step (0 for the first) are shown: the first after the warm-up, whose
    answers are written, and every ``--rmt-log-samples-interval`` th after that."""
    since_warm_up = iteration - settings.warmup_iters
    interval = settings.log_samples_interval
    return interval > 0 and since_warm_up >= 0 and since_warm_up % interval == 0


def read_samples(
    prompt: Prompt, reasoned: Sequence[ReasonedSample], iteration: int
) -> list[ShownRollout]:
    """All rollouts of the first ``POSITIONS`` positions of a rank's samples.

    iteration: 0 for the first step.
    """
    places = [(of.sample, position) for of in reasoned for position in of.positions]
    shown = []
    for sample, position in places[:POSITIONS]:
        budget = position.budget
        context = prompt.text(text_before(sample, position.row))[-CONTEXT_CHARACTERS:]
        truth = prompt.text(continuation(prompt, sample, position.row, TRUTH_TOKENS))
        for rollout, response, reward in zip(
            position.rollouts, position.responses, position.rewards, strict=True
        ):
            thought = _thought(prompt, rollout.tokens.tolist())
            read = thought, response.prediction.decode(errors="replace"), round(reward, 6)
            shown.append(ShownRollout(iteration + 1, budget, context, truth, *read))
    return shown


def _thought(prompt: Prompt, tokens: Sequence[int]) -> str:
    """Of a response: the text before the end of thought, without an end token and what follows."""
    written = itertools.takewhile(lambda token: token not in prompt.stop, tokens)
    text = b"".join(prompt.bytes_of[token] for token in written)
    return text.partition(prompt.template.close.encode())[0].decode(errors="replace")


def write_samples(args: Namespace, shown: Sequence[ShownRollout]) -> None:
    """Append ``shown`` to ``rmt_samples.jsonl`` next to the metrics file, if there is one, and log
    them as a table where this rank has a wandb run."""
    from megatron.training.global_vars import get_wandb_writer

    if not shown:
        return
    rows = [asdict(one) for one in shown]
    metrics = metrics_path(args)
    if metrics is not None:
        path = metrics.with_name("rmt_samples.jsonl")
        append_lines(path, [json.dumps(row, ensure_ascii=False) for row in rows])
    wandb = get_wandb_writer()
    if wandb:
        with never_ending_training("the table of samples in wandb"):
            table = wandb.Table(columns=[*rows[0]], data=[[*row.values()] for row in rows])
            wandb.log({TABLE: table}, shown[0].iteration)
