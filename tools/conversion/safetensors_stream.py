"""Write a safetensors file one tensor at a time.

``safetensors.torch.save_file`` needs all tensors of a file in memory. The format does not: a length
(8 bytes, little-endian), a JSON header with dtype, shape and position of each tensor, then the
tensors' bytes one after the other.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
ALIGNMENT = 8


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> None:
    """Write ``tensors``, which come in the order of ``shapes``.

    Args:
        path: File to create.
        shapes: Name, shape and dtype of every tensor.
        tensors: Each is taken only when the one before has been written.

    Raises:
        ValueError: The tensors are not those announced.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    announced = iter(shapes.items())
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, tensor in tensors:
            if (name, (tuple(tensor.shape), tensor.dtype)) != next(announced, None):
                raise ValueError(f"{path}: {name} is not the tensor that its place is for.")
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy())
        if next(announced, None) is not None:
            raise ValueError(f"{path}: fewer tensors than announced.")
