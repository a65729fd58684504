"""Captured layers against Megatron's own forward, in float64."""

import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rmt.cpu import compiled as cpu_compiled
from megatron_rmt.cpu import layer_kernels
from megatron_rmt.model.blocks import Block
from megatron_rmt.model.pipeline import forward_through_stages
from megatron_rmt.model.visibility import attach_tree_attention
from megatron_rmt.rollout import captured_layers as captured
from megatron_rmt.rollout.captured_layers import captured_layers
from megatron_rmt.rollout.kv_cache import (
    DecodeVisibility,
    KeyValueStore,
    SharedTrunk,
    StemVisibility,
    TailCache,
    TrunkVisibility,
    shared_trunks,
)
from megatron_rmt.rollout.live_rollouts import RolloutPosition
from tests.tiny_model import LONGEST_POSITION, VOCAB, build_model

pytestmark = pytest.mark.usefixtures("single_process_megatron", "compiling")

TRUNK, STEM, GROUP, STEPS = 12, 3, 2, 3
SHAPES = {
    "llama": {},
    "biases": {"add_bias_linear": True, "add_qkv_bias": True},
    "norms of queries and keys": {"qk_layernorm": True},
    "layer norm": {"normalization": "LayerNorm", "gated_linear_unit": False},
    "interleaved rotation": {"rotary_interleaved": True},
    "YaRN": {"position_embedding": "yarn"},
    "windows and sinks": {"window_size": (4, 0), "softmax_type": "learnable"},
}


@pytest.fixture(autouse=True)
def fused_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where this process had been started to compile."""
    original = rope_utils._apply_rotary_pos_emb_bshd
    rotation = layer_kernels._rotating_in_one_loop(original)
    monkeypatch.setattr(rope_utils, "_apply_rotary_pos_emb_bshd", rotation)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each graph that is recorded."""
    made, make_fx = [], captured.make_fx

    def counted(function: Any, **options: Any) -> Any:
        made.append(function)
        return make_fx(function, **options)

    monkeypatch.setattr(captured, "make_fx", counted)
    return made


