"""Multi-latent attention (DeepSeek-V2, arXiv 2405.04434): what of it is stored, and how it is read.

A token's keys and values are a linear map of its latent, a few hundred numbers that all heads
share, and of one rotated key. Rollouts store these alone. They are read as what one key head holds
that is its own value: the map's two parts act on the queries before and on the outputs after,

    (W_k l) . q = l . (W_k^T q)          sum_j p_j (W_v l_j) = W_v sum_j p_j l_j

(Megatron's absorbed form). Trunk pass and update, where each key has many queries, attend to keys
and values of all heads, as Megatron's own layers.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from megatron_rmt.model.gpt import all_rows


@contextlib.contextmanager
def rotating_by(attention: MLASelfAttention, position_ids: Tensor, longest: int) -> Iterator[None]:
    """Within, ``attention`` rotates its rows by ``position_ids`` ``[rows]``, all below
    ``longest``; Megatron's would be 0, 1, and so on."""
    rotary = attention.rotary_pos_emb

    def angles_of_rows(*_: object, **__: object) -> Tensor | tuple[Tensor, float]:
        found = type(rotary).forward(rotary, longest)
        if isinstance(found, tuple):
            # YaRN's have a factor.
            return found[0].index_select(0, position_ids), found[1]
        return found.index_select(0, position_ids)

    rotary.forward = angles_of_rows
    try:
        yield
    finally:
        del rotary.forward


def with_whole_gradient(attention: MLASelfAttention, key: Tensor) -> Tensor:
    """``key`` ``[rows, 1, heads, dim]``, whose rotated dims get the gradient of all ranks' heads.

    They are one key of all heads, and each tensor-parallel rank has its own heads. Megatron sums up
    the gradients of a rank's heads alone, but for whole down projections under sequence
    parallelism; so one process and several would train differently. One all-reduce in backward.
    """
    config, group = attention.config, attention.tp_group
    down = attention.linear_kv_down_proj.weight.shape[0]
    is_whole = down == config.kv_lora_rank + config.qk_pos_emb_head_dim
    if group.size() == 1 or (is_whole and config.sequence_parallel):
        return key
    return _WholeGradient.apply(key, config.qk_head_dim, group)


class _WholeGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, key, plain, group):
        ctx.plain, ctx.group = plain, group
        return key.view_as(key)

    @staticmethod
    def backward(ctx, gradient):
        plain, rotated = gradient.tensor_split([ctx.plain], dim=-1)
        whole = rotated.sum(2, keepdim=True)
        torch.distributed.all_reduce(whole, group=ctx.group)
        # Megatron sums over the heads.
        alone = F.pad(whole, (0, 0, 0, gradient.shape[2] - 1))
        return torch.cat([plain, alone], dim=-1), None, None


def latents(attention: MLASelfAttention, key: Tensor, compressed: Tensor) -> Tensor:
    """What is stored of each row: ``[rows, 1, latent + rotated dims]``.

    key: ``[rows, 1, heads, dim]``, rotated. compressed: ``[rows (/tp), 1, latent dims]``, what
    the up projection reads.
    """
    rotated = key[:, :, 0, attention.config.qk_head_dim :]
    compressed = _normed(attention, all_rows(compressed, attention.config))
    return torch.cat([compressed, rotated], dim=-1)


def _normed(attention: MLASelfAttention, compressed: Tensor) -> Tensor:
    """With the norm, where it is a part of Transformer Engine's up projection, whose input this
    is."""
    projection, config = attention.linear_kv_up_proj, attention.config
    weight = getattr(projection, "layer_norm_weight", None)
    if weight is None:
        return compressed
    exact = compressed.to(torch.promote_types(compressed.dtype, torch.float32))
    weight = weight.to(exact.dtype) + float(config.layernorm_zero_centered_gamma)
    shape, eps = weight.shape, config.layernorm_epsilon
    if config.normalization == "RMSNorm":
        return F.rms_norm(exact, shape, weight, eps).to(compressed.dtype)
    bias = projection.layer_norm_bias.to(exact.dtype)
    return F.layer_norm(exact, shape, weight, bias, eps).to(compressed.dtype)


def absorbed(attention: MLASelfAttention, query: Tensor) -> Tensor:
    """Queries ``[rows, heads, latent + rotated dims]`` for latents, of ``query``
    ``[rows, heads, dim]`` for keys."""
    for_keys, _ = _maps(attention)
    plain, rotated = query.split([for_keys.shape[1], query.shape[-1] - for_keys.shape[1]], dim=-1)
    return torch.cat([torch.einsum("rhd,hdl->rhl", plain, for_keys), rotated], dim=-1)


def values_of(attention: MLASelfAttention, output: Tensor) -> Tensor:
    """Outputs ``[rows, heads, value dims]``, of means of latents
    ``[rows, heads, latent + rotated dims]``."""
    _, for_values = _maps(attention)
    return torch.einsum("rhl,hdl->rhd", output[..., : for_values.shape[2]], for_values)


def _maps(attention: MLASelfAttention) -> tuple[Tensor, Tensor]:
    """From latents to keys and to values, ``[heads, dims, latent dims]`` each, of this rank."""
    config = attention.config
    both = attention.linear_kv_up_proj.weight.unflatten(
        0, (-1, config.qk_head_dim + config.v_head_dim)
    )
    return both.split([config.qk_head_dim, config.v_head_dim], dim=1)
