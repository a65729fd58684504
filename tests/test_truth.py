"""Log-probs of the true token with and without a thought, against one sequence at a time."""

import dataclasses

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rmt.model.gpt import Policy
from megatron_rmt.model.visibility import attach_tree_attention
from megatron_rmt.update.truth import log_probs_of_truth
from tests.packed import Responses, reasoned
from tests.tiny_model import LONGEST_POSITION, VOCAB, build_model, stock_logits
from tests.tiny_step import BYTES, CLOSE, TEMPLATE, tiny_prompt, tiny_trunk

STEM = [3, 4]
# Closed by itself after two tokens; never closed; the first thought again, where the text ends.
# Empty thoughts; one token. The document goes on for one more token behind the second position.
TEXTS = [[[5, 6, 10, 7], [5, 6, 7, 8], [5, 6, 0]], [[10, 3], [5, 0], [10, 4]], [[7, 10], [7], [8]]]
THOUGHTS = [[[5, 6], [5, 6, 7, 8], [5, 6]], [[], [5], []], [[7], [7], [8]]]
ROWS = [5, 15, 45]
BYTES_OF = [b"", b"y", *BYTES[2:], *[b"x"] * (VOCAB - len(BYTES))]


@pytest.mark.usefixtures("single_process_megatron")
@pytest.mark.parametrize(("tokens", "truths"), [(1, [1, 1, 1]), (3, [3, 1, 3])])
def test_both_are_the_means_of_the_stock_model_on_whole_sequences(tokens: int, truths: list[int]):
    model, trunk = build_model(torch.float64), tiny_trunk([])
    encode = {"4": STEM, "</t>": [CLOSE]}.__getitem__
    prompt = dataclasses.replace(tiny_prompt(), bytes_of=BYTES_OF, encode=encode)
    prompt = dataclasses.replace(prompt, target_tokens=tokens)
    samples = reasoned(trunk, ROWS, _responses(), STEM)
    for position in (position for of in samples for position in of.positions):
        position.responses = [prompt.read(own.tokens.tolist()) for own in position.rollouts]

    expected = torch.empty(3, 4, dtype=torch.float64)
    for position, (row, count) in enumerate(zip(ROWS, truths, strict=True)):
        truth = trunk.labels[row : row + count].tolist()
        before = trunk.tokens[int(trunk.document_first[row]) : row + 1].tolist()
        expected[position, 3] = _mean_log_prob(model, before, truth)
        for rollout, thought in enumerate(THOUGHTS[position]):
            text = [*before, *STEM, *thought, CLOSE]
            expected[position, rollout] = _mean_log_prob(model, text, truth)
    attach_tree_attention(model)
    policy = Policy(model, VOCAB, LONGEST_POSITION, head_chunk_size=7)
    without, after_thought = log_probs_of_truth(policy, prompt, samples, 3)
    found = torch.cat([after_thought, without[:, None]], 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    # Equal thoughts are worth the same to the last digit.
    assert after_thought[0, 0] == after_thought[0, 2]
    assert after_thought[1, 0] == after_thought[1, 2]


def _mean_log_prob(model: GPTModel, text: list[int], truth: list[int]) -> Tensor:
    logits = stock_logits(model, torch.tensor([*text, *truth[:-1]]))[-len(truth) :]
    return logits.log_softmax(-1)[range(len(truth)), truth].mean()


@pytest.mark.usefixtures("single_process_megatron")
def test_without_a_position_there_is_none():
    model = build_model(torch.float32)
    attach_tree_attention(model)
    encode = {"4": STEM, "</t>": [CLOSE]}.__getitem__
    prompt = dataclasses.replace(tiny_prompt(), bytes_of=BYTES_OF, encode=encode)
    policy = Policy(model, VOCAB, LONGEST_POSITION, head_chunk_size=7)
    found = log_probs_of_truth(policy, prompt, reasoned(tiny_trunk([]), [], None), 3)
    assert [list(own.shape) for own in found] == [[0], [0, 3]]


def _responses() -> Responses:
    lengths = torch.tensor([[len(text) for text in group] for group in TEXTS])
    tokens = torch.zeros(3, 3, 4, dtype=torch.int64)
    for position, group in enumerate(TEXTS):
        for rollout, text in enumerate(group):
            tokens[position, rollout, : len(text)] = torch.tensor(text)
    return Responses(tokens, lengths, torch.ones(3, 3, 4).bool(), torch.zeros(3, 3, 4))


def test_boxed_answers_are_refused_by_name():
    prompt = tiny_prompt(template=dataclasses.replace(TEMPLATE, answer="boxed"))
    with pytest.raises(ValueError, match=r"--rmt-template test asks .* pass --rmt-template inline"):
        log_probs_of_truth(None, prompt, [], group=2)
