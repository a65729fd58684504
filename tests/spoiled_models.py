"""Ways to spoil a model's files, and what a refusal of them looks like."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny_checkpoints import TOOLS, tensors

sys.path.insert(0, str(TOOLS))

import convert_checkpoint

Spoil = Callable[[Path], object]


def files_below(directory: Path) -> dict[str, int]:
    return {str(p.relative_to(directory)): p.lstat().st_size for p in directory.rglob("*")}


def refuse(directory: Path, sentence: str, *words: str | Path) -> None:
    """The command ends with one sentence that matches; ``directory`` stays as it was."""
    before = files_below(directory)
    with pytest.raises(SystemExit, match=sentence) as caught:
        convert_checkpoint.main(list(map(str, words)))
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert files_below(directory) == before


def edit_json(name: str, **changes: object) -> Spoil:
    """Change keys of a JSON file; ``...`` removes one."""

    def spoil(directory: Path) -> None:
        content = json.loads((directory / name).read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not ...}
        (directory / name).write_text(json.dumps(kept))

    return spoil


def config(**changes: object) -> Spoil:
    return edit_json("config.json", **changes)


def edit_tensors(**changes: torch.Tensor | None) -> Spoil:
    """Replace tensors; None removes one."""

    def spoil(directory: Path) -> None:
        edited = tensors(directory) | {n.replace("__", "."): v for n, v in changes.items()}
        kept = {name: value for name, value in edited.items() if value is not None}
        save_file(kept, directory / "model.safetensors")

    return spoil


def edit_bytes(name: str, edit: Callable[[bytes], bytes]) -> Spoil:
    return lambda directory: (directory / name).write_bytes(edit((directory / name).read_bytes()))


def rename(edit: Callable[[str], str]) -> Spoil:
    """Give every tensor another name."""
    return lambda directory: save_file(
        {edit(name): value for name, value in tensors(directory).items()},
        directory / "model.safetensors",
    )


def spoil_value(name: str, value: float) -> Spoil:
    """Put a value into the middle of a tensor."""

    def spoil(directory: Path) -> None:
        found = tensors(directory)
        found[name].view(-1)[found[name].numel() // 2] = value
        save_file(found, directory / "model.safetensors")

    return spoil


def cast_all(dtype: torch.dtype) -> Spoil:
    return lambda directory: save_file(
        {name: value.to(dtype) for name, value in tensors(directory).items()},
        directory / "model.safetensors",
    )


def write(name: str, text: str) -> Spoil:
    return lambda directory: (directory / name).write_text(text)


def remove(*names: str) -> Spoil:
    return lambda directory: [(directory / name).unlink() for name in names]


def pipe(name: str) -> Spoil:
    """A named pipe that nobody writes to: whoever opens it waits forever."""

    def spoil(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return spoil


def shards(spoil: Spoil) -> Spoil:
    """Two files and an index instead of one file, then ``spoil``."""

    def split(directory: Path) -> None:
        found = tensors(directory)
        names = sorted(found)
        weight_map = {}
        for number, part in enumerate((names[::2], names[1::2]), 1):
            file = f"model-{number:05d}-of-00002.safetensors"
            save_file({name: found[name] for name in part}, directory / file)
            weight_map |= dict.fromkeys(part, file)
        (directory / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        spoil(directory)

    return split


def pickled(spoil: Spoil) -> Spoil:
    """``pytorch_model.bin`` instead of safetensors, then ``spoil``."""

    def pickle_weights(directory: Path) -> None:
        torch.save(tensors(directory), directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
        spoil(directory)

    return pickle_weights


class TouchesAFile:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


def plant_code(directory: Path) -> None:
    content = {"x": TouchesAFile(directory.parent / "ran")}
    torch.save(content, directory / "pytorch_model.bin")


def copy_shard(directory: Path) -> None:
    """The second file holds the tensors of the first as well."""
    found = tensors(directory)
    save_file(found, directory / "model-00002-of-00002.safetensors")


def frequencies(base: float) -> torch.Tensor:
    """``[head / 2]``, as transformers 4.30 stored them for heads of 8."""
    return 1 / base ** (torch.arange(0, 8, 2).float() / 8)


def rotary_base(value: float) -> Spoil:
    return config(rope_parameters={"rope_type": "default", "rope_theta": value})


ONE = "model.safetensors"
GATE = "model.layers.0.mlp.gate_proj.weight"
SECOND = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model__norm__weight"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def distcp(directory: Path) -> Path:
    return max((directory / "release").glob("*.distcp"), key=lambda path: path.stat().st_size)
