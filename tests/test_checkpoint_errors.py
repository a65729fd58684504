"""Spoiled Megatron checkpoints, and targets that cannot be written: one sentence each."""

import argparse
import json
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from tests.spoiled_models import (
    GATE,
    Spoil,
    TouchesAFile,
    distcp,
    edit_bytes,
    edit_json,
    pipe,
    refuse,
    remove,
    spoil_value,
    write,
)
from tests.tiny_checkpoints import TOOLS, assert_bit_equal, tensors

sys.path.insert(0, str(TOOLS))

import convert_checkpoint
from conversion import complete_directory

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def converted(tiny_checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("megatron") / "llama"
    convert_checkpoint.to_megatron(tiny_checkpoints / "llama", target)
    return target


def test_value_beyond_the_new_dtype_is_refused(source: Path, tmp_path: Path):
    spoil_value(GATE, 1e6)(source)
    convert_checkpoint.to_megatron(source, tmp_path / "megatron")
    words = ("--source", tmp_path / "megatron", "--target", tmp_path / "back")
    sentence = rf"{GATE} holds 1e\+06, beyond float16; choose another --dtype"
    refuse(tmp_path, sentence, "to-huggingface", *words, "--dtype", "float16")


def put_nan_into_final_norm(directory: Path) -> None:
    norm = tensors(directory.parent / "plain")["model.norm.weight"].numpy().tobytes()
    content = distcp(directory).read_bytes()
    assert content.count(norm) == 1
    spoiled = norm[:8] + b"\x00\x00\xc0\x7f" + norm[12:]
    distcp(directory).write_bytes(content.replace(norm, spoiled))


def write_index(edit: Callable[[Metadata], object]) -> Spoil:
    """Write the index again after ``edit``, which may give another object in its place."""

    def spoil(directory: Path) -> None:
        path = directory / "release/.metadata"
        index = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps(edit(index) or index))

    return spoil


def drop_chunk(index: Metadata) -> None:
    del index.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks[0]


def move_chunk(index: Metadata) -> None:
    chunk = index.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks[1]
    chunk.offsets = torch.Size([0, 0, 0])


def swap_places(index: Metadata) -> None:
    places = [place for place in index.storage_data if "linear_qkv.weight" in place.fqn]
    index.storage_data[places[0]].offset += 100


