"""The format warm-up: answers, and thoughts where asked, that are written instead of drawn."""

from collections.abc import Sequence

import torch

from megatron_rmt.algorithm.schedules import Schedule
from megatron_rmt.mid_training import MidTraining
from megatron_rmt.prompt.prompt import encode_prompt
from megatron_rmt.rollout.responses import Responses
from megatron_rmt.rollout.trunk import Trunk
from megatron_rmt.update.scoring import continuation


def true_answer(training: MidTraining, trunk: Trunk, row: int) -> tuple[int, ...]:
    """The answer that the format warm-up writes: the true next token, boxed where asked for."""
    token = int(trunk.labels[row])
    if training.template.answer == "next":
        return (token,)
    text = training.bytes_of[token].decode(errors="replace")
    return tuple(encode_prompt(training.tokenizer, f"\n\\boxed{{{text}}}"))


def responses_from_text(
    training: MidTraining, trunk: Trunk, rows: Sequence[int], step: Schedule
) -> Responses:
    """One response to each of ``rows``, all written: the text's next B_t tokens as the thought, its
    end, the true answer (``--rmt-warmup-thought text``)."""
    written = [
        [
            *continuation(training, trunk, row, step.budget),
            *training.close,
            *true_answer(training, trunk, row),
        ]
        for row in rows
    ]
    shape = (len(written), 1, max(map(len, written), default=0))
    tokens = torch.zeros(shape, dtype=torch.int64)
    for index, response in enumerate(written):
        tokens[index, 0, : len(response)] = torch.tensor(response)
    lengths = torch.tensor([len(response) for response in written], dtype=torch.int64)
    return Responses(
        tokens, lengths[:, None], torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
    )
