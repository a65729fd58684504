"""The weights of a Hugging Face directory: checked, then read and written one tensor at a time.

Read are safetensors, and pickled ``.bin`` files by torch's weights-only unpickler, which makes
tensors and runs nothing. Written are safetensors.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from conversion.mismatch import first_line, mismatch
from conversion.safetensors_stream import write_safetensors
from conversion.weight_names import (
    EMBEDDING,
    LAYER,
    OUTPUT,
    ModelShape,
    Place,
    Weight,
    check_finite,
    rows_of,
)
from megatron_rmt.job.text_files import read_text_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# One file, or an index of several; the first that exists is read.
LAYOUTS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
SHARD_BYTES = 5 * 2**30
# The end of names that old versions of transformers stored, and new ones ignore.
INVERSE_FREQUENCIES = "rotary_emb.inv_freq"
# By how much bfloat16 rounds them, and more.
ROUNDING = 0.01
LAYER_NUMBER = re.compile(re.escape(LAYER).replace(r"\{layer\}", "([0-9]{1,9})"))
((LM_HEAD, _),) = OUTPUT.parts
((EMBEDDINGS, _),) = EMBEDDING.parts


@dataclass
class HuggingFaceWeights:
    """The weights of a Hugging Face directory, opened lazily.

    Attributes:
        files: File of each tensor.
        shapes: Shape of each tensor.
        dtypes: Name of each tensor's dtype, such as ``"float32"``.

    Raises:
        ValueError: Files are missing or damaged.
    """

    directory: Path
    files: dict[str, Path] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in weight_files(self.directory):
            for name, shape, dtype in _contents(path):
                if name in self.files:
                    raise ValueError(
                        f"{name} is in both {self.files[name].name} and {path.name} of "
                        f"{self.directory}; remove the one that is stale."
                    )
                self.files[name] = path
                self.shapes[name] = shape
                self.dtypes[name] = dtype

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor, mapped from its file."""
        path = self.files[name]
        if path.suffix == ".bin":
            return _unpickle(path)[name]
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    def check(self, shape: ModelShape) -> None:
        """Compare names, shapes and dtypes with what the configuration asks for.

        Raises:
            ValueError: Tensors are missing, unexpected, of another shape or of another kind.
        """
        expected = {
            name: part_shape
            for weight, place in rows_of(shape)
            for name, part_shape in zip(weight.names(place), weight.part_shapes(shape), strict=True)
        }
        missing = [name for name in expected if name not in self.shapes]
        unexpected, others = [], []
        for name, found in self.shapes.items():
            if name in expected and found != expected[name]:
                others.append(f"{name} has shape {list(found)}, not {list(expected[name])}")
            if name in expected and self.dtypes[name] not in DTYPES:
                others.append(f"{name} is stored as {self.dtypes[name]}, not as {'/'.join(DTYPES)}")
            if not (name in expected or _is_redundant(name, shape) or _is_behind(name, shape)):
                unexpected.append(name)
        problems = mismatch(missing, unexpected, others)
        if problems:
            raise ValueError(
                f"The weights in {self.directory} do not match its config.json: {problems}."
            )
        for name in sorted(self.shapes.keys() - expected.keys()):
            if _is_behind(name, shape):
                continue
            self._check_redundant(name, shape)

    def _check_redundant(self, name: str, shape: ModelShape) -> None:
        """Check that a tensor without a place in Megatron says what another, or the base, says.

        Raises:
            ValueError: It does not: transformers would compute with it, or someone meant it to.
        """
        stored = self.read(name)
        if name == LM_HEAD:
            embedding = self.read(EMBEDDINGS)
            if stored.shape != embedding.shape or not torch.equal(
                stored, embedding.to(stored.dtype)
            ):
                raise ValueError(
                    f"config.json in {self.directory} sets tie_word_embeddings=true, but {name} is "
                    f"not {EMBEDDINGS}; set it to false to keep both, or remove {name} to tie them."
                )
            return
        exponents = torch.arange(0, shape.head, 2, dtype=torch.float64) / shape.head
        expected = float(shape.rotary_base) ** -exponents
        if stored.shape != expected.shape or not torch.allclose(
            stored.double(), expected, rtol=ROUNDING, atol=0
        ):
            raise ValueError(
                f"{name} in {self.directory} is not that of rope_theta={shape.rotary_base}; "
                "correct rope_theta in config.json, or remove the tensor."
            )

    def dtype(self, shape: ModelShape) -> str:
        """The one dtype of all tensors, which Megatron's single parameter dtype can keep.

        Tensors with a dtype of their own, and those that are left out, are not asked.

        Raises:
            ValueError: They differ, or it is float16, in which Megatron checkpoints are not kept.
        """
        own = {name for row, place in rows_of(shape) if row.dtype for name in row.names(place)}
        found = {
            dtype
            for name, dtype in self.dtypes.items()
            if not (name in own or _is_behind(name, shape))
        }
        if found in ({"float32"}, {"bfloat16"}):
            return found.pop()
        raise ValueError(
            f"The weights in {self.directory} are stored as {'/'.join(sorted(found))}; "
            "choose --dtype float32 or --dtype bfloat16."
        )


