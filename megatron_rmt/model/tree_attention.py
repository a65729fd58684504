"""Attention of the update's tree: three ways to compute what ``blocks`` says each row sees.

Each backend is made from the blocks of one micro-batch and called once per layer, for all rows or,
where context-parallel ranks share them (``context_parallel``), for neighbouring ones:

``sdpa``  one scaled-dot-product call per block with a dense mask; any device, torch's autograd.
``lse``   flash attention without masks on the CPU: each row on its own segment, causally, and on
          its ancestors, merged by their log-sum-exp. Work is what is visible, nothing more.
``flex``  FlexAttention, compiled, with one block mask per micro-batch; for CUDA. On the CPU only
          its forward runs, and slowly.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megatron_rmt.model.blocks import Block, Sees, _batch, ancestry, clipped, rows_or_all
from megatron_rmt.model.lse_attention import LseAttention


class TreeAttention(Protocol):
    """Attention of ``rows``, all by default, over the blocks of one micro-batch."""

    def __init__(self, blocks: Sequence[Block], rows: slice | None = None) -> None: ...

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """``query`` ``[own rows, heads, dim]`` over ``key`` and ``value`` of one layer
        ``[tokens, kv heads, dim]``: ``[own rows, heads, dim]``, differentiable in all three."""
        ...


class SdpaAttention:
    """One ``scaled_dot_product_attention`` call per block, on its trunk's rows and its own."""

    def __init__(self, blocks: Sequence[Block], rows: slice | None = None) -> None:
        self.blocks = blocks
        self._rows = rows_or_all(rows, blocks)
        self._sees: Sees | None = None
        self._masks: dict[Block, Tensor] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        outputs = [query[:0]]
        for block in self.blocks:
            own = clipped(block.first, block.limit, self._rows)
            if own is None:
                continue
            rows = query[own[0] - self._rows.start : own[1] - self._rows.start]
            seen = slice(block.first, own[1])
            keys, values = key[seen], value[seen]
            if block.trunk_limit > block.trunk_first:
                trunk = slice(block.trunk_first, block.trunk_limit)
                keys = torch.cat([key[trunk], keys])
                values = torch.cat([value[trunk], values])
            mask = self._mask(block, own, query.device)
            with _kernels(query.device):
                output = F.scaled_dot_product_attention(
                    _batch(rows),
                    _batch(keys),
                    _batch(values),
                    attn_mask=mask,
                    is_causal=mask is None,
                    scale=scale,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs)

    def _mask(self, block: Block, own: tuple[int, int], device: torch.device) -> Tensor | None:
        """``[own rows, trunk rows + rows]`` bool, None where plainly causal. All layers need it."""
        whole = own[0] == block.first
        if whole and not block.branches and block.trunk_limit == block.trunk_first:
            return None
        if block not in self._masks:
            trunk = torch.arange(block.trunk_first, block.trunk_limit, device=device)
            keys = torch.cat([trunk, torch.arange(block.first, own[1], device=device)])
            sees = self._sees or ancestry(self.blocks, device)
            rows = torch.arange(*own, device=device)
            self._sees, self._masks[block] = sees, sees(rows[:, None], keys)
        return self._masks[block]


def _kernels(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Without cuDNN's, which torch would prefer: it plans for each pair of numbers of rows and
    keys, and every block of every step has others."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )


class FlexAttention:
    """FlexAttention with one block mask, which is made at the first layer of a micro-batch.

    Rows are padded to whole blocks of the kernel, by a segment of its own: kernels are compiled
    anew for one row and for less than a block, on one rank while the others wait.
    """

    def __init__(self, blocks: Sequence[Block], rows: slice | None = None) -> None:
        self.blocks = blocks
        self._rows = rows
        self._mask: BlockMask | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        count, tokens = len(query), len(key)
        if not count:
            return query
        query, key, value = (
            F.pad(x, (0, 0, 0, 0, 0, -len(x) % _FLEX_BLOCK)) for x in (query, key, value)
        )
        if self._mask is None:
            padded = len(key) > tokens
            blocks = [*self.blocks, Block(tokens, len(key))] if padded else self.blocks
            sees = ancestry(blocks, query.device)
            visible = _visible(sees) if self._rows is None else _visible_to(self._rows, sees, query)
            make = _compiled(create_block_mask) if query.is_cuda else create_block_mask
            self._mask = make(visible, None, None, len(query), len(key), device=query.device)
        attend = _compiled(flex_attention) if query.is_cuda else flex_attention
        output = attend(
            _batch(query),
            _batch(key),
            _batch(value),
            block_mask=self._mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            kernel_options=FLEX_OPTIONS if query.is_cuda else None,
        )
        return output[0, :, :count].transpose(0, 1)


def _visible(sees: Sees) -> Callable[..., Tensor]:
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(query, key)

    return visible


def _visible_to(rows: slice, sees: Sees, like: Tensor) -> Callable[..., Tensor]:
    """For queries that count from the first of ``rows``; padding sees what the last one does."""
    # Tensors, as numbers would be compiled in.
    first, last = torch.tensor([rows.start, rows.stop - 1], device=like.device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(torch.minimum(first + query, last), key)

    return visible


# Rows and keys of a block of FlexAttention's masks.
_FLEX_BLOCK = 128
# Of the backward kernel. Compiled for sm_90 with heads of 128, torch's own choice (64, 128, 128 and
# 64) keeps 608 bytes a thread outside the registers, this one none. Neither was timed.
FLEX_OPTIONS = {
    "bwd_BLOCK_M1": 32,
    "bwd_BLOCK_N1": 64,
    "bwd_BLOCK_M2": 64,
    "bwd_BLOCK_N2": 32,
    "bwd_num_warps": 8,
}


@functools.cache
def _compiled(function: Callable[..., object]) -> Callable[..., object]:
    # Trees have all sizes: one kernel for all of them instead of one for each. The whole graph, as
    # torch would run what it cannot compile, or may not compile once more, with dense scores.
    return torch.compile(function, dynamic=True, fullgraph=True, recompile_limit=64)


def _compiles() -> bool:
    """Whether ``torch.compile`` compiles; else it hands functions back as they are, in silence."""
    disabled = torch._dynamo.config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1"
    return not disabled and importlib.util.find_spec("triton") is not None


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
        name = "lse" if on_cpu else "flex" if _compiles() else "sdpa"
    if name == "flex" and not on_cpu and not _compiles():
        raise ValueError(
            "--rmt-attention is flex, which without torch.compile holds the scores of all pairs of "
            f"tokens, but on {device.type} nothing is compiled here: unset TORCHDYNAMO_DISABLE and "
            "TORCH_COMPILE_DISABLE and install Triton, or pass sdpa."
        )
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
