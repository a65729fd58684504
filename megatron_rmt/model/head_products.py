"""The head's three matrix products, summed and returned in fp32 also for half-precision inputs.

A GPU's tensor cores do that where torch lets them (``out_dtype``). On a CPU torch returns bf16 for
bf16, so the inputs are converted to fp32, some rows of the weight at a time; where both were bf16
the product may round its inputs to bf16 again, which changes nothing, and runs on the CPU's bf16
units (AMX, AVX-512), about 2.5 times as fast as in fp32. Only the gradient of bf16 hidden states is
taken as torch returns it: one product makes it whole, and in bf16 it is given back.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

# Weight rows converted to fp32 at a time, a few MB of them: the whole weight would be held twice.
_CONVERSION_BLOCK = 4096


def multiply_scores(
    hidden: Tensor, weight: Tensor, out: Tensor, wide_weight: Tensor | None = None
) -> None:
    """out [rows, columns] = hidden [rows, hidden] @ weight [columns, hidden].T.

    Args:
        wide_weight: ``wide_copy`` of the weight, if it is at hand.
    """
    if hidden.dtype == weight.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif _multiplies_into_fp32(hidden, weight):
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        blocks = [(slice(None), wide_weight)]
        if wide_weight is None:
            blocks = _wide_blocks(weight, out.dtype)
        with _rounding_inputs_to_bf16(_are_bf16(hidden, weight)):
            for block, converted in blocks:
                torch.mm(wide, converted.t(), out=out[:, block])


def wide_copy(weight: Tensor) -> Tensor | None:
    """``weight`` as ``multiply_scores`` would convert it, for many calls with it; None where it
    does not."""
    if weight.is_cuda or weight.dtype not in (torch.bfloat16, torch.float16):
        return None
    return weight.float()


class WeightedSums:
    """The gradients of ``hidden`` and ``weight``, summed over chunks of rows, fp32 or fp64.

    Args:
        hidden: [rows, hidden]. weight: [padded columns, hidden].
        columns: rows of the weight that count; the rest get 0.
        needed: whether hidden's, and whether weight's, is wanted; what is not stays None.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, columns: int, needed: tuple[bool, bool]
    ) -> None:
        self.inputs = hidden, weight[:columns]
        self.padded_columns = weight.shape[0]
        dtype = score_dtype(hidden, weight)
        self.hidden = torch.empty_like(hidden, dtype=dtype) if needed[0] else None
        self.weight = torch.empty_like(weight, dtype=dtype) if needed[1] else None
        if self.weight is not None:
            # The first chunk overwrites what the later ones are added to.
            self.weight[columns if len(hidden) else 0 :] = 0
        self._added = False
        self._rounded: Tensor | None = None

    def memory_for(self, scores: Tensor) -> Tensor:
        """Where to write the gradient by a chunk's ``scores`` [chunk, columns] for ``add``.

        bf16 and fp16 units read it in the dtype of the weight, as they read Megatron's own
        gradients of logits: then it is memory in that dtype, overwritten by the next chunk, else
        ``scores`` itself.
        """
        hidden, weight = self.inputs
        if not (_multiplies_into_fp32(hidden, weight) or _are_bf16(hidden, weight)):
            return scores
        if self._rounded is None:
            # Rows as long as the padded weight, of which padding is cut: a GPU wants them aligned.
            # Zeros, as a CPU's bf16 product of an odd number of columns reads the one behind them.
            self._rounded = weight.new_zeros(len(scores), self.padded_columns)
        return self._rounded[: len(scores), : len(weight)]

    def add(self, chunk: slice, score_gradient: Tensor, undo: Tensor | None = None) -> None:
        """Add what the rows of ``chunk`` give, and set ``hidden`` there.

        Args:
            score_gradient: [chunk, columns], written into ``memory_for``.
            undo: [], by which its products are multiplied (``in_range``); None for 1.
        """
        hidden, weight = self.inputs[0][chunk], self.inputs[1]
        wide = score_dtype(hidden, weight)
        into_fp32 = score_gradient.dtype != wide and _multiplies_into_fp32(hidden, weight)
        if self.hidden is not None:
            out = self.hidden[chunk]
            if into_fp32:
                torch.mm(score_gradient, weight, out_dtype=wide, out=out)
                if undo is not None:
                    out.mul_(undo)
            elif score_gradient.dtype == weight.dtype == wide:
                torch.mm(score_gradient, weight, out=out)
            elif score_gradient.dtype == weight.dtype:
                # bf16 is summed over all columns in fp32, then rounded once, as the result will be.
                out.copy_(torch.mm(score_gradient, weight))
            else:
                out.zero_()
                for block, wide_weight in _wide_blocks(weight, wide):
                    out.addmm_(score_gradient[:, block], wide_weight)
        if self.weight is not None:
            own = self.weight[: len(weight)]
            if into_fp32 and undo is not None:
                product = torch.mm(score_gradient.t(), hidden, out_dtype=wide).mul_(undo)
                own.add_(product) if self._added else own.copy_(product)
            elif into_fp32 and self._added:
                torch.addmm(own, score_gradient.t(), hidden, out_dtype=wide, out=own)
            elif into_fp32:
                torch.mm(score_gradient.t(), hidden, out_dtype=wide, out=own)
            elif score_gradient.dtype == wide:
                own.addmm_(score_gradient.t(), hidden.to(wide), beta=int(self._added))
            else:
                self._add_bf16_on_cpu(own, score_gradient, hidden.to(wide))
        self._added = True

    def _add_bf16_on_cpu(self, own: Tensor, score_gradient: Tensor, wide: Tensor) -> None:
        # Summed over the chunks in fp32.
        columns = len(own)
        held = wide.new_empty(len(wide), min(columns, _CONVERSION_BLOCK))
        with _rounding_inputs_to_bf16(True):
            for block in slices(columns, _CONVERSION_BLOCK):
                part = held[:, : block.stop - block.start].copy_(score_gradient[:, block])
                own[block].addmm_(part.t(), wide, beta=int(self._added))