def _is_redundant(name: str, shape: ModelShape) -> bool:
    """Whether a tensor repeats what another, or config.json, should say already."""
    if name.endswith(INVERSE_FREQUENCIES):
        return shape.rotary_scaling is None and shape.yarn is None
    return name == LM_HEAD and shape.tied


def _is_behind(name: str, shape: ModelShape) -> bool:
    """Whether a tensor is of a layer behind the last, which is left out."""
    found = LAYER_NUMBER.match(name)
    return found is not None and 0 <= int(found[1]) - shape.layers < shape.further_layers


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a model's weights.

    Raises:
        ValueError: There are none, or not all that the index names.
    """
    for index_name, single in LAYOUTS:
        index = directory / index_name
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{index} has no weight_map; copy it again.")
            names = sorted(set(map(str, weight_map.values())))
            for name in names:
                if Path(name).name != name:
                    raise ValueError(f"{index} names {name!r}, which is not a file beside it.")
                if not (directory / name).is_file():
                    raise ValueError(f"{directory / name} is missing, but {index} names it.")
            return [directory / name for name in names]
        if (directory / single).is_file():
            return [directory / single]
    raise ValueError(f"{directory} holds no weights (model.safetensors or its index).")


def _contents(path: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of every tensor in a file."""
    if path.suffix == ".bin":
        for name, tensor in _unpickle(path).items():
            yield name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        return
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                piece = file.get_slice(name)
                dtype = piece.get_dtype()
                yield name, tuple(piece.get_shape()), SAFETENSORS_DTYPES.get(dtype, dtype)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({first_line(error)}); copy it again."
        ) from error


def _unpickle(path: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of a pickled file, mapped, not read."""
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        # A damaged pickle raises whatever the bytes happen to lead to.
        raise ValueError(
            f"{path} cannot be read as plain weights without running code ({first_line(error)}); "
            "save the model as safetensors."
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(value, torch.Tensor) for value in tensors.values()
    ):
        raise ValueError(f"{path} does not hold a model's tensors by name.")
    return tensors


def write_huggingface_weights(
    directory: Path,
    read: Callable[[Weight, Place], torch.Tensor],
    shape: ModelShape,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write all tensors of the model, with an index if they need more than one file.

    Args:
        directory: Existing directory.
        read: Gives the Megatron tensor of a table row and place.
        dtype: What to store.
        shard_bytes: Size beyond which a new file is begun.

    Raises:
        ValueError: A tensor is not finite.
    """
    shards = _split_into_shards(shape, dtype, shard_bytes)
    weight_map: dict[str, str] = {}
    progress = tqdm(
        desc="to Hugging Face", unit=" tensors", total=sum(map(len, shards)), disable=None
    )

    def parts(shard: list[tuple[Weight, Place]]) -> Iterator[tuple[str, torch.Tensor]]:
        for weight, place in shard:
            unpacked = weight.unpack(read(weight, place), shape)
            for name, tensor in zip(weight.names(place), unpacked, strict=True):
                stored_as = weight.dtype or dtype
                check_finite(name, tensor, stored_as)
                yield name, tensor.to(stored_as)
            progress.update()

    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = name if len(shards) > 1 else "model.safetensors"
        shapes = {
            part: (part_shape, weight.dtype or dtype)
            for weight, place in shard
            for part, part_shape in zip(weight.names(place), weight.part_shapes(shape), strict=True)
        }
        write_safetensors(directory / name, shapes, parts(shard))
        weight_map |= dict.fromkeys(shapes, name)
    progress.close()
    if len(shards) > 1:
        index = {"metadata": {"total_size": size_of(shape, dtype)}, "weight_map": weight_map}
        (directory / LAYOUTS[0][0]).write_text(json.dumps(index, indent=2) + "\n")


def size_of(shape: ModelShape, dtype: torch.dtype) -> int:
    """Bytes of all weights of a model."""
    return sum(
        count * math.prod(weight.megatron_shape(shape)) * (weight.dtype or dtype).itemsize
        for weight, count in Counter(weight for weight, _ in rows_of(shape)).items()
    )


def _split_into_shards(
    shape: ModelShape, dtype: torch.dtype, shard_bytes: int
) -> list[list[tuple[Weight, Place]]]:
    """The rows cut into runs of at most ``shard_bytes``, or of one row where that is larger."""
    shards: list[list[tuple[Weight, Place]]] = [[]]
    used = 0
    for weight, place in rows_of(shape):
        size = math.prod(weight.megatron_shape(shape)) * (weight.dtype or dtype).itemsize
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append((weight, place))
        used += size
    return shards


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: The file is missing, is not JSON or holds something else.
    """
    try:
        content = json.loads(read_text_file(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({first_line(error)}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return content
