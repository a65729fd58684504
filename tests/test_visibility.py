"""Plans in a model's own attention; stock calls stay stock."""

import math

import pytest
import torch
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from megatron_rmt.model.blocks import Block
from megatron_rmt.model.layer_attention import LayerAttention
from megatron_rmt.model.visibility import (
    ROTARY_TABLE_STEP,
    TreeVisibility,
    Visibility,
    attach_tree_attention,
)
from tests.tiny_model import build_model, stock_logits

HEADS, KV_HEADS, WIDTH = 4, 2, 8
SCALE = 0.3


def _qkv(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(tokens, heads, WIDTH, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def _dense(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention written out: ``[queries, heads, width]``, visible ``[queries, keys]``."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * SCALE
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def _close(value: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("single_process_megatron")
def test_calls_without_a_plan_stay_stock_bit_for_bit():
    stock, attached = build_model(), build_model()
    attached.load_state_dict(stock.state_dict())
    assert attach_tree_attention(attached) == attach_tree_attention(attached) == 2
    assert attached.state_dict().keys() == stock.state_dict().keys()
    assert [name for name, _ in attached.named_modules()] == [
        name for name, _ in stock.named_modules()
    ]
    tokens = torch.arange(1, 15)
    assert torch.equal(stock_logits(attached, tokens), stock_logits(stock, tokens))


@pytest.mark.usefixtures("single_process_megatron")
def test_attaching_twice_wraps_once():
    model = build_model()
    attach_tree_attention(model)
    attention = model.decoder.layers[0].self_attention.core_attention
    first, hooks = attention.forward, len(model.decoder._forward_pre_hooks)
    attach_tree_attention(model)
    assert attention.forward is first
    assert len(model.decoder._forward_pre_hooks) == hooks == 1


@pytest.mark.usefixtures("single_process_megatron")
@pytest.mark.parametrize("change", [{}, {"softmax_scale": 0.7}, {"kv_channels": 16}])
def test_the_softmax_scale_is_the_models_own(change):
    stock, attached = build_model(**change), build_model(**change)
    attached.load_state_dict(stock.state_dict())
    attach_tree_attention(attached)
    tokens = torch.arange(1, 15)
    visibility = TreeVisibility(tokens=14, blocks=(Block(0, 14),))
    visibility.use_position_ids(torch.arange(14), 14)
    output = attached(
        tokens[None], visibility.position_ids[None], None, packed_seq_params=visibility
    )
    _close(output[0, :, :53], stock_logits(stock, tokens))


@pytest.mark.usefixtures("single_process_megatron")
def test_padding_rows_get_zeros_and_real_rows_what_they_get_without():
    model = build_model()
    attach_tree_attention(model)
    attention = model.decoder.layers[0].self_attention.core_attention
    visibility = TreeVisibility(tokens=10, blocks=(Block(0, 10),))
    query, key, value = (x[:, None] for x in _qkv(13))
    output = attention(query, key, value, None, packed_seq_params=visibility)
    assert output.shape == (13, 1, HEADS * WIDTH)
    assert output[10:].abs().max() == 0
    alone = attention(query[:10], key[:10], value[:10], None, packed_seq_params=visibility)
    assert torch.equal(output[:10], alone)


@pytest.mark.parametrize(
    ("longest", "table"),
    [(1, ROTARY_TABLE_STEP), (ROTARY_TABLE_STEP, ROTARY_TABLE_STEP), (1025, 2048)],
)
def test_rotary_tables_come_in_few_lengths(longest, table):
    visibility = Visibility()
    visibility.use_position_ids(torch.arange(3), longest)
    assert visibility.max_seqlen_q == visibility.max_seqlen_kv == table
    assert visibility.qkv_format == "sbhd"


@pytest.mark.usefixtures("single_process_megatron")
def test_an_attention_that_would_not_follow_is_refused():
    model = build_model()
    model.decoder.layers[1].self_attention = torch.nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"layer 2 has a Linear, .*; pass a layer specification"):
        attach_tree_attention(model)
    model.decoder.layers[1].self_attention = IdentityOp()
    assert attach_tree_attention(model) == 1


@pytest.mark.usefixtures("single_process_megatron")
def test_a_fused_rotation_of_unpacked_sequences_is_refused():
    with pytest.raises(ValueError, match=r"fused_single_qkv_rope is on .*; turn it off"):
        attach_tree_attention(build_model(fused_single_qkv_rope=True))


def test_a_plan_must_say_how_its_tokens_attend():
    with pytest.raises(NotImplementedError, match="Visibility must say"):
        Visibility().attend(LayerAttention(1, SCALE), *_qkv(3))
