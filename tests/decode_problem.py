"""Arguments of decode attention that reach its edges, and how far a result is from float64."""

from typing import Any

import torch

from megatron_rmt.rollout.row_limits import RowLimits

# Of norms, rounding of the output included: weights are rounded to the dtype of the values.
BOUNDS = {torch.bfloat16: 6e-3, torch.float16: 7e-4, torch.float32: 2e-6, torch.float64: 1e-12}


def problem(
    rows: int,
    heads: int,
    kv_heads: int,
    dim: int,
    trunk: int,
    capacity: int,
    dtype: torch.dtype,
    std: float,
) -> tuple:
    """Arguments of ``decode_attention`` whose scores have ``std``: ragged limits, rows of two
    samples that follow each other and one that does not, tails in any order, and padding."""
    generator = torch.Generator().manual_seed(rows + dim + trunk)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def whole(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high + 1, (rows,), generator=generator, dtype=torch.int32)

    # Longer rows in memory than are used, as where a query is a part of a wider product.
    query = (normal(rows, heads + 1, dim) * std)[:, :heads].to(dtype)
    keys = [normal(kv_heads, trunk, dim).to(dtype) for _ in range(2)]
    tails = [normal(rows + 2, kv_heads, capacity, dim).to(dtype) for _ in range(2)]
    limit = whole(1, trunk)
    first = torch.where(torch.arange(rows) < rows // 2, 0, trunk // 3).int()
    first = torch.minimum(first, limit - 1)
    first[rows // 3], limit[rows // 3] = trunk - 1, trunk
    length = whole(0, capacity)
    length[-1] = capacity
    tail = torch.randperm(rows + 2, generator=generator)[:rows].int()
    if rows > 3:
        limit[1] = 0
        limit[2] = length[2] = first[2] = 0
    for row in range(rows):
        for stored in tails:
            stored[tail[row], :, length[row] :] = torch.nan
    return query, keys, tails, RowLimits.of(first, limit, tail, length), dim**-0.5


def window_and_sink(
    layer: str, heads: int, dtype: torch.dtype
) -> tuple[int | None, torch.Tensor | None]:
    """Of a layer, from such words as ``-`` (neither), ``4`` (a window), ``4s`` (and a sink)."""
    window = int(layer.strip("s")) if layer.strip("s-") else None
    generator = torch.Generator().manual_seed(heads)
    sink = 3 * torch.randn(heads, generator=generator, dtype=torch.float64)
    return window, sink.to(dtype) if "s" in layer else None


def within(window: int | None, *given: Any) -> tuple:
    """The arguments in a layer with a ``window``."""
    *tensors, limits, scale = given
    return *tensors, limits.within(window), scale


def error(
    found: torch.Tensor,
    query: torch.Tensor,
    trunk: list[torch.Tensor],
    tails: list[torch.Tensor],
    limits: RowLimits,
    scale: float,
    window: int | None = None,
    sink: torch.Tensor | None = None,
) -> float:
    """Relative to dense attention in float64, row by row; ``limits`` without the ``window``."""
    expected = torch.zeros(query.shape, dtype=torch.float64)
    repeats = query.shape[1] // trunk[0].shape[0]
    for row, (first, limit, tail, length, _) in enumerate(
        zip(*(x.tolist() for x in limits), strict=True)
    ):
        key, value = (
            torch.cat([shared[:, first:limit], own[tail, :, :length]], 1).double()
            for shared, own in zip(trunk, tails, strict=True)
        )
        if window is not None:
            key, value = (x[:, -(window + 1) :] for x in (key, value))
        key, value = (x.repeat_interleave(repeats, 0) for x in (key, value))
        scores = torch.einsum("hd,hkd->hk", query[row].double(), key) * scale
        if sink is not None:
            scores = torch.cat([scores, sink.double()[:, None]], dim=1)
        weights = scores.softmax(-1)[:, : key.shape[1]]
        expected[row] = torch.einsum("hk,hkd->hd", weights, value)
    assert found.shape == query.shape
    assert found.dtype == query.dtype
    return float((found.double() - expected).norm() / expected.norm())
