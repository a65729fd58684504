"""Generation against a slow reference: the stock model reads everything again for every token.

The reference decides in Python, on the bytes so far, when a thought or an answer ends, and draws
with the same uniform numbers. The tokenizer is a real byte-level BPE, so small that the markers of
thought and answer turn up by chance.
"""

import dataclasses
import functools
import itertools
import re
import sys
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer import attention
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedTokenizerFast

from megatron_rmt.algorithm.losses import Predictions
from megatron_rmt.algorithm.rng import uniforms
from megatron_rmt.cpu import compiled as cpu_compiled
from megatron_rmt.model.gpt import Policy
from megatron_rmt.model.layer_attention import LayerAttention
from megatron_rmt.model.visibility import attach_tree_attention
from megatron_rmt.prompt.prompt import Prompt
from megatron_rmt.prompt.response import Response
from megatron_rmt.prompt.template import Template
from megatron_rmt.prompt.token_bytes import token_bytes
from megatron_rmt.rollout import generate as generate_module
from megatron_rmt.rollout.generate import RolloutSettings, generate
from megatron_rmt.rollout.kv_cache import DecodeVisibility, KeyValueStore, TailCache
from megatron_rmt.rollout.live_rollouts import RolloutPosition
from megatron_rmt.rollout.prefill import read_trunk
from megatron_rmt.rollout.responses import Rollout
from megatron_rmt.rollout.sampling import greedy_tokens, sample_tokens
from megatron_rmt.rollout.trunk import Sample, UserBatch, build_trunk, first_rows
from megatron_rmt.update.forward_step import LossSettings, Update, make_forward_step
from megatron_rmt.update.tree import ChosenPosition, ReasonedSample, grow_tree
from tests.distributed import run_distributed
from tests.tiny_model import LATENT_YARN, LONGEST_POSITION, VOCAB, build_model, stock_logits

pytestmark = pytest.mark.usefixtures("single_process_megatron")

SEED, ITERATION = 3, 5
CLOSE = "</think>"


