"""Attention of the update's tree: three ways to compute what ``blocks`` says each row sees.

Each backend is made from the blocks of one micro-batch and called once per layer:

``sdpa``  one scaled-dot-product call per block with a dense mask; any device, torch's autograd.
``lse``   flash attention without masks on the CPU: each row on its own segment, causally, and on
          its ancestors, merged by their log-sum-exp. Work is what is visible, nothing more.
``flex``  FlexAttention, compiled, with one block mask per micro-batch; for CUDA. On the CPU only
          its forward runs, and slowly.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megatron_rmt.model.blocks import Block, Sees, _batch, ancestry
from megatron_rmt.model.lse_attention import LseAttention


class TreeAttention(Protocol):
    """Attention over the blocks of one micro-batch."""

    def __init__(self, blocks: Sequence[Block]) -> None: ...

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """``query`` ``[tokens, heads, dim]`` over ``key`` and ``value`` ``[tokens, kv heads, dim]``
        of one layer: ``[tokens, heads, dim]``, differentiable in all three."""
        ...


class SdpaAttention:
    """One ``scaled_dot_product_attention`` call per block, on its trunk's rows and its own."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        self._sees: Sees | None = None
        self._masks: dict[Block, Tensor] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        outputs = [query[:0]]
        for block in self.blocks:
            rows = slice(block.first, block.limit)
            keys, values = key[rows], value[rows]
            if block.trunk_limit > block.trunk_first:
                trunk = slice(block.trunk_first, block.trunk_limit)
                keys = torch.cat([key[trunk], keys])
                values = torch.cat([value[trunk], values])
            mask = self._mask(block, query.device)
            output = F.scaled_dot_product_attention(
                _batch(query[rows]),
                _batch(keys),
                _batch(values),
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs)

    def _mask(self, block: Block, device: torch.device) -> Tensor | None:
        """``[rows, trunk rows + rows]`` bool, None where plainly causal. All layers need it."""
        if not block.branches and block.trunk_limit == block.trunk_first:
            return None
        if block not in self._masks:
            trunk = torch.arange(block.trunk_first, block.trunk_limit, device=device)
            own = torch.arange(block.first, block.limit, device=device)
            sees = self._sees or ancestry(self.blocks, device)
            self._sees, self._masks[block] = sees, sees(own[:, None], torch.cat([trunk, own]))
        return self._masks[block]


class FlexAttention:
    """FlexAttention with one block mask, which is made at the first layer of a micro-batch."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        self._mask: BlockMask | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if self._mask is None:
            sees = ancestry(self.blocks, query.device)

            def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return sees(query, key)

            make = _compiled(create_block_mask) if query.is_cuda else create_block_mask
            tokens = len(query)
            self._mask = make(visible, None, None, tokens, tokens, device=query.device)
        attend = _compiled(flex_attention) if query.is_cuda else flex_attention
        output = attend(
            _batch(query),
            _batch(key),
            _batch(value),
            block_mask=self._mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output[0].transpose(0, 1)


@functools.cache
def _compiled(function: Callable[..., object]) -> Callable[..., object]:
    # Trees have all sizes: one kernel for all of them instead of one for each.
    return torch.compile(function, dynamic=True)


BACKENDS: dict[str, type[TreeAttention]] = {
    "sdpa": SdpaAttention,
    "lse": LseAttention,
    "flex": FlexAttention,
}


def backend_for(name: str, device: torch.device) -> type[TreeAttention]:
    """The backend that ``--rmt-attention`` ``name`` means on ``device``.

    ``auto`` is lse on the CPU; on CUDA flex where torch can compile, else sdpa (the choice and flex
    with CUDA are unverified on GPU).

    Raises:
        ValueError: ``name`` does not run on ``device``.
    """
    on_cpu = device.type == "cpu"
    if name == "auto":
        compiles = importlib.util.find_spec("triton") and not torch._dynamo.config.disable
        name = "lse" if on_cpu else "flex" if compiles else "sdpa"
    if name == "lse" and not on_cpu:
        raise ValueError(
            "--rmt-attention is lse, which is made of the CPU's flash attention, but the model is "
            f"on {device.type}; pass auto, flex or sdpa."
        )
    return BACKENDS[name]


def check_backend(name: str, device: torch.device) -> None:
    """Refuse, before the first step, a backend that cannot train on ``device``.

    Raises:
        ValueError: ``name`` does not run on ``device``, or its backward does not.
    """
    if backend_for(name, device) is FlexAttention and device.type == "cpu":
        raise ValueError(
            "--rmt-attention is flex, whose backward does not exist on the CPU; pass auto, lse or "
            "sdpa."
        )