MEGATRON_CASES: dict[str, tuple[Spoil, str]] = {
    "no tracker": (
        remove("latest_checkpointed_iteration.txt"),
        "is not a Megatron checkpoint: latest_checkpointed_iteration.txt is missing",
    ),
    "tracker garbled": (
        write("latest_checkpointed_iteration.txt", "ten\n"),
        "holds 'ten' instead of an iteration",
    ),
    "tracker empty": (
        write("latest_checkpointed_iteration.txt", ""),
        r"latest_.*\.txt holds nothing instead of an iteration; write one of those saved into it",
    ),
    "tracker of bytes": (
        lambda d: (d / "latest_checkpointed_iteration.txt").write_bytes(b"\xff\x00\xfe" * 50),
        r"latest_.*\.txt cannot be read \(it is no text\)",
    ),
    "tracker with a long number": (
        write("latest_checkpointed_iteration.txt", "9" * 5000),
        "holds '9{40}' instead of an iteration",
    ),
    "tracker a directory": (
        lambda d: (
            (d / "latest_checkpointed_iteration.txt").unlink(),
            (d / "latest_checkpointed_iteration.txt").mkdir(),
        ),
        r"latest_checkpointed_iteration\.txt cannot be read \(Is a directory\)",
    ),
    "tracker a pipe": (
        pipe("latest_checkpointed_iteration.txt"),
        r"iteration\.txt cannot be read \(it is a pipe or a device, not a file\)",
    ),
    "tracker ahead": (write("latest_checkpointed_iteration.txt", "9"), "says 9, but .* missing"),
    "no metadata": (remove("release/metadata.json"), "not a complete torch_dist checkpoint"),
    "no index": (remove("release/.metadata"), "not a complete torch_dist checkpoint"),
    "index cut": (edit_bytes("release/.metadata", lambda b: b[:50]), ".metadata is damaged"),
    "index garbled": (edit_bytes("release/.metadata", lambda b: b"\xff" + b), "is damaged"),
    "index of nothing": (write_index(lambda _: {"a": 1}), "damaged .dict for Metadata"),
    "index runs code": (
        lambda d: (d / "release/.metadata").write_bytes(
            pickle.dumps(TouchesAFile(d.parent / "ran"))
        ),
        r"\.metadata is damaged",
    ),
    "index without a chunk": (
        write_index(drop_chunk),
        r"\.metadata is damaged \(no chunk, or two, for a part of decoder.layers.mlp.linear_fc2",
    ),
    "index with a chunk twice": (write_index(move_chunk), "damaged .no chunk, or two, for a part"),
    "index with another place": (write_index(swap_places), "linear_qkv.weight cannot be read from"),
    "index with a name for a size": (
        write_index(lambda index: index.state_dict_metadata.update({"a": "b"})),
        r"\.metadata is damaged \(str for TensorStorageMetadata\)",
    ),
    "format of nothing": (write("release/metadata.json", "{}"), "says sharded_backend=None; only"),
    "format a list": (write("release/metadata.json", "[]"), "metadata.json holds no JSON object"),
    "another format": (
        write("release/metadata.json", '{"sharded_backend": "zarr"}'),
        "says sharded_backend='zarr'; only torch_dist checkpoints are read",
    ),
    "arguments of nothing": (
        lambda d: torch.save([1], d / "release/common.pt"),
        "arguments of the training job in .* cannot be read",
    ),
    "arguments damaged": (
        write("release/common.pt", "no zip file"),
        "arguments of the training job in .* cannot be read .*not a zip file",
    ),
    "NaN": (put_nan_into_final_norm, r"model\.norm\.weight holds NaN"),
    "data missing": (lambda d: distcp(d).unlink(), r"distcp is missing; copy it again"),
    "data cut": (
        lambda d: distcp(d).write_bytes(distcp(d).read_bytes()[:-20_000]),
        "distcp is cut; copy it again",
    ),
    "no configuration": (remove("huggingface/config.json"), "with --tokenizer HF_DIR"),
    "other width": (
        edit_json("huggingface/config.json", hidden_size=64, head_dim=8),
        r"has shape \[300, 32\], not \[300, 64\]",
    ),
    "one layer fewer": (
        edit_json("huggingface/config.json", num_hidden_layers=1),
        r"stacks \[2\] tensors, not \[1\]",
    ),
    "one layer more": (
        edit_json("huggingface/config.json", num_hidden_layers=3),
        r"at \(2,\) is missing",
    ),
    "larger vocabulary": (edit_json("huggingface/config.json", vocab_size=301), r"\[300, 32\]"),
    "other family": (
        edit_json("huggingface/config.json", model_type="qwen3", head_dim=8),
        r"q_layernorm\.weight is missing",
    ),
    "tied": (
        edit_json("huggingface/config.json", tie_word_embeddings=True),
        r"output_layer\.weight is unexpected",
    ),
}


@pytest.mark.parametrize("case", MEGATRON_CASES)
def test_spoiled_checkpoint_is_refused(
    converted: Path, tiny_checkpoints: Path, tmp_path: Path, case: str
):
    spoil, sentence = MEGATRON_CASES[case]
    source = Path(shutil.copytree(converted, tmp_path / "source"))
    shutil.copytree(tiny_checkpoints / "llama", tmp_path / "plain")
    spoil(source)
    words = ("to-huggingface", "--source", source, "--target", tmp_path / "target")
    refuse(tmp_path, sentence, *words)


def test_code_among_the_arguments_is_not_run(converted: Path, tmp_path: Path):
    source = Path(shutil.copytree(converted, tmp_path / "source"))
    arguments = argparse.Namespace(seed=7, own=TouchesAFile(tmp_path / "ran"))
    torch.save({"args": arguments}, source / "release/common.pt")
    convert_checkpoint.to_huggingface(source, tmp_path / "back")
    note = json.loads((tmp_path / "back/provenance.json").read_text())
    assert note["training"]["seed"] == 7
    assert not (tmp_path / "ran").exists()


