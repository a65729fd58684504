"""The head's three matrix products, summed and returned in fp32 also for half-precision inputs.

A GPU's tensor cores do that where torch lets them (``out_dtype``). On a CPU torch returns bf16 for
bf16, so the inputs are converted to fp32, some rows of the weight at a time; where both were bf16
the product may round its inputs to bf16 again, which changes nothing, and runs on the CPU's bf16
units (AMX, AVX-512), about 2.5 times as fast as in fp32.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

# Weight rows converted to fp32 at a time: the block stays in the cache, so that the conversion is
# nearly free beside the product.
_CONVERSION_BLOCK = 2048


def multiply_scores(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [rows, columns] = hidden [rows, hidden] @ weight [columns, hidden].T."""
    if hidden.dtype == weight.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif _multiplies_into_fp32(hidden, weight):
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        with _rounding_inputs_to_bf16(_are_bf16(hidden, weight)):
            for block in _blocks(weight):
                torch.mm(wide, weight[block].to(out.dtype).t(), out=out[:, block])


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
        self.weight = torch.zeros_like(weight, dtype=dtype) if needed[1] else None

    def add(self, chunk: slice, score_gradient: Tensor) -> None:
        """Add what the rows of ``chunk`` give, and set ``hidden`` there.

        Args:
            score_gradient: [chunk, columns] fp32. bf16 and fp16 units read it in the dtype of the
                weight, as they read Megatron's own gradients of logits.
        """
        hidden, weight = self.inputs[0][chunk], self.inputs[1]
        if _multiplies_into_fp32(hidden, weight):
            self._add_half(chunk, score_gradient)
            return
        dtype = score_gradient.dtype
        with _rounding_inputs_to_bf16(_are_bf16(hidden, weight)):
            if self.hidden is not None:
                out = self.hidden[chunk]
                if weight.dtype == dtype:
                    torch.mm(score_gradient, weight, out=out)
                else:
                    out.zero_()
                    for block in _blocks(weight):
                        out.addmm_(score_gradient[:, block], weight[block].to(dtype))
            if self.weight is not None:
                self.weight[: len(weight)].addmm_(score_gradient.t(), hidden.to(dtype))

    def _add_half(self, chunk: slice, score_gradient: Tensor) -> None:
        hidden, weight = self.inputs[0][chunk], self.inputs[1]
        dtype = score_gradient.dtype
        # Rows as long as the padded weight, of which padding is cut: a GPU wants them aligned.
        rounded = weight.new_empty(len(hidden), self.padded_columns)[:, : len(weight)]
        rounded.copy_(score_gradient)
        if self.hidden is not None:
            torch.mm(rounded, weight, out_dtype=dtype, out=self.hidden[chunk])
        if self.weight is not None:
            self.weight[: len(weight)] += torch.mm(rounded.t(), hidden, out_dtype=dtype)


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


def _blocks(weight: Tensor) -> Iterator[slice]:
    rows = weight.shape[0]
    for start in range(0, rows, _CONVERSION_BLOCK):
        yield slice(start, min(rows, start + _CONVERSION_BLOCK))
