"""What thoughts are worth, against the stock model on one sequence at a time in float64."""

import dataclasses
import math
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rmt import probe
from megatron_rmt.mid_training import MidTraining
from megatron_rmt.model.gpt import Policy
from megatron_rmt.model.visibility import attach_tree_attention
from megatron_rmt.probe import (
    Answered,
    HeldOut,
    Place,
    Text,
    Thought,
    answer,
    document_sample,
    in_prompt,
    read_text,
    standing,
    swapped,
)
from megatron_rmt.prompt.prompt import Prompt
from megatron_rmt.prompt.response import Response
from megatron_rmt.rollout.generate import RolloutSettings
from megatron_rmt.rollout.kv_cache import KeyValueStore
from megatron_rmt.rollout.trunk import NO_LABEL
from tests.distributed import run_distributed, single_process_megatron
from tests.tiny_model import LONGEST_POSITION, VOCAB, build_model, stock_logits
from tests.tiny_step import TEMPLATE, tiny_run

END, CLOSE, BUDGET = 0, 10, 2
STEM, HEAD = [3, 4], [7, 8]
# Every token is a letter of its own; the last one is the end of thought.
BYTES_OF = [b"", *(bytes([64 + token]) for token in range(1, VOCAB))]
BYTES_OF[CLOSE] = b"</t>"


def _prompt(head: Sequence[int] = (), answer_is: str = "next") -> Prompt:
    return Prompt(
        template=dataclasses.replace(TEMPLATE, head="head" * bool(head), answer=answer_is),
        encode=lambda text: [CLOSE] if text == "</t>" else STEM,
        bytes_of=BYTES_OF,
        stop=[END],
        end_of_document=END,
        answer_tokens=1,
        force_close=True,
        encode_first=lambda text: list(head),
    )


def _run(model: GPTModel, prompt: Prompt) -> MidTraining:
    run = tiny_run(greedy=True, answer_tokens=1)
    changes = {
        "args": Namespace(expert_model_parallel_size=1),
        "policy": Policy(model, VOCAB, LONGEST_POSITION, head_chunk_size=7),
        "prompt": prompt,
    }
    return dataclasses.replace(run, **changes)


class Stock:
    """The stock model, one sequence at a time."""

    def __init__(self, head: Sequence[int]) -> None:
        self.model, self.head = build_model(), list(head)

    @torch.no_grad()
    def scores(self, tokens: Sequence[int]) -> Tensor:
        return stock_logits(self.model, torch.tensor([*tokens]))[-1]

    def thought(self, before: Sequence[int]) -> list[int]:
        """The likeliest one, without its end or that of the text."""
        found: list[int] = []
        while len(found) < 2 * BUDGET:
            token = int(self.scores([*self.head, *before, *STEM, *found]).argmax())
            if token in (CLOSE, END):
                break
            found.append(token)
        return found

    def ways(self, before: Sequence[int]) -> list[Tensor]:
        """Scores at once, after a thought, after none."""
        asked = [*self.head, *before, *STEM]
        thought = self.thought(before)
        return [
            self.scores(before),
            self.scores([*asked, *thought, CLOSE]),
            self.scores([*asked, CLOSE]),
        ]


# Where each document is predicted; the way that is right there, by turns.
TOKENS = [[3, 5, 9], [1, 6], [4, 7, 8, 10]]


def _documents(stock: Stock) -> HeldOut:
    """Texts in which each way is right at one of three positions, or more often if ways agree."""
    texts, number = [], 0
    for document, tokens in enumerate(TOKENS):
        generator = torch.Generator().manual_seed(document)
        ids = torch.randint(11, VOCAB, (12,), generator=generator).tolist()
        for token in tokens:
            likeliest = int(stock.ways(ids[:token])[(0, 1, 1, 2, 2, 2)[number % 6]].argmax())
            # What ends a thought or a text is no word of one.
            ids[token] = likeliest if likeliest not in (END, CLOSE) else ids[token]
            number += 1
        # The last token of a text is truth alone.
        texts.append(Text(40 + document, ids, 11))
    return HeldOut(texts, TOKENS)


@pytest.mark.usefixtures("single_process_megatron")
@pytest.mark.parametrize("head", [[], HEAD], ids=["bare", "behind a head"])
def test_the_standing_is_that_of_the_stock_model(head: list[int], monkeypatch: pytest.MonkeyPatch):
    stock = Stock(head)
    held_out = _documents(stock)
    expected = torch.zeros(4, dtype=torch.float64)
    for text, tokens in zip(held_out.texts, held_out.tokens, strict=True):
        for token in tokens:
            ways = stock.ways(text.ids[:token])
            right = [float(int(scores.argmax()) == text.ids[token]) for scores in ways]
            plain, after = (float(own.log_softmax(-1)[text.ids[token]]) for own in ways[:2])
            expected += torch.tensor([*right, after - plain], dtype=torch.float64)
    # Each way is right at other positions than the others are.
    assert expected[:3].min() > 0

    model = build_model()
    model.load_state_dict(stock.model.state_dict())
    attach_tree_attention(model)
    run = _run(model, _prompt(head))
    for at_once in (16, 2):
        monkeypatch.setattr(probe, "DOCUMENTS_AT_ONCE", at_once)
        found = standing(run, held_out, BUDGET)
        assert found.positions == 9
        rights = [found.next_token, found.thought, found.no_thought]
        assert rights == expected[:3].tolist()
        assert found.gain == pytest.approx(float(expected[3]), abs=1e-9)