def damaged(content: bytes, end: int, generator: random.Random) -> bytes:
    """A bit flipped, or some bytes taken out or put in, before ``end``."""
    place, kind = generator.randrange(end), generator.randrange(4)
    if kind == 0:
        return content[:place] + content[place + generator.randint(1, 8) :]
    if kind == 1:
        return content[:place] + generator.randbytes(4) + content[place:]
    flipped = content[place] ^ 1 << generator.randrange(8)
    return content[:place] + bytes([flipped]) + content[place + 1 :]


@pytest.mark.parametrize(
    ("direction", "name"),
    [
        ("to-huggingface", "release/.metadata"),
        ("to-huggingface", "release/metadata.json"),
        ("to-megatron", "model.safetensors"),
        ("to-megatron", "config.json"),
    ],
)
def test_damaged_description_is_refused_or_changes_no_weight(
    source: Path, converted: Path, tmp_path: Path, direction: str, name: str
):
    model = source
    if direction == "to-huggingface":
        model = Path(shutil.copytree(converted, tmp_path / "megatron"))
    content = (model / name).read_bytes()
    end = len(content)
    if name == "model.safetensors":
        end = 8 + int.from_bytes(content[:8], "little")
    expected, target = tensors(source), tmp_path / "target"
    generator, refusals = random.Random(name), []
    for _ in range(60):
        (model / name).write_bytes(damaged(content, end, generator))
        try:
            convert_checkpoint.main([direction, "--source", str(model), "--target", str(target)])
        except SystemExit as error:
            refusals.append(str(error.code))
        else:
            if direction == "to-huggingface":
                assert_bit_equal(tensors(target), expected)
            shutil.rmtree(target)
        assert not target.exists()
    assert len(refusals) > 20
    assert "\n" not in "".join(refusals)


def test_iteration_that_was_not_saved_is_refused(converted: Path, tmp_path: Path):
    words = ("--source", converted, "--target", tmp_path / "target", "--iteration", "3")
    refuse(tmp_path, "--iteration 3 is not in .*; found: None", "to-huggingface", *words)


def test_target_that_exists_is_kept(source: Path):
    target = source.parent / "target"
    words = ("to-megatron", "--source", source, "--target", target)
    target.mkdir()
    (target / "mine").write_text("mine")
    refuse(source.parent, "exists; remove it or choose another name", *words)
    shutil.rmtree(target)
    target.write_text("mine")
    refuse(source.parent, "exists; remove it or choose another name", *words)
    target.unlink()
    target.symlink_to("nowhere")
    refuse(source.parent, "exists; remove it or choose another name", *words)
    words = ("to-megatron", "--source", source, "--target", source / "config.json/target")
    refuse(source.parent, "cannot be written .*config.json: ", *words)


@pytest.mark.parametrize("direction", ["to-megatron", "to-huggingface"])
def test_file_that_cannot_be_written_to_its_end_leaves_nothing(
    source: Path, converted: Path, direction: str
):
    """A limit on the size of files stops the writing half-way, as a full disk does."""
    model = source if direction == "to-megatron" else converted
    words = (direction, "--source", model, "--target", source.parent / "target")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        refuse(source.parent, "cannot be written .*File too large", *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, less than a tiny model takes; only root may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this user may not mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("direction", ["to-megatron", "to-huggingface"])
def test_disk_without_room_is_refused_before_anything_is_written(
    source: Path, converted: Path, small_disk: Path, direction: str
):
    model = source if direction == "to-megatron" else converted
    words = (direction, "--source", model, "--target", small_disk / "target")
    refuse(small_disk, "needs 0.00 GiB in .*disk, and only 0.00 GiB are free", *words)


@pytest.mark.parametrize("direction", ["to-megatron", "to-huggingface"])
def test_disk_that_fills_up_meanwhile_is_named_and_nothing_is_left(
    source: Path,
    converted: Path,
    small_disk: Path,
    direction: str,
    monkeypatch: pytest.MonkeyPatch,
):
    # As if there had been room when the conversion began.
    monkeypatch.setattr(complete_directory, "SPARE_BYTES", -(2**30))
    model = source if direction == "to-megatron" else converted
    words = (direction, "--source", model, "--target", small_disk / "target")
    refuse(small_disk, "cannot be written .*No space left on device.*; nothing was left", *words)
