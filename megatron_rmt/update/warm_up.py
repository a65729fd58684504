"""The format warm-up: answers, and thoughts where asked, that are written instead of drawn."""

from megatron_rmt.prompt.prompt import Prompt
from megatron_rmt.prompt.response import Response
from megatron_rmt.rollout.responses import Rollout, written
from megatron_rmt.rollout.trunk import Sample
from megatron_rmt.update.scoring import continuation


def response_from_text(
    prompt: Prompt, sample: Sample, row: int, budget: int
) -> tuple[Rollout, Response]:
    """A response at ``row``, all written: the text's next B_t tokens as the thought, its end, the
    true answer (``--rmt-warmup-thought text``); and what it says.

    What it says is known and not read: the text may hold an end of thought of its own.
    """
    thought, truth = continuation(prompt, sample, row, budget), int(sample.labels[row])
    return (
        written([*thought, *prompt.close, *prompt.true_answer(truth)]),
        Response(len(thought), closed=True, well_formed=True, prediction=prompt.bytes_of[truth]),
    )
