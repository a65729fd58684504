"""Rollouts of hybrid stacks against a stock model that reads everything again for every token.

The cases and the slow reference are those of ``test_generate``; the stock model's Mamba layers go
by their recurrence, one row after the other.
"""

import functools
import warnings

import numpy as np
import pytest
import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mamba_mixer import MambaMixer

from megatron_rmt.cpu import compiled as cpu_compiled
from megatron_rmt.cpu import state_space
from megatron_rmt.cpu.state_space import StateSpace
from megatron_rmt.model.blocks import Block
from megatron_rmt.model.visibility import attach_tree_attention
from megatron_rmt.rollout.kv_cache import KeyValueStore, StemVisibility, TailCache, TrunkVisibility
from megatron_rmt.rollout.memory import CacheSize
from megatron_rmt.rollout.state_cache import state_bytes
from tests import test_generate
from tests.test_generate import (
    CASES,
    CHOSEN,
    _assert_same,
    _filled_store,
    _generate,
    _slow_response,
)
from tests.tiny_model import VOCAB, build_model, mix_row_by_row, stock_logits

pytestmark = pytest.mark.usefixtures("single_process_megatron")

STACKS = {
    "no positions": {"pattern": "M*M-", "position_embedding": "none"},
    "rotating": {"pattern": "*-MM", "position_embedding": "rope"},
    "without attention": {"pattern": "M-M", "position_embedding": "none"},
}
# The others are slow.
QUICK = {
    ("no positions", "boxed"),
    ("rotating", "greedy, forced close"),
    ("without attention", "warm-up"),
}


@functools.cache
def _models(stack: str) -> tuple[HybridModel, HybridModel]:
    stock, with_trees = (build_model(torch.float32, **STACKS[stack]) for _ in range(2))
    with_trees.load_state_dict(stock.state_dict())
    attach_tree_attention(with_trees)
    mix_row_by_row(stock)
    return stock.eval(), with_trees.eval()


@pytest.fixture
def stack(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of ``test_generate`` are those of the stack that the test names, and chunks are so
    short that trunks have several."""
    monkeypatch.setattr(test_generate, "_models", lambda: _models(request.param))
    monkeypatch.setattr(state_space, "CHUNK_ROWS", 4)


@pytest.mark.parametrize(
    ("stack", "name"),
    [
        pytest.param(stack, name, marks=() if (stack, name) in QUICK else pytest.mark.slow)
        for stack in STACKS
        for name in ("boxed", "greedy, forced close", "warm-up")
    ],
    indirect=["stack"],
)
def test_responses_equal_those_of_the_stock_model_token_by_token(stack, name):
    case = CASES[name]
    groups = _generate(case, CHOSEN, _filled_store())
    lengths = set()
    for group, (number, column) in zip(groups, CHOSEN, strict=True):
        for index, rollout in enumerate(group):
            tokens, drawn, log_probs = _slow_response(case, number, column, index)
            assert rollout.tokens.tolist() == tokens
            assert rollout.drawn.tolist() == drawn
            np.testing.assert_allclose(rollout.log_probs, log_probs, rtol=0, atol=1e-5)
            lengths.add(len(tokens))
    assert len(lengths) > 1


@pytest.mark.slow
@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("stack", ["rotating"], indirect=True)
def test_compiled_and_captured_it_draws_the_same_tokens(stack, monkeypatch):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(uncompiled|uncaptured)")
        compiled = _generate(CASES["boxed"], CHOSEN, _filled_store())
    monkeypatch.setattr(cpu_compiled, "is_available", lambda: False)
    _assert_same(compiled, _generate(CASES["boxed"], CHOSEN, _filled_store()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_is_what_the_store_holds(dtype):
    """A trunk of 128 rows, two whole chunks, and the tails of two groups of three."""
    model = build_model(dtype, pattern="M*M-")
    spaces = [StateSpace.of(m) for m in model.modules() if isinstance(m, MambaMixer)]
    store, tails = KeyValueStore(128), TailCache(9)
    for space in spaces:
        gate = torch.zeros(128, space.heads * space.head_dim, dtype=dtype)
        inputs = torch.zeros(128, len(space.kernel), dtype=dtype)
        steps = torch.zeros(128, space.heads, dtype=dtype)
        trunk = TrunkVisibility(tokens=128, blocks=(Block(0, 128),), store=store)
        trunk.mix(space, gate, inputs, steps)
        stems = StemVisibility(store=store, tails=tails, last_rows=[40, 127], group=3)
        stems.mix(space, *(values[:8] for values in (gate, inputs, steps)))
    size = CacheSize(0, 128, 6, 3, tail_tokens=9, states=state_bytes(model))
    rollouts = sum(_bytes(*own) for own in tails.states.values())
    assert rollouts == 6 * size.states.rollout == 2 * size.position_bytes
    rows = sum(_bytes(*store.states.rows(space.number, slice(None))) for space in spaces)
    # Without the one that every document begins with.
    ends = sum(_bytes(*store.states.states(space.number).at(slice(1, None))) for space in spaces)
    assert size.trunk_bytes == pytest.approx(rows + ends, abs=128)
    assert size.trunk_bytes >= rows + ends
    assert f"{size.states.rollout} of states a rollout" in size.describe()


def _bytes(*values: torch.Tensor) -> int:
    return sum(own.numel() * own.element_size() for own in values)


@pytest.mark.parametrize("tied", [False, True])
def test_the_hook_for_hidden_states_is_that_of_gpt_models(tied):
    """Scores made of what it is given are the model's, and it leaves no trace in other calls."""
    model = build_model(torch.float64, pattern="M*", tied=tied).eval()
    tokens = torch.arange(1, 9)
    expected = stock_logits(model, tokens)
    attach_tree_attention(model)
    attach_tree_attention(model)

    def scores(*, hidden_states, output_layer, output_weight, context, config, **_):
        assert context == "context"
        assert config is model.config
        assert (output_weight is None) != tied
        return output_layer(hidden_states, weight=output_weight)[0][:, 0, :VOCAB]

    hidden = torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
    how = {"output_processor": scores, "output_processor_context": "context"}
    found = model(tokens[None], torch.arange(8)[None], hidden, **how)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(stock_logits(model, tokens), expected, rtol=0, atol=0)
