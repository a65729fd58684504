"""Rollouts of hybrid stacks against a stock model that reads everything again for every token.

The cases and the slow reference are those of ``test_generate``; the stock model's Mamba layers go
by their recurrence, one row after the other.
"""

import functools

import numpy as np
import pytest
import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel

from megatron_rmt.cpu import state_space
from megatron_rmt.model.visibility import attach_tree_attention
from tests import test_generate
from tests.test_generate import (
    CASES,
    CHOSEN,
    _filled_store,
    _generate,
    _slow_response,
)
from tests.tiny_model import build_model, mix_row_by_row

pytestmark = pytest.mark.usefixtures("single_process_megatron")

STACKS = {
    "no positions": {"pattern": "M*M-", "position_embedding": "none"},
    "rotating": {"pattern": "*-MM", "position_embedding": "rope"},
    "without attention": {"pattern": "M-M", "position_embedding": "none"},
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


@pytest.mark.parametrize("stack", STACKS, indirect=True)
@pytest.mark.parametrize("name", ["boxed", "greedy, forced close", "warm-up"])
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