@functools.cache
def _tokenizer() -> PreTrainedTokenizerFast:
    """53 tokens: the letters, then pieces of the markers up to whole ones and beyond."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    text = ["</think>\\boxed{a} b", "</think> a", "b</think>", "\\boxed{", "{c}", "a}", "b} c"]
    text += ["ab ac", "bc ba", "</th", "ink>", "ca cb", "}}"]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<|end|>"], show_progress=False)
    backend.train_from_iterator(text * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


END = 0  # id of <|end|>


@functools.cache
def _bytes() -> list[bytes]:
    table = token_bytes(_tokenizer())
    assert len(table) == VOCAB
    assert table[END] == b""
    return table


@functools.cache
def _models() -> tuple[GPTModel, GPTModel]:
    stock, with_trees = build_model(torch.float32), build_model(torch.float32)
    with_trees.load_state_dict(stock.state_dict())
    attach_tree_attention(with_trees)
    return stock.eval(), with_trees.eval()


def _policy() -> Policy:
    return Policy(_models()[1], VOCAB, LONGEST_POSITION, head_chunk_size=16)


STEM = [9, 14, 3]
CHOSEN = [(0, 0), (0, 4), (0, 11), (1, 1), (3, 9)]


@functools.cache
def _trunks() -> tuple[list[Sample], list[Sample]]:
    """Two micro-batches of two samples with documents kept apart, after a prompt head."""
    trunks = []
    for micro_batch, seed in enumerate((1, 2)):
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(1, VOCAB, (2, 13), generator=generator)
        text[0, 5] = END
        positions = torch.arange(12).repeat(2, 1)
        positions[0, 6:] -= 6
        trunks.append(
            build_trunk(
                UserBatch(text[:, :-1], positions, text[:, 1:], torch.ones(2, 12)),
                [100 + 2 * micro_batch, 101 + 2 * micro_batch],
                preamble=[21, 22],
                end_of_document=END,
                separate_documents=True,
            )
        )
    return tuple(trunks)


def _samples() -> list[Sample]:
    return [sample for trunk in _trunks() for sample in trunk]


def _chosen_row(number: int, column: int) -> tuple[Sample, int, int]:
    """A sample, its first row in the store, and the row of ``column`` in the sample."""
    sample = _samples()[number]
    return sample, first_rows(_samples())[number], sample.columns.tolist().index(column)


def _truth(sample: int, column: int) -> tuple[int, ...]:
    """Answers of different lengths."""
    return tuple(range(30, 31 + (sample + column) % 3))


def _positions(chosen: list[tuple[int, int]]) -> list[RolloutPosition]:
    positions = []
    for number, column in chosen:
        sample, first_row, row = _chosen_row(number, column)
        positions.append(
            RolloutPosition(
                sample=sample.index,
                column=column,
                first=first_row + sample.document_of(row)[0],
                limit=first_row + row + 1,
                next_position=int(sample.position_ids[row]) + 1,
                truth=_truth(number, column),
            )
        )
    return positions


@dataclasses.dataclass(frozen=True)
class Case:
    answer: str = "boxed"
    budget: int = 5
    group: int = 4
    answer_tokens: int = 4
    temperature: float = 0.8
    force_close: bool = False
    greedy: bool = False
    warm_up: bool = False
    spelled_close: bool = False
    thinks: bool = True
    kv_bytes: int | None = None

    @property
    def close(self) -> list[int]:
        """Token ids of the forced end of thought: one token, or letter by letter."""
        if self.spelled_close:
            return [_bytes().index(bytes([byte])) for byte in CLOSE.encode()]
        return _tokenizer().encode(CLOSE, add_special_tokens=False)

    @property
    def prompt(self) -> Prompt:
        return Prompt(
            template=Template("test", "", "{budget}", CLOSE, self.answer),
            encode={str(self.budget): STEM, CLOSE: self.close}.__getitem__,
            bytes_of=_bytes(),
            stop=[END],
            end_of_document=END,
            answer_tokens=self.answer_tokens,
            force_close=self.force_close,
        )

    @property
    def settings(self) -> RolloutSettings:
        return RolloutSettings(
            group=self.group,
            budget=self.budget,
            seed=SEED,
            iteration=ITERATION,
            temperature=self.temperature,
            greedy=self.greedy,
            kv_bytes=self.kv_bytes,
            writes_truth=self.warm_up,
            thinks=self.thinks,
        )


def _filled_store() -> KeyValueStore:
    store, first_row = KeyValueStore(sum(map(len, _samples()))), 0
    for trunk in _trunks():
        read_trunk(_policy(), trunk, store, first_row)
        first_row += sum(map(len, trunk))
    return store


def _generate(
    case: Case, chosen: list[tuple[int, int]], store: KeyValueStore, **changes: Any
) -> list[list[Rollout]]:
    how = dataclasses.replace(case.settings, **changes)
    return generate(_policy(), case.prompt, store, _positions(chosen), how)


def _assert_same(groups: list[list[Rollout]], expected: list[list[Rollout]]) -> None:
    for group, expected_group in zip(groups, expected, strict=True):
        for rollout, other in zip(group, expected_group, strict=True):
            assert np.array_equal(rollout.tokens, other.tokens)
            assert np.array_equal(rollout.drawn, other.drawn)
            np.testing.assert_allclose(rollout.log_probs, other.log_probs, rtol=0, atol=1e-5)


def _answer_is_complete(text: bytes, answer: str) -> bool:
    """Whether a box in the text after the thought is closed, braces balanced. ``text`` begins with
    the thought."""
    _, closed, after = text.partition(CLOSE.encode())
    if not closed or answer != "boxed" or b"\\boxed{" not in after:
        return False
    depth = 1
    for byte in after.partition(b"\\boxed{")[2]:
        depth += {ord("{"): 1, ord("}"): -1}.get(byte, 0)
        if depth == 0:
            return True
    return False


@torch.no_grad()
def _slow_response(
    case: Case, number: int, column: int, rollout: int
) -> tuple[list[int], list[bool], list[float]]:
    """One response, each token by a pass of the stock model over prefix, stem and response."""
    sample, _, row = _chosen_row(number, column)
    before = b"" if case.thinks else CLOSE.encode()
    stem = STEM if case.thinks else STEM + case.close
    document_first = sample.document_of(row)[0]
    prefix = torch.cat([sample.tokens[document_first : row + 1], torch.tensor(stem)])
    tokens: list[int] = []
    drawn: list[bool] = []
    log_probs: list[float] = []
    to_write: list[int] | None = None
    truth = list(_truth(number, column)) if case.warm_up else []
    bound = case.budget if case.warm_up else 2 * case.budget
    answered = 0
    while True:
        text = before + b"".join(_bytes()[token] for token in tokens)
        thinking = CLOSE.encode() not in text
        if thinking and to_write is None and len(tokens) >= bound:
            if not (case.force_close or case.warm_up):
                break
            to_write = case.close + truth
        logits = stock_logits(_models()[0], torch.cat([prefix, torch.tensor(tokens).long()]))[-1:]
        draw = uniforms(SEED, ITERATION, sample.index, column, rollout, len(tokens))[None]
        shard = {"vocab_start": 0, "tp_group": None}
        if case.greedy:
            token = int(greedy_tokens(logits, **shard))
        else:
            token = int(sample_tokens(logits, draw, temperature=case.temperature, **shard)[0])
        log_prob = float((logits / case.temperature).log_softmax(-1)[0, token])
        ends = token == END or _answer_is_complete(text + _bytes()[token], case.answer)
        if case.warm_up and thinking and to_write is None and ends:
            to_write = case.close + truth
        forced = bool(to_write)
        if forced:
            token = to_write.pop(0)
        tokens.append(token)
        drawn.append(not forced)
        log_probs.append(0.0 if forced else log_prob)

        text += _bytes()[token]
        if case.warm_up:
            if to_write is None and CLOSE.encode() in text:
                to_write = truth
            if to_write == []:
                break
        else:
            answered += not thinking
            closed = CLOSE.encode() in text
            complete = _answer_is_complete(text, case.answer)
            if token == END or complete or (closed and answered == case.answer_tokens):
                break
    return tokens, drawn, log_probs


CASES = {
    "boxed": Case(),
    "next": Case(answer="next"),
    "next, forced close": Case(answer="next", force_close=True, budget=3, spelled_close=True),
    "boxed, forced close": Case(force_close=True, budget=3, answer_tokens=6),
    "warm-up": Case(answer="next", warm_up=True, spelled_close=True),
    "warm-up, boxed": Case(warm_up=True, budget=8),
    "budget of one": Case(answer="next", budget=1, answer_tokens=1),
    "no answer": Case(answer="next", answer_tokens=0),
    "no answer, forced close": Case(
        answer="next", answer_tokens=0, force_close=True, budget=3, spelled_close=True
    ),
    "hot": Case(temperature=1.7, group=3),
    "greedy": Case(greedy=True, group=2),
    "greedy, forced close": Case(answer="next", greedy=True, group=2, force_close=True),
    "no thought": Case(answer="next", thinks=False),
    "no thought, boxed": Case(thinks=False, spelled_close=True, answer_tokens=9),
}


@pytest.mark.parametrize("name", CASES)
def test_responses_equal_those_of_the_stock_model_token_by_token(name):
    case = CASES[name]
    groups = _generate(case, CHOSEN, _filled_store())
    assert [len(group) for group in groups] == [case.group] * len(CHOSEN)
    for group, (number, column) in zip(groups, CHOSEN, strict=True):
        for index, rollout in enumerate(group):
            tokens, drawn, log_probs = _slow_response(case, number, column, index)
            assert rollout.tokens.tolist() == tokens
            assert rollout.drawn.tolist() == drawn
            assert len(rollout) == len(tokens)
            np.testing.assert_allclose(rollout.log_probs, log_probs, rtol=0, atol=1e-5)
            # Nothing of what was not drawn has a probability.
            assert not rollout.log_probs[~rollout.drawn].any()
            assert rollout.tokens.dtype == np.int64
            assert rollout.log_probs.dtype == np.float32


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("name", ["boxed", "greedy, forced close"])
def test_compiled_and_captured_it_draws_the_same_tokens(name, monkeypatch):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(uncompiled|uncaptured)")
        compiled = _generate(CASES[name], CHOSEN, _filled_store())
    monkeypatch.setattr(cpu_compiled, "is_available", lambda: False)
    _assert_same(compiled, _generate(CASES[name], CHOSEN, _filled_store()))


def _flat(groups: list[list[Rollout]]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group]


def _read(case: Case, groups: list[list[Rollout]]) -> list[tuple[list[int], Response]]:
    tokens = [rollout.tokens.tolist() for rollout in _flat(groups)]
    return [(own, case.prompt.read(own)) for own in tokens]


def test_the_cases_hold_what_can_happen(monkeypatch: pytest.MonkeyPatch):
    """Else the comparison above would prove less than it seems to."""
    kept: list[int] = []
    keep = TailCache.keep
    monkeypatch.setattr(
        TailCache, "keep", lambda self, rows: (kept.append(len(rows)), keep(self, rows))
    )
    responses = _read(CASES["boxed"], _generate(CASES["boxed"], CHOSEN, _filled_store()))
    assert len([rows for rows in kept if rows]) >= 2
    bound = 2 * CASES["boxed"].budget
    assert any(read.well_formed for _, read in responses)
    assert any(read.closed and not read.well_formed for _, read in responses)
    assert any(not read.closed and len(tokens) == bound for tokens, read in responses)
    assert any(not read.closed and tokens[-1] == END for tokens, read in responses)
    spelled = [tokens for tokens, read in responses if read.closed]
    assert any(CLOSE.encode() not in [_bytes()[t] for t in tokens] for tokens in spelled)
    for name in ("warm-up", "next, forced close"):
        groups = _generate(CASES[name], CHOSEN, _filled_store())
        drawn = np.concatenate([rollout.drawn for rollout in _flat(groups)])
        assert drawn.any()
        assert not drawn.all()


def test_no_thought_is_longer_than_twice_the_budget():
    for name in ("boxed", "next", "budget of one"):
        case = CASES[name]
        for tokens, read in _read(case, _generate(case, CHOSEN, _filled_store())):
            assert read.thought_length <= 2 * case.budget
            assert len(tokens) <= 2 * case.budget + case.answer_tokens


def test_a_forced_thought_is_closed_and_answered():
    case = CASES["next, forced close"]
    groups = _generate(case, CHOSEN, _filled_store())
    for (tokens, read), rollout in zip(_read(case, groups), _flat(groups), strict=True):
        assert read.closed or tokens[-1] == END
        assert rollout.tokens[~rollout.drawn].tolist() in ([], case.close)


@pytest.mark.parametrize("name", ["warm-up", "warm-up, boxed"])
def test_the_warm_up_ends_every_response_with_the_truth_after_a_closed_thought(name):
    case = CASES[name]
    groups = _generate(case, CHOSEN, _filled_store())
    for group, (number, column) in zip(groups, CHOSEN, strict=True):
        truth = list(_truth(number, column))
        for rollout in group:
            tokens = rollout.tokens.tolist()
            assert tokens[-len(truth) :] == truth
            assert not rollout.drawn[-len(truth) :].any()
            thought = b"".join(_bytes()[token] for token in tokens[: -len(truth)])
            assert CLOSE.encode() in thought
            assert END not in tokens


@pytest.mark.parametrize("name", ["boxed", "next, forced close", "warm-up", "no thought"])
def test_a_response_does_not_depend_on_what_else_is_in_the_batch(name):
    case = CASES[name]
    together = _generate(case, CHOSEN, _filled_store())
    store = _filled_store()
    for position, group in zip(CHOSEN, together, strict=True):
        _assert_same(_generate(case, [position], store), [group])


def test_rollouts_do_not_depend_on_the_group_size():
    case = CASES["boxed"]
    large = _generate(case, CHOSEN, _filled_store())
    small = _generate(case, CHOSEN, _filled_store(), group=2)
    _assert_same(small, [group[:2] for group in large])


def test_the_draws_depend_on_seed_iteration_sample_column_and_rollout():
    case, store = CASES["boxed"], _filled_store()
    groups = _generate(case, CHOSEN, store)
    texts = {tuple(rollout.tokens.tolist()) for rollout in groups[0]}
    assert len(texts) == case.group

    def first_tokens(groups: list[list[Rollout]]) -> list[int]:
        return [int(rollout.tokens[0]) for rollout in _flat(groups)]

    for change in ({"seed": SEED + 1}, {"iteration": ITERATION + 1}):
        other = _generate(case, CHOSEN, store, **change)
        assert first_tokens(other) != first_tokens(groups)
    # The same context under another key.
    position = _positions(CHOSEN[:1])[0]
    for change in ({"sample": position.sample + 1}, {"column": position.column + 1}):
        moved = dataclasses.replace(position, **change)
        other = generate(_policy(), case.prompt, store, [moved], case.settings)
        assert first_tokens(other) != first_tokens(groups[:1])


@pytest.mark.parametrize("name", ["boxed", "next, forced close", "warm-up", "hot"])
def test_log_probs_when_drawn_equal_those_of_the_update(name):
    """No mismatch between rollout and training: what was recorded is what the tree computes."""
    case = CASES[name]
    groups = _generate(case, CHOSEN, _filled_store())
    model = _models()[1]
    for trunk in _trunks():
        reasoned = []
        for sample in trunk:
            own = [
                ChosenPosition(_chosen_row(number, column)[2], case.budget, STEM, group)
                for (number, column), group in zip(CHOSEN, groups, strict=True)
                if _samples()[number] is sample
            ]
            reasoned.append(ReasonedSample(sample, own))
        tree = grow_tree(reasoned, longest_position=LONGEST_POSITION, device=torch.device("cpu"))
        settings = LossSettings(
            ntp_coefficient=0.1,
            temperature=case.temperature,
            vocab_size=VOCAB,
            chunk_size=16,
            ntp_tokens=1.0,
            scale=1.0,
        )
        of_responses = torch.zeros(len(tree.drawn))
        known = Predictions.of(tree.ntp_mask, of_responses, of_responses, tree.drawn_log_probs)
        with torch.no_grad():
            output, _ = make_forward_step(settings)(iter([Update(tree, known, {})]), model)
        _, on_responses = output[1:].split([tree.trunk_predictions, len(tree.drawn)])
        assert tree.drawn.sum() > 10
        difference = (on_responses - tree.drawn_log_probs)[tree.drawn].abs().max()
        assert difference < 1e-4


def test_padding_of_the_vocabulary_is_never_drawn():
    weight = _models()[1].output_layer.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[VOCAB:] = 50 * kept[:1]
        groups = _generate(CASES["hot"], CHOSEN, _filled_store())
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert max(rollout.tokens.max() for rollout in _flat(groups)) < VOCAB
    again = _generate(CASES["hot"], CHOSEN, _filled_store())
    for rollout, other in zip(_flat(groups), _flat(again), strict=True):
        assert np.array_equal(rollout.tokens, other.tokens)


@pytest.fixture
def by_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: padded rows, tails that stay in place, and all limits on the device."""
    monkeypatch.setattr(generate_module, "tells_limits", lambda device: True)