def _model(**changes: Any) -> GPTModel:
    torch.manual_seed(1)
    model = build_model(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases are zeros and norms' weights ones at first.
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    attach_tree_attention(model)
    return model


def _pass(model: GPTModel, tokens: Tensor, positions: Tensor, visibility: Any) -> Tensor:
    visibility.use_position_ids(positions, LONGEST_POSITION)
    with torch.no_grad():
        return forward_through_stages(model, tokens, visibility, lambda hidden, _: hidden.clone())


def _rollouts(model: GPTModel, positions: list[int], keep: int | None = None) -> list[Tensor]:
    """Hidden states of stems and of some steps; ``keep``: rollouts left after the first."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> Tensor:
        return torch.randint(VOCAB, (count,), generator=generator)

    store, tails = KeyValueStore(TRUNK), TailCache(STEM + STEPS)
    trunk = TrunkVisibility(tokens=TRUNK, blocks=(Block(0, TRUNK),), store=store)
    _pass(model, tokens(TRUNK), torch.arange(TRUNK), trunk)

    def trunks(limits: Iterable[int]) -> list[SharedTrunk]:
        return shared_trunks([RolloutPosition(0, 0, 0, int(limit), 0) for limit in limits])

    stems = StemVisibility(
        tokens=len(positions) * STEM,
        store=store,
        tails=tails,
        trunks=trunks(positions),
        group=GROUP,
    )
    starts = torch.tensor(positions)[:, None] + torch.arange(STEM)
    found = [_pass(model, tokens(starts.numel()), starts.flatten(), stems)]
    after = torch.tensor(positions).repeat_interleave(GROUP) + STEM
    for step in range(STEPS):
        visibility = DecodeVisibility(
            tokens=len(after),
            store=store,
            tails=tails,
            trunks=trunks(after - STEM),
            column=STEM + step,
        )
        found.append(_pass(model, tokens(len(after)), after + step, visibility))
        if keep is not None and step == 0:
            tails.keep(range(keep))
            after = after[:keep]
    return found


def _check(model: GPTModel, *case: Any, tolerance: float = 1e-11) -> None:
    expected = _rollouts(model, *case)
    with captured_layers(model), warnings.catch_warnings():
        warnings.filterwarnings("error", ".*uncaptured")
        found = _rollouts(model, *case)
    for hidden, correct in zip(found, expected, strict=True):
        torch.testing.assert_close(hidden, correct, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_stems_and_steps_are_those_of_the_layers_themselves(shape, recordings):
    model = _model(**SHAPES[shape])
    # What is not fused takes cosines of fp32 angles anew in each layer.
    tolerance = {"interleaved rotation": 1e-6, "YaRN": 1e-5}.get(shape, 1e-11)
    _check(model, [4, 9, 12], tolerance=tolerance)
    # Two graphs serve both layers.
    assert len(recordings) == 2
    # Nothing is left on the model, whose other passes and gradients are its own.
    assert not any("forward" in vars(layer) for layer in model.decoder.layers)


def test_the_same_graphs_serve_all_numbers_of_rows_one_and_one_that_shrinks_included(recordings):
    model = _model()
    _check(model, [4, 9, 12])
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    _check(model, [5, 12])
    _check(model, [1, 2, 3, 4, 5], 7)
    assert len(recordings) == 2
    # Attention over tails is compiled by itself, at most twice.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - compiled <= 2
    _check(model, [7], 1)
    assert len(recordings) == 2


def test_weights_are_those_of_the_model_when_it_runs(recordings):
    model = _model()
    _check(model, [4, 9])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    _check(model, [4, 9])
    # As an optimizer does that lays its parameters into one buffer.
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1
    _check(model, [4, 9])
    assert len(recordings) == 2


def test_in_training_mode_it_is_recorded_anew(recordings):
    model = _model()
    _check(model.eval(), [4, 9])
    _check(model.train(), [4, 9])
    assert len(recordings) == 4


def test_the_trunk_pass_and_passes_without_a_visibility_are_megatrons(recordings):
    model = _model()
    tokens = torch.arange(5)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).triu(1)
    expected = model(tokens[None], tokens[None], mask)
    with captured_layers(model):
        assert torch.equal(model(tokens[None], tokens[None], mask), expected)
        store = KeyValueStore(5)
        _pass(model, tokens, tokens, TrunkVisibility(tokens=5, blocks=(Block(0, 5),), store=store))
    assert recordings == []


@pytest.mark.parametrize(
    "changes", [{"num_moe_experts": 2}, {"position_embedding": "learned_absolute"}], ids=str
)
def test_layers_with_experts_and_without_rotation_stay_megatrons(changes, recordings):
    _check(_model(**changes), [4, 9])
    assert recordings == []


def test_a_wrapped_layer_stays_as_it_is(recordings):
    model = _model()
    layer, calls = model.decoder.layers[0], []
    own = layer.forward

    def forward(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return own(*args, **options)

    layer.forward = forward
    _check(model, [4, 9])
    assert layer.forward is forward
    assert len(calls) == 2 * (1 + 1 + STEPS)


def test_what_cannot_be_recorded_runs_as_megatron_wrote_it_and_says_so_once(monkeypatch):
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such operation")

    model = _model()
    expected = _rollouts(model, [4, 9])
    monkeypatch.setattr(captured, "make_fx", refuse)
    with captured_layers(model), pytest.warns(UserWarning, match="uncaptured") as warned:
        found = _rollouts(model, [4, 9])
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    (message,) = [str(w.message) for w in warned if "uncaptured" in str(w.message)]
    assert message.endswith("which is slower: no such operation")


def test_nothing_is_captured_where_nothing_is_compiled(monkeypatch, recordings):
    monkeypatch.setattr(cpu_compiled, "is_available", lambda: False)
    _check(_model(), [4, 9])
    assert recordings == []


def test_the_layers_are_given_back_when_a_pass_fails():
    model = _model()
    with pytest.raises(KeyError), captured_layers(model):
        raise KeyError
    assert not any("forward" in vars(layer) for layer in model.decoder.layers)
