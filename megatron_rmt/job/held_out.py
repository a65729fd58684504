"""Held-out documents that a run is measured on every N steps (``--rmt-eval-interval``).

What is measured is a function of weights and settings alone: it draws from no generator and trains
nothing, so a run with it computes what it computes without.
"""

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.mid_training import MidTraining
from megatron_rmt.probe import HeldOut, Text, draw_positions, standing
from megatron_rmt.prompt.answer_spans import Spans, answers_by_token, check_spans


def is_measured(settings: Settings, steps: int) -> bool:
    """Whether held-out documents are measured after so many steps."""
    return settings.eval_interval > 0 and steps % settings.eval_interval == 0


@functools.lru_cache(maxsize=1)
def read_held_out(settings: Settings) -> list[tuple[str, Spans]]:
    """(text, spans of its answers) of the first documents of ``--rmt-eval-data``, read once.

    Raises:
        ValueError: one sentence: the file cannot be read, or holds nothing to be measured.
    """
    path = settings.eval_data
    wants_answers = settings.eval_positions == "answers"
    found: list[tuple[str, Spans]] = []
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            for number, line in itertools.islice(lines, settings.eval_documents):
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise ValueError(f"line {number} is no object with a text")
                spans = check_spans(row.get("answer_spans", []), len(row["text"]))
                found.append((row["text"], spans))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"--rmt-eval-data {path} cannot be read ({reason}); name a file of JSON lines, each "
            "with a text."
        ) from None
    if not any(spans if wants_answers else text for text, spans in found):
        lacking = "answer_spans" if wants_answers else "text"
        raise ValueError(
            f"--rmt-eval-data {path} holds no {lacking} in its first {settings.eval_documents} "
            "documents; name another file."
        )
    return found


def held_out_problems(settings: Settings) -> Iterator[str]:
    """One sentence if the held-out documents cannot be measured."""
    if not settings.eval_interval:
        if settings.eval_data is not None:
            yield (
                f"--rmt-eval-data is {settings.eval_data}, and --rmt-eval-interval is 0; pass the "
                "interval in steps, or leave it out."
            )
        return
    if settings.eval_data is None:
        yield (
            f"--rmt-eval-interval is {settings.eval_interval}; pass --rmt-eval-data with held-out "
            "documents, or leave it out."
        )
        return
    try:
        read_held_out(settings)
    except ValueError as error:
        yield str(error)


def tokenize_held_out(run: MidTraining, tokenizer: Any) -> HeldOut:
    """The documents by Megatron's ``tokenizer``, as much of each as a sample holds, and the tokens
    to be predicted: a function of the settings alone, so the same ones every time."""
    settings, prompt, length = run.settings, run.prompt, run.args.seq_length
    texts, chosen = [], []
    for number, (text, spans) in enumerate(read_held_out(settings)):
        ids = list(tokenizer.tokenize(text))
        wanted = range(len(ids))
        if settings.eval_positions == "answers":
            wanted = answers_by_token(text, spans, ids, prompt.bytes_of)
        fits = [t for t in wanted if 0 < t < min(length, len(ids)) and prompt.answerable[ids[t]]]
        if fits:
            texts.append(Text(number, ids, min(length, len(ids))))
            count = settings.eval_positions_per_document
            chosen.append(draw_positions(fits, count, run.seed, number))
    return HeldOut(texts, chosen)


def measure_held_out(run: MidTraining, held_out: HeldOut, budget: int) -> dict[str, float | None]:
    """Metrics by name, the same on every rank. Collective over all ranks.

    budget: tokens of thought asked for, at every position: tiers have no budgets of their own here.
    "held-out next token", "... thought", "... no thought": parts of the positions that are right;
    "... gain" in nats a token; see ``probe.Standing``.
    """
    found = standing(run, held_out, budget)
    return {
        f"held-out {name.replace('_', ' ')}": value / found.positions if found.positions else None
        for name, value in vars(found).items()
        if name != "positions"
    } | {"held-out positions": found.positions}


def log_held_out(values: dict[str, float | None], steps: int) -> None:
    """Send metrics to TensorBoard and wandb, where this rank has them."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    tensorboard, wandb = get_tensorboard_writer(), get_wandb_writer()
    for name, value in values.items():
        if value is None:
            continue
        if tensorboard:
            tensorboard.add_scalar(f"rmt {name}", value, steps)
        if wandb:
            wandb.log({f"rmt {name}": value}, steps)
