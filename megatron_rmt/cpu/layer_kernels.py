"""The layers' elementwise parts on a CPU, fused; on a GPU Transformer Engine or apex have them.

``install()`` puts them in the place of what Megatron's local spec calls:

- ``torch.nn.RMSNorm.forward``: ten operations, several of them in fp32.
- ``rope_utils._apply_rotary_pos_emb_bshd``: cosines and sines anew in each layer, for queries and
  for keys; here once for each table of angles.
- ``fused_bias_swiglu.swiglu`` and ``swiglu_back``, which Megatron compiles where its own fusion is
  on; here short inputs take one thread.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from megatron_rmt.cpu.compiled import fused, is_available, wide

# Cosines and sines of a table of angles, kept as long as the table.
_cosines_and_sines: WeakIdKeyDictionary = WeakIdKeyDictionary()


def install() -> None:
    """Let PyTorch and Megatron call them; harmless when called twice, nothing if nothing compiles.

    Raises:
        RuntimeError: Megatron's rotary embedding has other parameters than in 0.19.
    """
    from megatron.core.fusions import fused_bias_swiglu
    from megatron.core.models.common.embeddings import rope_utils

    original = rope_utils._apply_rotary_pos_emb_bshd
    if not is_available() or hasattr(original, "__wrapped__"):
        return
    replacement = _rotating_in_one_loop(original)
    parameters, known = (
        tuple(inspect.signature(function, follow_wrapped=False).parameters)
        for function in (original, replacement)
    )
    if parameters != known:
        raise RuntimeError(
            f"megatron.core's rope_utils._apply_rotary_pos_emb_bshd takes {parameters}, not "
            f"{known}; set TORCHDYNAMO_DISABLE=1 to go without the fused one."
        )
    rope_utils._apply_rotary_pos_emb_bshd = replacement
    fused_bias_swiglu.swiglu = swiglu
    fused_bias_swiglu.swiglu_back = swiglu_backward
    torch.nn.RMSNorm.forward = _norm_forward


def _norm_forward(norm: torch.nn.RMSNorm, x: Tensor) -> Tensor:
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    if norm.weight is None or len(norm.normalized_shape) != 1:
        return torch.nn.functional.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps)
    return rms_norm(x, norm.weight, eps)


@fused
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, rounded once to x's dtype."""
    exact = wide(x)
    scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return (exact * scale * weight).to(x.dtype)


def _rotating_in_one_loop(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def apply_rotary_pos_emb(
        t: Tensor,
        freqs: Tensor,
        rotary_interleaved: bool = False,
        mla_rotary_interleaved: bool = False,
        mscale: float = 1.0,
        multi_latent_attention: bool | None = None,
    ) -> Tensor:
        halves = not (rotary_interleaved or mla_rotary_interleaved or multi_latent_attention)
        if not halves or freqs.shape[-1] != t.shape[-1]:
            return original(
                t,
                freqs,
                rotary_interleaved=rotary_interleaved,
                mla_rotary_interleaved=mla_rotary_interleaved,
                mscale=mscale,
                multi_latent_attention=multi_latent_attention,
            )
        if isinstance(t, FakeTensor) and t._base is None and t.is_contiguous():
            # In a recorded layer such a copy would be picked from its rows by divisions, element by
            # element; this has it written first. A view has no memory of its own to be written.
            t = t.as_strided(t.shape, t.stride())
        return rotate(t, *cosine_and_sine(freqs, t.dtype, mscale))

    return apply_rotary_pos_emb


def cosine_and_sine(
    angles: Tensor, dtype: torch.dtype, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``cos(angles) * scale`` and ``sin(angles) * scale`` in ``dtype``, kept as long as
    ``angles``."""
    of_table = _cosines_and_sines.setdefault(angles, {})
    if (scale, dtype) not in of_table:
        of_table[scale, dtype] = tuple(
            (function(angles) * scale).to(dtype) for function in (torch.cos, torch.sin)
        )
    return of_table[scale, dtype]


def use_cosine_and_sine(angles: Tensor, cosine: Tensor, sine: Tensor) -> None:
    """Let ``cosine_and_sine`` of ``angles``, at scale 1, be these."""
    _cosines_and_sines.setdefault(angles, {})[1.0, cosine.dtype] = cosine, sine


@fused
def rotate(t: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """``t`` ``[tokens, batch, heads, dim]`` rotated, pairs half a head apart, rounded once.

    cosine, sine: ``[tokens, 1, 1, dim]`` in the dtype of ``t``.
    """
    first, second = wide(t).chunk(2, -1)
    (cosine_1, cosine_2), (sine_1, sine_2) = wide(cosine).chunk(2, -1), wide(sine).chunk(2, -1)
    rotated = first * cosine_1 - second * sine_1, second * cosine_2 + first * sine_2
    # Two halves in the dtype of the result: to join wide ones would write them to memory.
    return torch.cat([half.to(t.dtype) for half in rotated], -1)


@fused
def swiglu(gate_and_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[rows, 2 * ffn]``, rounded once: ``[rows, ffn]``."""
    gate, up = wide(gate_and_up).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_and_up.dtype)


@fused
def swiglu_backward(by_output: Tensor, gate_and_up: Tensor) -> Tensor:
    """The gradient of ``swiglu``'s input, ``[rows, 2 * ffn]``."""
    gate, up = wide(gate_and_up).chunk(2, -1)
    gradient = wide(by_output)
    sigmoid = torch.sigmoid(gate)
    by_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((by_gate, gradient * gate * sigmoid), -1).to(gate_and_up.dtype)
