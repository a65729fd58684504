"""Log-probs of the true token with and without a thought, against one sequence at a time."""

import dataclasses

import pytest
import torch

from megatron_rmt.model.gpt import Policy
from megatron_rmt.model.visibility import attach_tree_attention
from megatron_rmt.update.truth import log_probs_of_truth
from tests.packed import Responses, reasoned
from tests.tiny_model import LONGEST_POSITION, VOCAB, build_model, stock_logits
from tests.tiny_step import BYTES, CLOSE, TEMPLATE, tiny_prompt, tiny_trunk

STEM = [3, 4]
# Closed by itself after two tokens; never closed; empty thought; text ends in the thought.
TEXTS = [[[5, 6, 10, 7], [5, 6, 7, 8]], [[10, 3], [5, 0, 0, 0]]]
THOUGHTS = [[[5, 6], [5, 6, 7, 8]], [[], [5]]]


@pytest.mark.usefixtures("single_process_megatron")
def test_both_are_those_of_the_stock_model_on_whole_sequences():
    model, trunk, rows = build_model(torch.float64), tiny_trunk([]), [5, 21]
    bytes_of = [*BYTES, *[b"x"] * (VOCAB - len(BYTES))]
    encode = {"4": STEM, "</t>": [CLOSE]}.__getitem__
    prompt = dataclasses.replace(tiny_prompt(), bytes_of=bytes_of, encode=encode)
    samples = reasoned(trunk, rows, _responses())
    for position in (position for of in samples for position in of.positions):
        position.responses = [prompt.read(own.tokens.tolist()) for own in position.rollouts]

    expected = torch.empty(2, 3, dtype=torch.float64)
    for position, row in enumerate(rows):
        truth = int(trunk.labels[row])
        before = trunk.tokens[int(trunk.document_first[row]) : row + 1]
        expected[position, 2] = stock_logits(model, before)[-1].log_softmax(-1)[truth]
        for rollout, thought in enumerate(THOUGHTS[position]):
            text = torch.cat([before, torch.tensor([*STEM, *thought, CLOSE])])
            expected[position, rollout] = stock_logits(model, text)[-1].log_softmax(-1)[truth]
    attach_tree_attention(model)
    policy = Policy(model, VOCAB, LONGEST_POSITION, head_chunk_size=7)
    without, after_thought = log_probs_of_truth(policy, prompt, samples, budget=4, group=2)
    assert without.dtype == after_thought.dtype == torch.float32
    found = torch.cat([after_thought, without[:, None]], 1).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def _responses() -> Responses:
    lengths = torch.tensor([[len(text) for text in group] for group in TEXTS])
    tokens = torch.zeros(2, 2, 4, dtype=torch.int64)
    for position, group in enumerate(TEXTS):
        for rollout, text in enumerate(group):
            tokens[position, rollout, : len(text)] = torch.tensor(text)
    return Responses(tokens, lengths, torch.ones(2, 2, 4).bool(), torch.zeros(2, 2, 4))


def test_boxed_answers_are_refused_by_name():
    prompt = tiny_prompt(template=dataclasses.replace(TEMPLATE, answer="boxed"))
    with pytest.raises(ValueError, match=r"--rmt-template test asks .* pass --rmt-template inline"):
        log_probs_of_truth(None, prompt, [], budget=4, group=2)
