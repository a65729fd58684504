"""Digests of a checkpoint's files: a bit that flips there is seen before anything is loaded."""

import json
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rmt.job import digests
from megatron_rmt.job.digests import (
    check_digests,
    damage,
    digested,
    file_digest,
    recorded_digests,
)
from tests.distributed import REPOSITORY
from tests.tiny_run import PRETRAIN, RMT, TinyInputs, checkpoint_tensors, run

pytestmark = [pytest.mark.faults]

TP2 = ["--tensor-model-parallel-size", "2"]


def flip(file: Path, byte: int = -1000, bit: int = 3) -> None:
    """Flip one bit of a file; from its end for a negative ``byte``."""
    content = bytearray(file.read_bytes())
    content[byte] ^= 1 << bit
    file.write_bytes(content)


def _written(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    with digested(folder, 0, ["a", "b"]):
        (folder / "a").write_bytes(b"RMT" * 1000)
        (folder / "b").write_bytes(b"")
    return folder


def test_the_digest_is_crc_32_whatever_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(digests, "_CHUNK", 7)
    for length in (0, 1, 6, 7, 8, 100):
        content = bytes(range(length))
        (tmp_path / "file").write_bytes(content)
        assert file_digest(tmp_path / "file") == f"{zlib.crc32(content):08x}"


def test_each_flipped_bit_is_seen(tmp_path: Path):
    folder = _written(tmp_path)
    recorded = recorded_digests(folder)
    assert recorded.keys() == {"a", "b"}
    assert damage(folder, recorded, recorded) == []
    for byte in range(0, 3000, 499):
        flip(folder / "a", byte)
        (problem,) = damage(folder, recorded, recorded)
        assert problem.startswith("a is not as it was written (CRC-32 ")
        flip(folder / "a", byte)
    (folder / "a").unlink()
    assert damage(folder, recorded, recorded) == ["a cannot be read (No such file or directory)"]


def test_a_job_that_is_killed_while_it_writes_leaves_no_digest(tmp_path: Path):
    folder = _written(tmp_path)
    (folder / "a").write_bytes(b"")
    killed = digested(folder, 0, ["a", "b"])
    killed.__enter__()
    assert recorded_digests(folder) == {}, "gone before the first file changes"
    (folder / "a").write_bytes(b"half")
    assert recorded_digests(folder) == {}
    _written(folder)
    assert damage(folder, ["a", "b"], recorded_digests(folder)) == []
    with digested(folder, 0, []):
        pass
    assert not [*folder.glob("rmt_digest_*")], "where none is wanted an old one goes too"


@pytest.mark.usefixtures("single_process_megatron")
def test_one_rank_alone_reads_every_file(tmp_path: Path):
    for writer, name in enumerate("abc"):
        with digested(tmp_path, writer, [name]):
            (tmp_path / name).write_bytes(b"RMT" * 1000)
    check_digests(tmp_path)
    for name in "abc":
        flip(tmp_path / name)
        with pytest.raises(SystemExit, match=f"is not loaded: {name} is not as it was written"):
            check_digests(tmp_path)
        flip(tmp_path / name)


def test_a_digest_that_cannot_be_written_is_said_and_left_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "rmt_digest_0.partial").mkdir()
    _written(tmp_path)
    assert recorded_digests(tmp_path) == {}
    place = tmp_path / "rmt_digest_0.json"
    assert capfd.readouterr().err == f"RMT: {place} cannot be written (Is a directory).\n"


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"crc32": 1}', b"[" * 100000])
def test_a_damaged_digest_is_named(content: bytes, tmp_path: Path):
    _written(tmp_path)
    (tmp_path / "rmt_digest_0.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"rmt_digest_0.json holds no digests; delete it"):
        recorded_digests(tmp_path)


@pytest.fixture(scope="module")
def saved(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``--save`` of two ranks, saved beside the training after step 2 and at the end, step 4."""
    root = tmp_path_factory.mktemp("digests")
    flags = [*inputs.flags(), *RMT, *TP2, "--save", str(root / "saved"), "--save-interval", "2"]
    run(root / "logs", 2, [*flags, "--exit-interval", "4", "--async-save"])
    return root / "saved"


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "copied")


def _resume(
    inputs: TinyInputs, saved: Path, directory: Path, ranks: int, *flags: str
) -> Callable[[], object]:
    own = [*inputs.flags(saved), *RMT, *flags, "--exit-interval", "5"]
    return lambda: run(directory, ranks, own)


@pytest.mark.multiprocess
def test_an_asynchronous_save_has_digests_of_all_that_is_loaded(saved: Path):
    for iteration in (2, 4):
        folder = saved / f"iter_{iteration:07d}"
        files = {path.name for path in folder.glob("*.distcp")}
        assert {name[:4] for name in files} == {"__0_", "__1_"}, "both ranks write"
        assert recorded_digests(folder).keys() == {".metadata", *files}
        for rank in range(2):
            own = json.loads((folder / f"rmt_digest_{rank}.json").read_text())["crc32"]
            assert own.keys() == {name for name in files if name.startswith(f"__{rank}_")}
        assert damage(folder, sorted(files), recorded_digests(folder)) == []


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "name", ["__1_0.distcp", pytest.param(".metadata", marks=pytest.mark.slow)]
)
def test_a_flipped_bit_ends_a_resume_on_every_rank(
    name: str, inputs: TinyInputs, copied: Path, tmp_path: Path
):
    folder = copied / "iter_0000004"
    flip(folder / name)
    sentence = rf"SystemExit: RMT: the checkpoint {folder} is not loaded: {name} is not as it was "
    with pytest.raises(AssertionError, match=sentence):
        _resume(inputs, copied, tmp_path / "logs", 2, *TP2)()
    assert not (tmp_path / "logs/metrics.jsonl").exists()


@pytest.mark.multiprocess
def test_another_layout_checks_them_too_and_loads_what_is_whole(
    inputs: TinyInputs, copied: Path, tmp_path: Path
):
    folder = copied / "iter_0000004"
    assert len(_resume(inputs, copied, tmp_path / "whole", 1)().metrics) == 1
    flip(folder / "__1_0.distcp")
    with pytest.raises(AssertionError, match=r"RMT: .* is not loaded: __1_0.distcp is not as"):
        _resume(inputs, copied, tmp_path / "damaged", 1)()
    assert len(_resume(inputs, copied, tmp_path / "asked", 1, "--rmt-no-digests")().metrics) == 1
    for place in folder.glob("rmt_digest_*"):
        place.unlink()
    assert len(_resume(inputs, copied, tmp_path / "old", 1)().metrics) == 1
    flip(folder / ".metadata")
    with pytest.raises(AssertionError, match=r"SystemExit: RMT: the checkpoint .* is not loaded: "):
        _resume(inputs, copied, tmp_path / "index", 1)()


KILLED = """
import os, runpy, signal

if __name__ == "__main__":
    from megatron_rmt.job import digests

    digests.file_digest = lambda path: os.kill(os.getpid(), signal.SIGKILL)
    runpy.run_path({pretrain!r}, run_name="__main__")
"""


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_job_that_is_killed_between_files_and_digest_resumes(
    inputs: TinyInputs, copied: Path, tmp_path: Path
):
    """With a digest of an earlier save beside files that are new."""
    program = tmp_path / "program.py"
    program.write_text(KILLED.format(pretrain=str(PRETRAIN)))
    (copied / "latest_checkpointed_iteration.txt").write_text("2")
    saving = [*RMT, *TP2, "--save", str(copied), "--save-interval", "2", "--exit-interval", "4"]
    with pytest.raises(AssertionError, match=r"died without a traceback|Connection closed"):
        run(tmp_path / "killed", 2, [*inputs.flags(copied), *saving], program)
    folder = copied / "iter_0000004"
    files = sorted(path.name for path in folder.glob("*.distcp"))
    recorded = recorded_digests(folder)
    assert damage(folder, recorded.keys() & files, recorded) == []
    assert len(run(tmp_path / "again", 2, [*inputs.flags(copied), *saving]).metrics) == 2
    recorded = recorded_digests(folder)
    assert recorded.keys() == {".metadata", *files}
    assert damage(folder, recorded, recorded) == []


@pytest.mark.multiprocess
@pytest.mark.slow
def test_without_digests_a_save_writes_none_and_removes_old_ones(
    inputs: TinyInputs, tmp_path: Path
):
    stale = tmp_path / "saved/iter_0000001"
    stale.mkdir(parents=True)
    for writer in ("0", "index"):
        (stale / f"rmt_digest_{writer}.json").write_text('{"crc32": {".metadata": "0"}}')
    flags = ["--save", str(tmp_path / "saved"), "--save-interval", "1", "--rmt-no-digests"]
    flags += ["--exit-interval", "1"]
    run(tmp_path / "logs", 1, [*inputs.flags(), *RMT, *flags])
    assert [*stale.glob("rmt_digest_*")] == []
    assert checkpoint_tensors(tmp_path / "saved", 1)


@pytest.mark.multiprocess
def test_a_flipped_bit_ends_a_conversion(inputs: TinyInputs, copied: Path, tmp_path: Path):
    folder = copied / "iter_0000004"
    tensors = checkpoint_tensors(copied, 4)
    assert all(own.isfinite().all() for own in tensors.values() if own.is_floating_point())
    flip(folder / "__0_0.distcp")
    command = [sys.executable, str(REPOSITORY / "tools/convert_checkpoint.py"), "to-huggingface"]
    command += ["--source", str(copied), "--target", str(tmp_path / "target")]
    command += ["--tokenizer", str(inputs.huggingface)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode != 0
    assert f"{folder} is damaged: __0_0.distcp is not as it was written" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "target").exists()
