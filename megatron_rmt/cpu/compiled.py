"""Elementwise arithmetic on CPU tensors as one compiled loop, as fused kernels do it on a GPU.

PyTorch's operations each go through memory, and a short one costs more in being called than in
arithmetic. ``fused`` has ``torch.compile`` turn a function of tensors into C++ that goes through
memory once. On a GPU the functions stay as they are: there Transformer Engine, apex and
``model.head_triton`` fuse.

It needs a C++ compiler and Python's headers; ``TORCHDYNAMO_DISABLE=1`` turns it off. The results
differ by rounding only: a compiled bf16 function rounds its result, but no step on the way.
"""

import functools
import os
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# With fewer elements in its largest tensor one thread does, as in torch's own operations.
_FEW_ELEMENTS = 1 << 15
# Variants of one function: dtypes, with and without gradients, one row or several.
_MOST_VARIANTS = 64

_refused: set[Callable[..., Any]] = set()


@functools.cache
def is_available() -> bool:
    """Whether functions of CPU tensors are compiled in this process; found out once."""
    # torch reads both when it wraps a function.
    if torch._dynamo.config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return False
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return False
    return (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()


def wide(tensor: Tensor) -> Tensor:
    """``tensor`` in fp32, or in fp64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, compiled when first called with CPU tensors, or itself where it cannot be.

    Its first argument is a tensor. One compilation serves all numbers of rows; dtypes, and whether
    gradients are wanted, have their own.
    """

    @functools.wraps(function)
    def call(first: Tensor, *others: Any) -> Any:
        # Within another compiled function, or one that is recorded, it is a part of that.
        is_part = torch.compiler.is_compiling() or isinstance(first, FakeTensor)
        if is_part or first.device.type != "cpu" or function in _refused or not is_available():
            return function(first, *others)
        elements = max(x.numel() for x in (first, *others) if isinstance(x, Tensor))
        try:
            return compile_loop(function, elements < _FEW_ELEMENTS)(first, *others)
        except torch._dynamo.exc.TorchDynamoException as error:
            _refused.add(function)
            warnings.warn(
                f"{function.__qualname__} runs uncompiled, which is slower: {error}", stacklevel=2
            )
            return function(first, *others)

    return call


@functools.cache
def compile_loop(function: Callable[..., Any], one_thread: bool = False) -> Callable[..., Any]:
    """``function``, compiled when it is called, for one thread or as many as torch has."""
    # Beyond torch's own bound a function would run uncompiled.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MOST_VARIANTS)
    threads = 1 if one_thread else -1
    return torch.compile(function, options={"cpp.threads": threads})
