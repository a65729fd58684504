"""The format warm-up: answers, and thoughts where asked, that are written instead of drawn."""

from megatron_rmt.prompt.prompt import Prompt
from megatron_rmt.prompt.response import Response
from megatron_rmt.rollout.responses import Rollout, written
from megatron_rmt.rollout.trunk import Sample
from megatron_rmt.update.scoring import continuation


def true_target(prompt: Prompt, sample: Sample, row: int) -> list[int]:
    """The tokens behind ``row`` that a right answer says."""
    return prompt.target(continuation(prompt, sample, row, prompt.target_tokens))


def response_from_text(
    prompt: Prompt, sample: Sample, row: int, budget: int
) -> tuple[Rollout, Response]:
    """A response at ``row``, all written: the text's next B_t tokens as the thought, its end, the
    true answer (``--rmt-warmup-thought text``); and what it says.

    What it says is known and not read: the text may hold an end of thought of its own.
    """
    thought = continuation(prompt, sample, row, budget)
    truth = true_target(prompt, sample, row)
    prediction = b"".join(prompt.bytes_of[token] for token in truth)
    return (
        written([*thought, *prompt.close, *prompt.true_answer(truth)]),
        Response(len(thought), closed=True, well_formed=True, prediction=prediction),
    )
