"""Tiny models of Transformer Engine's layers, beside local ones with the same weights."""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rmt.model.blocks import Block
from megatron_rmt.model.visibility import TreeVisibility
from tests.tiny_model import build_model

# Where the local layers hold what Transformer Engine fuses into the linear layer behind it.
FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


# FlexAttention, which trees take on a GPU, wants no narrower heads.
WIDTHS = {"kv_channels": 16}


def _fused(name: str) -> str:
    for local, fused in FUSED.items():
        name = name.replace(local, fused)
    return name


def engine_model(dtype: torch.dtype = torch.float32, **changes: Any) -> GPTModel:
    """``build_model`` with Transformer Engine's layers, on the GPU."""
    spec = get_gpt_layer_with_transformer_engine_spec
    return build_model(dtype, make_spec=spec, **changes).cuda()


def like_models(**changes: Any) -> tuple[GPTModel, GPTModel]:
    """One of local layers, one of Transformer Engine's, with the same weights, in fp32."""
    changes = WIDTHS | changes
    local = build_model(torch.float32, **changes).cuda()
    engine = engine_model(**changes)
    weights = {_fused(name): value for name, value in local.state_dict().items()}
    # What is missing is Transformer Engine's own state, empty without FP8.
    assert all("_extra_state" in name for name in engine.load_state_dict(weights, False)[0])
    return local, engine


def logits_and_gradients(model: GPTModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Of the packed tokens, everybody's squares as the loss."""
    tokens = torch.arange(1, 25).cuda()
    visibility = TreeVisibility(tokens=24, blocks=(Block(0, 24),))
    visibility.use_position_ids(torch.arange(24, device=tokens.device), 24)
    logits = model(tokens[None], visibility.position_ids[None], None, packed_seq_params=visibility)[
        0, :, :53
    ]
    logits.square().mean().backward()
    return logits.detach(), {_fused(n): p.grad for n, p in model.named_parameters()}