@pytest.mark.usefixtures("single_process_megatron")
def test_in_a_box_the_drawn_answers_count_and_there_is_no_gain(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def answers(
        run: MidTraining, store: None, places: Sequence[Place], how: RolloutSettings
    ) -> list[list[Answered]]:
        asked.append((how.thinks, how.iteration, how.budget, how.group))
        response = Response(1, True, True, b"")
        return [
            [
                Answered(
                    response,
                    right=place.token > 4 + 2 * how.thinks,
                    whole=False,
                    by_itself=True,
                    thought=None,
                )
            ]
            for place in places
        ]

    monkeypatch.setattr(probe, "answer", answers)
    stock = Stock([])
    held_out = _documents(stock)
    model = stock.model
    attach_tree_attention(model)
    found = standing(_run(model, _prompt(answer_is="boxed")), held_out, BUDGET)
    assert asked == [(True, probe.OWN, BUDGET, 1), (False, probe.NONE, BUDGET, 1)]
    # Of 1, 3, 4, 5, 6, 7, 8, 9, 10.
    assert (found.positions, found.thought, found.no_thought) == (9, 4, 6)
    assert math.isnan(found.gain)


def _of_rank() -> tuple[list[int], list[list[float]]]:
    """The documents that a replica reads, and what both find, shared and not."""
    single_process_megatron()
    stock, numbers = Stock([]), []
    held_out = _documents(stock)
    attach_tree_attention(stock.model)
    run = _run(stock.model, _prompt())
    # Replicas that share experts take part in each other's passes, so they all read everything.
    args = Namespace(expert_model_parallel_size=2)
    alone = standing(dataclasses.replace(run, args=args), held_out, BUDGET)
    read = probe.read_text

    def noting(run: MidTraining, text: Text, store: KeyValueStore, row: int) -> Any:
        numbers.append(text.number)
        return read(run, text, store, row)

    probe.read_text = noting
    shared = standing(run, held_out, BUDGET)
    return numbers, [[*vars(found).values()] for found in (shared, alone)]


@pytest.mark.multiprocess
def test_replicas_share_the_documents():
    (first, of_first), (second, of_second) = run_distributed(2, _of_rank)
    assert (first, second) == ([40, 42], [41])
    assert of_first == of_second
    shared, alone = of_first
    assert shared[:4] == alone[:4]
    assert shared[4] == pytest.approx(alone[4], abs=1e-9)


@pytest.mark.usefixtures("single_process_megatron")
def test_a_given_thought_is_written_and_is_right_only_if_it_was_closed():
    stock = Stock([])
    text = _documents(stock).texts[0]
    model = build_model()
    model.load_state_dict(stock.model.state_dict())
    attach_tree_attention(model)
    run, store = _run(model, _prompt()), KeyValueStore(11)
    read_text(run, text, store, 0)
    how = RolloutSettings(group=1, budget=BUDGET, seed=1, iteration=0, temperature=1.0, greedy=True)
    place = Place(text, 5, 0)
    given = [20, 21, 22]
    after = int(stock.scores([*text.ids[:5], *STEM, *given, CLOSE]).argmax())
    ids = [*text.ids[:5], after, *text.ids[6:]]
    for closed, marked in ((True, b""), (False, b""), (True, b"x"), (False, b"x")):
        # Right is the next token; whole is the answer that the text marks, if it does.
        place = Place(Text(text.number, ids, 11, {5: marked and BYTES_OF[after]}), 5, 0)
        thought = Thought((*given, CLOSE), 3, closed)
        ((found,),) = answer(run, store, [place], how, [[thought]])
        assert found.right == (closed and after not in (END, CLOSE))
        assert found.whole == (found.right and marked == b"x")
        assert found.thought is None
        assert not found.by_itself
        assert found.response.thought_length == 3
    # Its own is told apart by where it ends.
    ((own,),) = answer(run, store, [place], how)
    expected = stock.thought(ids[:5])
    assert own.thought == Thought((*expected, CLOSE), len(expected), True)
    assert own.by_itself == (len(expected) < 2 * BUDGET)


def test_a_document_predicts_the_tokens_that_follow_or_those_that_are_given():
    sample = document_sample(torch.tensor([5, 6, 7, 8]))
    assert sample.labels.tolist() == [6, 7, 8, NO_LABEL]
    assert sample.labelled.tolist() == [True, True, True, False]
    given = document_sample(torch.tensor([5, 6, 7, 8]), torch.tensor([3, 4]), first=1)
    assert given.labels.tolist() == [NO_LABEL, 3, 4, NO_LABEL]
    assert given.documents == ((0, 4),)


def test_a_document_stands_behind_the_head():
    assert in_prompt(_prompt(), [5, 6]) == [5, 6]
    assert in_prompt(_prompt(HEAD), [5, 6]) == [*HEAD, 5, 6]


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_every_thought_goes_to_another_position_once(count: int):
    thoughts = [[number] for number in range(count)]
    moved = swapped(thoughts)
    assert sorted(moved) == thoughts
    assert all(own != other for own, other in zip(thoughts, moved, strict=True))
    assert swapped([["only"]]) == [["only"]]
