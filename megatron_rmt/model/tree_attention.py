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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

from megatron_rmt.model.blocks import Block, Sees, _batch, ancestry, clipped, rows_or_all
from megatron_rmt.model.lse_attention import LseAttention


class TreeAttention(Protocol):
    """Attention of ``rows``, all by default, over the blocks of one micro-batch."""

    def __init__(self, blocks: Sequence[Block], rows: slice | None = None) -> None: ...

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """``query`` ``[own rows, heads, dim]`` over ``key`` and ``value`` of one layer
        ``[tokens, kv heads, dim]``: ``[own rows, heads, dim]``, differentiable in all three; the
        dims of values, and so of what is returned, may be others.
        window, sink: of the layer, as in ``LayerAttention``; differentiable in the sink too."""
        ...


class SdpaAttention:
    """One ``scaled_dot_product_attention`` call per block, on its trunk's rows and its own; with a
    window, on those of them that a row sees, and several calls for a document."""

    def __init__(self, blocks: Sequence[Block], rows: slice | None = None) -> None:
        self.blocks = blocks
        self._rows = rows_or_all(rows, blocks)
        self._sees: dict[int | None, Sees] = {}
        self._masks: dict[tuple[_Piece, int | None], Tensor] = {}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        width = value.shape[2]
        if sink is not None:
            query, key, value = _with_sink(query, key, value, sink, scale)
        outputs = [query.new_empty(0, query.shape[1], value.shape[2])]
        first = self._rows.start
        pieces = (piece for block in self.blocks for piece in _pieces(block, window, self._rows))
        for piece in pieces:
            rows = query[piece.first - first : piece.limit - first]
            keys, values = map(piece.keys, (key, value))
            mask = self._mask(piece, window, query.device)
            if sink is not None:
                # The key that is before all others, and, so that causal stays what it is, a row.
                keys, values = (
                    torch.cat([x[-1:], own]) for x, own in ((key, keys), (value, values))
                )
                rows = F.pad(rows, (0, 0, 0, 0, 1, 0))
                mask = None if mask is None else F.pad(mask, (1, 0, 1, 0), value=True)
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
            outputs.append(output[0].transpose(0, 1)[int(sink is not None) :])
        return torch.cat(outputs)[..., :width]

    def _mask(self, piece: "_Piece", window: int | None, device: torch.device) -> Tensor | None:
        """``[rows, keys]`` bool, None where plainly causal. All layers need it."""
        if piece.is_causal and window is None:
            return None
        if (piece, window) not in self._masks:
            if window not in self._sees:
                self._sees[window] = ancestry(self.blocks, device, window)
            rows = torch.arange(self.blocks[-1].limit, device=device)
            own = rows[piece.first : piece.limit, None]
            self._masks[piece, window] = self._sees[window](own, piece.keys(rows))
        return self._masks[piece, window]


# What it adds to the dims of queries and keys, of which some kernels want a multiple of it.
_SINK_DIMS = 8


def _with_sink(
    query: Tensor, key: Tensor, value: Tensor, sink: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """All with more dims, and one row more of keys and values at the end: a key whose product with
    a query is that head's ``sink``, and its value, zero."""
    wide = sink.to(torch.promote_types(sink.dtype, torch.float32)) / scale
    # In two dims, as half precision rounds what one holds.
    coarse = wide.to(query.dtype)
    fine = (wide - coarse.to(wide.dtype)).to(query.dtype)
    factors = F.pad(torch.stack([coarse, fine], dim=-1), (0, _SINK_DIMS - 2))
    query = torch.cat([query, factors.expand(len(query), -1, -1)], dim=-1)
    key, value = (F.pad(x, (0, _SINK_DIMS, 0, 0, 0, 1)) for x in (key, value))
    of_sink = torch.zeros_like(key[-1:])
    of_sink[..., -_SINK_DIMS : -_SINK_DIMS + 2] = 1
    return query, torch.cat([key[:-1], of_sink]), value


@dataclass(frozen=True)
class _Piece:
    """Rows ``[first, limit)`` of a block, and two spans of rows, each ``(first, limit)``, outside
    of which they see nothing: of the trunk, and up to their own."""

    first: int
    limit: int
    trunk: tuple[int, int]
    own: tuple[int, int]
    is_causal: bool

    def keys(self, rows: Tensor) -> Tensor:
        """What of ``rows`` ``[tokens, ...]`` lies in the spans."""
        trunk, own = (rows[first:limit] for first, limit in (self.trunk, self.own))
        return torch.cat([trunk, own]) if len(trunk) else own


# Least rows of a document that are one piece where there is a window.
_PIECE_ROWS = 256


def _pieces(block: Block, window: int | None, rows: slice) -> Iterator[_Piece]:
    """What of a block is among ``rows``, a document with a window in several pieces: none has a
    dense mask of all rows."""
    is_causal = not block.branches and block.trunk_limit == block.trunk_first
    trunk, step = (0, 0), block.limit - block.first
    if is_causal and window is not None:
        step = max(window, _PIECE_ROWS)
    elif not is_causal:
        first = max(block.trunk_first, block.trunk_limit - (window or block.trunk_limit))
        trunk = first, block.trunk_limit
    for start in range(block.first, block.limit, max(1, step)):
        own = clipped(start, min(block.limit, start + step), rows)
        if own is None:
            continue
        seen = block.first if window is None or not is_causal else max(block.first, start - window)
        yield _Piece(*own, trunk, (seen, own[1]), is_causal and own[0] == seen)


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
        self._masks: dict[int | None, BlockMask] = {}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        count, tokens = len(query), len(key)
        if not count:
            none = query.sum(-1, keepdim=True).expand(-1, -1, value.shape[2])
            return none if sink is None else none + 0 * sink.sum()
        query, key, value = (
            F.pad(x, (0, 0, 0, 0, 0, -len(x) % _FLEX_BLOCK)) for x in (query, key, value)
        )
        if window not in self._masks:
            padded = len(key) > tokens
            blocks = [*self.blocks, Block(tokens, len(key))] if padded else self.blocks
            sees = ancestry(blocks, query.device, window)
            visible = _visible(sees) if self._rows is None else _visible_to(self._rows, sees, query)
            make = _compiled(create_block_mask) if query.is_cuda else create_block_mask
            mask = make(visible, None, None, len(query), len(key), device=query.device)
            self._masks[window] = mask
        attend = _compiled(flex_attention) if query.is_cuda else flex_attention
        output = attend(
            _batch(query),
            _batch(key),
            _batch(value),
            block_mask=self._masks[window],
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            kernel_options=FLEX_OPTIONS if query.is_cuda else None,
            return_aux=None if sink is None else AuxRequest(lse=True),
        )
        if sink is not None:
            output, found = output
            share = torch.sigmoid(found.lse - sink[:, None])
            output = (output * share[..., None]).to(query.dtype)
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


def backend_for(name: str, device: torch.device, *, windowed: bool = False) -> type[TreeAttention]:
    """The backend that ``--rmt-attention`` ``name`` means on ``device``.

    ``auto`` is lse on the CPU; on CUDA flex where torch can compile, else sdpa (the choice and flex
    with CUDA are unverified on GPU). In layers whose windows leave something out (``windowed``)
    sdpa stands in for lse, which has no masks.

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
    return SdpaAttention if name == "lse" and windowed else BACKENDS[name]


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