def in_range(by_log_prob: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(``by_log_prob`` [chunk] for gradients of scores in ``dtype``, [] what undoes the change).

    The weight of a token in a large batch is below what fp16 can hold, and Megatron's loss scale
    comes in the backward pass only: so for fp16 all are multiplied by the power of two that takes
    the largest to 2^13 or more, and no gradient of a score beyond 2^14. Other dtypes: unchanged,
    None.
    """
    if dtype != torch.float16 or by_log_prob.numel() == 0:
        return by_log_prob, None
    smallest = torch.finfo(torch.float32).tiny
    exponent = 14 - torch.frexp(by_log_prob.abs().amax().clamp(min=smallest)).exponent
    # At most 2^110, so that what undoes it is a normal number too.
    factor = torch.exp2(exponent.clamp(max=110).to(by_log_prob.dtype))
    return by_log_prob * factor, 1 / factor


def slices(total: int, step: int) -> Iterator[slice]:
    """[0, total) in slices of ``step``, the last one may be shorter."""
    return (slice(first, min(total, first + step)) for first in range(0, total, step))


def score_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """fp64 if an input is, else fp32."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return torch.promote_types(dtype, torch.float32)


def _multiplies_into_fp32(left: Tensor, right: Tensor) -> bool:
    """Whether torch can multiply these half-precision matrices without rounding the result."""
    half = left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16)
    return half and left.is_cuda and hasattr(torch.ops.aten.mm, "dtype_out")


def _are_bf16(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype == torch.bfloat16 and not left.is_cuda


@contextlib.contextmanager
def _rounding_inputs_to_bf16(allowed: bool) -> Iterator[None]:
    """fp32 products on a CPU may round their inputs, not their sums, to bf16 within."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if not allowed or matmul is None:
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _wide_blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, these rows of ``weight`` in ``dtype``); the next block overwrites them."""
    rows = weight.shape[0]
    held = weight.new_empty(min(rows, _CONVERSION_BLOCK), weight.shape[1], dtype=dtype)
    for block in slices(rows, _CONVERSION_BLOCK):
        yield block, held[: block.stop - block.start].copy_(weight[block])