@pytest.mark.parametrize("name", CASES)
def test_where_the_device_is_told_limits_the_tokens_are_the_same(name, monkeypatch):
    expected = _generate(CASES[name], CHOSEN, _filled_store())
    monkeypatch.setattr(generate_module, "tells_limits", lambda device: True)
    _assert_same(_generate(CASES[name], CHOSEN, _filled_store()), expected)


@pytest.mark.usefixtures("by_limits")
def test_where_the_device_is_told_limits_no_layer_rotates_by_itself(
    monkeypatch: pytest.MonkeyPatch,
):
    store, case = _filled_store(), CASES["boxed"]
    expected = _generate(case, CHOSEN, store)
    monkeypatch.delattr(attention, "apply_rotary_pos_emb")
    _assert_same(_generate(case, CHOSEN, store), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"rotary_interleaved": True},
        {"no_rope_freq": [0, 1]},
        {"position_embedding": "learned_absolute"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_layers_that_rotate_otherwise_or_not_at_all_do_so_where_the_device_is_told_limits(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    model = build_model(torch.float32, **changes).eval()
    attach_tree_attention(model)
    monkeypatch.setattr(sys.modules[__name__], "_models", lambda: (None, model))
    expected = _generate(CASES["boxed"], CHOSEN, _filled_store())
    monkeypatch.setattr(generate_module, "tells_limits", lambda device: True)
    _assert_same(_generate(CASES["boxed"], CHOSEN, _filled_store()), expected)


class _Calls(TorchDispatchMode):
    """Every operation: its name, the shapes and places of its tensors, and its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        def described(x: Any) -> Any:
            if isinstance(x, Tensor):
                return (tuple(x.shape), x.stride(), x.dtype)
            return tuple(map(described, x)) if isinstance(x, list | tuple) else x

        kwargs = kwargs or {}
        self.seen.append((str(function), described(args), described(tuple(kwargs.items()))))
        return function(*args, **kwargs)


@pytest.mark.usefixtures("by_limits")
def test_a_step_is_the_same_operations_as_the_one_before_also_where_a_rank_may_be_stopped(
    monkeypatch: pytest.MonkeyPatch,
):
    steps: list[tuple[int, list[Any]]] = []
    decode = generate_module._Decoder._decode
    write = generate_module.LiveRollouts.write

    def recorded(function: Callable[..., Any], rows: Callable[[Any], Tensor]) -> Any:
        def call(own: Any, *args: Any) -> None:
            with _Calls() as calls:
                function(own, *args)
            steps.append((len(rows(own, *args)), calls.seen))

        return call

    monkeypatch.setattr(
        generate_module._Decoder, "_decode", recorded(decode, lambda _, batch, __: batch.live.rows)
    )
    monkeypatch.setattr(
        generate_module.LiveRollouts, "write", recorded(write, lambda live, *_: live.rows)
    )
    case = Case(budget=15, temperature=2.0)
    generate(
        _policy(), case.prompt, _filled_store(), _positions(CHOSEN), case.settings, lambda: False
    )
    alike = [
        (a, b) for (n, a), (m, b) in zip(steps[1:], steps[3:], strict=False) if n == m and a and b
    ]
    assert len(alike) > 16
    for before, after in alike:
        assert before == after


def _record_without_a_gpu(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What runs the operations of ``step`` again on the very memory that they have used, as a CUDA
    graph does; nothing of Python runs again."""
    calls: list[tuple[Any, Any, Any, Any]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None):
            result = function(*args, **(kwargs or {}))
            # Megatron lets an empty tensor be another one; to fill it would be to overwrite that.
            if "empty" not in str(function):
                calls.append((function, args, kwargs or {}, result))
            return result

    with Record():
        flags = step()
    has_run = [True]

    def replay() -> Tensor:
        # The first time it has been run by being recorded.
        if has_run:
            has_run.clear()
            return flags
        for function, args, kwargs, result in calls:
            for old, new in zip(
                *map(tree_leaves, (result, function(*args, **kwargs))), strict=True
            ):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return flags

    return replay


@pytest.mark.usefixtures("by_limits")
@pytest.mark.parametrize("name", CASES)
def test_a_step_that_is_recorded_and_run_again_draws_the_same_tokens(name, monkeypatch):
    expected = _generate(CASES[name], CHOSEN, _filled_store())
    recorded: list[int] = []

    def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        recorded.append(1)
        return _record_without_a_gpu(step)

    monkeypatch.setattr(generate_module, "is_recordable", lambda *_: True)
    monkeypatch.setattr(generate_module, "record", record)
    _assert_same(_generate(CASES[name], CHOSEN, _filled_store()), expected)
    # Of 32, 16 and 8 rows, at most.
    assert len(recorded) <= 3
    assert bool(recorded) == (max(map(len, _flat(expected))) > 2)
    count = len(recorded)
    _assert_same(_generate(CASES[name], CHOSEN, _filled_store(), graph=False), expected)
    assert len(recorded) == count


# Keys and values of a token: two layers, two key heads of width 8, fp32.
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4


@pytest.mark.parametrize("name", ["boxed", "next, forced close", "warm-up"])
def test_responses_do_not_depend_on_the_waves_that_a_memory_bound_makes(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    case = CASES[name]
    together = _generate(case, CHOSEN, _filled_store())
    allocated: list[int] = []
    start = TailCache.start

    def measured(tails: TailCache, layer: int, *others: Any) -> None:
        start(tails, layer, *others)
        stored = [x.numel() * x.element_size() for pair in tails.stored.values() for x in pair]
        allocated.append(sum(stored))

    monkeypatch.setattr(TailCache, "start", measured)
    tail = len(STEM) + 2 * case.budget + case.answer_tokens + 12
    bound = sum(map(len, _samples())) * TOKEN_BYTES + 2 * case.group * tail * TOKEN_BYTES
    _assert_same(_generate(case, CHOSEN, _filled_store(), kv_bytes=bound), together)
    assert len(allocated) >= 2 * 2, "two waves, two layers"
    assert max(allocated) <= bound


def test_a_bound_that_no_position_fits_in_is_refused():
    with pytest.raises(ValueError, match=r"--rmt-rollout-kv-gib is 1\.86e-08"):
        _generate(CASES["boxed"], CHOSEN, _filled_store(), kv_bytes=20)


@pytest.mark.parametrize("name", CASES)
def test_no_response_is_longer_than_its_bound_which_is_what_is_allocated(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    case = CASES[name]
    capacities: list[int] = []
    keep = TailCache.__init__

    def measured(tails: TailCache, capacity: int) -> None:
        capacities.append(capacity)
        keep(tails, capacity)

    monkeypatch.setattr(TailCache, "__init__", measured)
    groups = _generate(case, CHOSEN, _filled_store())
    bound = case.prompt.bound(
        case.budget * case.thinks,
        warm_up=case.warm_up,
        truth_tokens=max(len(_truth(*position)) for position in CHOSEN),
    )
    stem = STEM if case.thinks else STEM + case.close
    assert capacities == [len(stem) + bound.tokens]
    assert max(map(len, _flat(groups))) <= bound.tokens


def test_no_positions_give_no_responses():
    assert _generate(CASES["boxed"], [], _filled_store()) == []


def test_the_host_waits_for_the_device_once_a_token(monkeypatch: pytest.MonkeyPatch):
    """Reading a value back is what makes a host wait: each such read is counted."""
    reads: list[str] = []
    for name in ("tolist", "item", "__int__", "__bool__", "__float__", "nonzero", "numpy"):
        original = getattr(Tensor, name)

        def counted(tensor: Tensor, *args: Any, _original=original, _name=name, **kwargs: Any):
            reads.append(_name)
            return _original(tensor, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, counted)
    steps: list[int] = []
    attend = DecodeVisibility.attend

    def attended(visibility: DecodeVisibility, layer: LayerAttention, *others: Any) -> Tensor:
        if layer.number == 1:
            steps.append(len(reads))
        return attend(visibility, layer, *others)

    monkeypatch.setattr(DecodeVisibility, "attend", attended)
    # What lies on the host anyway, to sort rows by sample.
    grouped = _uncounted(generate_module.shared_trunks, reads)
    monkeypatch.setattr(generate_module, "shared_trunks", grouped)
    _generate(CASES["boxed"], CHOSEN, _filled_store())
    assert len(steps) > 8
    assert [b - a for a, b in itertools.pairwise(steps)] == [1] * (len(steps) - 1)


def _uncounted(function: Callable[..., Any], reads: list[str]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        before = len(reads)
        result = function(*args)
        del reads[before:]
        return result

    return call


def test_nothing_keeps_a_gradient_and_nothing_is_an_inference_tensor(
    monkeypatch: pytest.MonkeyPatch,
):
    """Transformer Engine's buffers that were first made in inference mode could not be trained."""
    held: list[Tensor] = []
    attend = DecodeVisibility.attend

    def attended(visibility: DecodeVisibility, layer: LayerAttention, *tensors: Any) -> Tensor:
        held.extend([*tensors[:3], *visibility.tails.stored[layer.number]])
        return attend(visibility, layer, *tensors)

    monkeypatch.setattr(DecodeVisibility, "attend", attended)
    _generate(CASES["boxed"], CHOSEN, _filled_store())
    assert held
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in held)


@pytest.mark.parametrize("seed", range(5))
def test_random_models_budgets_and_positions(seed: int, monkeypatch: pytest.MonkeyPatch):
    """Also a budget of one, groups of one, the first and the last position."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    case = Case(
        answer=pick("boxed", "next"),
        budget=pick(1, 1, 2, 7),
        group=pick(1, 3),
        answer_tokens=pick(1, 2, 5),
        temperature=pick(0.5, 1.3),
        force_close=pick(True, False),
        spelled_close=pick(True, False),
    )
    torch.manual_seed(seed + 50)
    stock, ours = build_model(torch.float32), build_model(torch.float32)
    ours.load_state_dict(stock.state_dict())
    attach_tree_attention(ours)
    models_ = (stock.eval(), ours.eval())
    monkeypatch.setattr(sys.modules[__name__], "_models", lambda: models_)
    places = torch.randperm(12, generator=generator)[:2].tolist()
    chosen = [(0, 1), *((pick(0, 1, 2, 3), place) for place in places), (3, 11)]
    chosen = sorted(set(chosen))
    groups = _generate(case, chosen, _filled_store())
    for group, (number, column) in zip(groups, chosen, strict=True):
        tokens, drawn, _ = _slow_response(case, number, column, case.group - 1)
        assert group[-1].tokens.tolist() == tokens
        assert group[-1].drawn.tolist() == drawn
    for tokens, read in _read(case, groups):
        forced = len(case.close) if case.force_close else 0
        assert read.thought_length <= 2 * case.budget + forced
        assert len(tokens) <= 2 * case.budget + forced + case.answer_tokens


# Windows of a token that end in the stem, in the trunk, and of layers that differ.
ATTENTION: dict[str, dict[str, Any]] = {
    "short windows": {"window_size": (1, 0)},
    "windows": {"window_size": (6, 0), "window_attn_skip_freq": [0, 1]},
    "off by one": {"softmax_type": "off-by-one"},
    "YaRN": {"position_embedding": "yarn"},
    "windows and sinks": {"window_size": (4, 0), "softmax_type": "learnable"},
    "latents": {"multi_latent_attention": True},
    "latents, YaRN, plain queries": {
        "multi_latent_attention": True,
        "q_lora_rank": None,
        "qk_layernorm": False,
        "recompute_granularity": "selective",
        "recompute_modules": ["mla_up_proj"],
        **LATENT_YARN,
    },
}


@pytest.mark.parametrize("by_limits", [False, True], ids=["slices", "limits"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_responses_of_models_that_attend_otherwise(attention, by_limits: bool, monkeypatch):
    models_ = [build_model(torch.float32, **ATTENTION[attention]) for _ in range(2)]
    models_[1].load_state_dict(models_[0].state_dict())
    attach_tree_attention(models_[1])
    monkeypatch.setattr(sys.modules[__name__], "_models", lambda: [m.eval() for m in models_])
    monkeypatch.setattr(generate_module, "tells_limits", lambda device: by_limits)
    for case in (CASES["boxed"], CASES["greedy, forced close"]):
        groups = _generate(case, CHOSEN, _filled_store())
        for group, (number, column) in zip(groups, CHOSEN, strict=True):
            tokens, drawn, log_probs = _slow_response(case, number, column, case.group - 1)
            assert group[-1].tokens.tolist() == tokens
            assert group[-1].drawn.tolist() == drawn
            np.testing.assert_allclose(group[-1].log_probs, log_probs, rtol=0, atol=1e-5)


EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
}


def _with_experts(expert_ranks: int) -> GPTModel:
    """The same weights whatever rank holds them."""
    model = build_model(torch.float32, expert_model_parallel_size=expert_ranks, **EXPERTS)
    first = parallel_state.get_expert_model_parallel_rank() * (4 // expert_ranks)
    for name, parameter in model.named_parameters():
        local = re.search(r"local_experts\.(\d+)\.", name)
        if local:
            name = name.replace(local[0], f"local_experts.{int(local[1]) + first}.")
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    attach_tree_attention(model)
    return model.eval()


def _rollouts_of_shares(
    shares: list[list[tuple[int, int]]], kv_bytes: int | None
) -> list[list[Rollout]]:
    """This rank's share, with experts on all ranks; _models of a rank is its own."""
    ranks = torch.distributed.get_world_size()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = _with_experts(ranks)
    globals()["_models"] = lambda: (None, model)
    own = shares[torch.distributed.get_rank()]
    return _generate(CASES["boxed"], own, _filled_store(), kv_bytes=kv_bytes)


@pytest.mark.multiprocess
@pytest.mark.parametrize("share", [[CHOSEN[:1], CHOSEN[1:]], [CHOSEN, []]], ids=["uneven", "none"])
@pytest.mark.parametrize("bound", [False, True], ids=["one wave", "waves"])
def test_ranks_that_share_experts_wait_for_each_other(share, bound, monkeypatch):
    """One has fewer rollouts, or none, and finishes earlier: no deadlock, and the same tokens."""
    model = _with_experts(1)
    monkeypatch.setattr(sys.modules[__name__], "_models", lambda: (None, model))
    alone = _generate(CASES["boxed"], CHOSEN, _filled_store())
    tail = len(STEM) + 2 * CASES["boxed"].budget + CASES["boxed"].answer_tokens
    trunk = sum(map(len, _samples()))
    kv_bytes = (trunk + 2 * CASES["boxed"].group * tail) * TOKEN_BYTES if bound else None
    results = run_distributed(2, _rollouts_of_shares, share, kv_bytes, timeout=60)
    _assert_same([group for part in results for group in part], alone)
