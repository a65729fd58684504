"""A directory that exists only when it is complete, and the memory that filling it takes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.tiny_checkpoints import TOOLS

sys.path.insert(0, str(TOOLS))

import convert_checkpoint
from conversion.complete_directory import complete_directory
from conversion.model_config import read_config
from conversion.safetensors_stream import write_safetensors
from conversion.weight_names import rows_of

pytestmark = pytest.mark.faults

MIB = 2**20
LARGEST = 40 * MIB
# Buffers, the index, the progress bar; not a tensor more.
CONSTANT = 8 * MIB
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": LARGEST // 4 // 1024,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
# Prints by how much the peak of resident memory exceeds what was resident before, in bytes, for
# each direction. A tiny conversion comes first, so that imports are not counted.
MEASURE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import convert_checkpoint

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def extra(convert, source, target):
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS:")
    convert(source, target)
    return memory("VmHWM:") - before

tiny, large, target = map(Path, sys.argv[2:])
convert_checkpoint.to_megatron(tiny, target / "tiny")
convert_checkpoint.to_huggingface(target / "tiny", target / "tiny-back")
print(extra(convert_checkpoint.to_megatron, large, target / "large"))
print(extra(convert_checkpoint.to_huggingface, target / "large", target / "large-back"))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 218 MiB; its two largest tensors have 40 MiB each."""
    directory = tmp_path_factory.mktemp("large")
    shape = read_config(CONFIG)
    shapes = {
        name: (part, torch.float32)
        for weight, place in rows_of(shape)
        for name, part in zip(weight.names(place), weight.part_shapes(shape), strict=True)
    }
    generator = np.random.default_rng(1)

    def random_tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, (part, _) in shapes.items():
            yield name, torch.from_numpy(generator.random(part, dtype=np.float32))

    write_safetensors(directory / "model.safetensors", shapes, random_tensors())
    (directory / "config.json").write_text(json.dumps(CONFIG))
    pieces = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"})
    )
    return directory


@pytest.mark.multiprocess
def test_memory_does_not_grow_with_the_model(large: Path, tiny_checkpoints: Path, tmp_path: Path):
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, TOOLS, tiny_checkpoints / "llama"]
    command += [large, tmp_path]
    # Freed blocks go back to the system at once; glibc else keeps up to 64 MiB of small ones.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
    printed = subprocess.run(
        list(map(str, command)), check=True, stdout=subprocess.PIPE, env=environment
    ).stdout
    to_megatron, to_huggingface = map(int, printed.split())
    assert LARGEST / 2 < to_megatron < 2 * LARGEST + CONSTANT
    assert LARGEST / 2 < to_huggingface < 2 * LARGEST + CONSTANT
    # What is written has the same bytes for each tensor.
    back = convert_checkpoint.HuggingFaceWeights(tmp_path / "large-back")
    original = convert_checkpoint.HuggingFaceWeights(large)
    assert back.shapes == original.shapes
    for name in ("model.embed_tokens.weight", "model.layers.2.self_attn.k_proj.weight"):
        assert torch.equal(back.read(name), original.read(name))


@pytest.mark.multiprocess
def test_killed_conversion_leaves_no_target_and_a_living_one_is_not_disturbed(
    large: Path, tmp_path: Path
):
    target = tmp_path / "target"
    words = ["to-megatron", "--source", str(large), "--target", str(target)]
    command = [sys.executable, "-W", "ignore", str(TOOLS / "convert_checkpoint.py"), *words]
    process = subprocess.Popen(command)
    try:
        partial = tmp_path / ".target.partial"
        deadline = time.monotonic() + 120
        while sum(file.stat().st_size for file in partial.glob("release/*.distcp")) < MIB:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(SystemExit, match=r"Another process is writing --target .*target"):
            convert_checkpoint.main(words)
        assert partial.is_dir()
        assert not target.exists()
    finally:
        process.kill()
        process.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".target.partial"]
    convert_checkpoint.main(words)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    shape = read_config(CONFIG)
    convert_checkpoint.MegatronWeights(target / "release").check(shape)
    names = {"huggingface", "latest_checkpointed_iteration.txt", "model_flags.txt", "release"}
    assert {path.name for path in target.iterdir()} == {*names, "provenance.json"}


def test_directory_appears_when_it_is_complete(tmp_path: Path):
    with complete_directory(tmp_path / "deep/target") as partial:
        (partial / "file").write_text("content")
        assert not (tmp_path / "deep/target").exists()
    assert [path.name for path in (tmp_path / "deep/target").iterdir()] == ["file"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["target"]


def test_failure_leaves_nothing(tmp_path: Path):
    def fill_and_fail() -> None:
        with complete_directory(tmp_path / "target") as partial:
            (partial / "file").write_text("content")
            raise KeyError

    with pytest.raises(KeyError):
        fill_and_fail()
    assert list(tmp_path.iterdir()) == []


def test_what_appeared_meanwhile_is_kept(tmp_path: Path):
    target = tmp_path / "target"

    def be_overtaken() -> None:
        with complete_directory(target):
            target.mkdir()
            (target / "mine").write_text("mine")

    with pytest.raises(ValueError, match="exists; remove it"):
        be_overtaken()
    assert (target / "mine").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_an_empty_directory_is_replaced(tmp_path: Path):
    (tmp_path / "target").mkdir()
    with complete_directory(tmp_path / "target") as partial:
        (partial / "file").write_text("content")
    assert (tmp_path / "target/file").exists()


@pytest.mark.parametrize("to", ["someone", "nowhere"])
def test_a_link_at_the_place_that_is_filled_is_not_followed(tmp_path: Path, to: str):
    """Neither to a directory, which would be emptied and renamed, nor to nothing."""
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone/precious").write_text("precious")
    (tmp_path / ".target.partial").symlink_to(tmp_path / to)
    with (
        pytest.raises(ValueError, match=r"\.target\.partial, where .* is a symbolic link, which"),
        complete_directory(tmp_path / "target"),
    ):
        pytest.fail("started")
    assert (tmp_path / "someone/precious").read_text() == "precious"
    assert (tmp_path / ".target.partial").is_symlink()
    assert not (tmp_path / "target").exists()


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path):
    (tmp_path / ".target.partial").mkdir()
    (tmp_path / ".target.partial/.lock").symlink_to(tmp_path / "made")
    with (
        pytest.raises(ValueError, match=r"cannot be written .*\.lock: Too many levels of symbolic"),
        complete_directory(tmp_path / "target"),
    ):
        pytest.fail("started")
    assert not (tmp_path / "made").exists()


def test_links_in_what_a_killed_process_left_are_removed_and_not_followed(tmp_path: Path):
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone/precious").write_text("precious")
    left = tmp_path / ".target.partial"
    left.mkdir()
    (left / "link").symlink_to(tmp_path / "someone")
    with complete_directory(tmp_path / "target") as partial:
        (partial / "file").write_text("content")
    assert (tmp_path / "someone/precious").read_text() == "precious"
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["file"]


def test_more_than_the_disk_holds_is_refused(tmp_path: Path):
    def ask(size: int) -> None:
        with complete_directory(tmp_path / "target", size):
            pytest.fail("started")

    with pytest.raises(ValueError, match=r"needs 1073741824\.00 GiB in .* and only .* are free"):
        ask(2**60)
    assert list(tmp_path.iterdir()) == []
