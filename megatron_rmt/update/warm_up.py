"""The format warm-up: answers, and thoughts where asked, that are written instead of drawn."""

from megatron_rmt.prompt.prompt import Prompt
from megatron_rmt.rollout.responses import Rollout, written
from megatron_rmt.rollout.trunk import Sample
from megatron_rmt.update.scoring import continuation


def response_from_text(prompt: Prompt, sample: Sample, row: int, budget: int) -> Rollout:
    """A response at ``row``, all written: the text's next B_t tokens as the thought, its end, the
    true answer (``--rmt-warmup-thought text``)."""
    thought = continuation(prompt, sample, row, budget)
    return written([*thought, *prompt.close, *prompt.true_answer(int(sample.labels[row]))])
