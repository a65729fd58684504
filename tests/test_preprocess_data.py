"""From JSONL to Megatron's dataset, with real tokenizers and Megatron's own readers."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.test_ids_of_text import of_bytes
from tests.test_token_bytes import byte_level_bpe, sentencepiece_model

TOOLS = Path(__file__).parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

import preprocess_data  # noqa: E402

DOCUMENTS = [
    "Half of 84 is 42, and 42 + 42 = 84.",
    "naïve café:\n数学 🙂",
    "x",
    "  Anna buys three apples for 6 euros.\n",
]


def write_jsonl(path: Path, documents: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text, "id": 7}) + "\n" for text in documents))
    return path


@pytest.fixture
def tokenizer_directory(tmp_path: Path) -> str:
    directory = tmp_path / "tokenizer"
    byte_level_bpe().save_pretrained(directory)
    return str(directory)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)


def stored(prefix: Path) -> list[list[int]]:
    return [list(map(int, ids)) for ids in IndexedDataset(str(prefix))]


def test_each_document_is_its_tokens_and_one_end_of_document(
    tmp_path: Path, corpus: Path, tokenizer_directory: str
) -> None:
    summary = preprocess_data.preprocess([corpus], str(tmp_path / "out"), tokenizer_directory)
    tokenizer = byte_level_bpe()
    expected = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in DOCUMENTS]
    assert stored(tmp_path / "out") == expected
    assert IndexedDataset(str(tmp_path / "out")).document_indices.tolist() == [0, 1, 2, 3, 4]
    assert summary == preprocess_data.Summary(
        documents=4,
        tokens=sum(map(len, expected)),
        text_bytes=sum(len(text.encode()) for text in DOCUMENTS),
        empty=0,
        dtype="uint16",
    )


def test_end_of_document_can_be_left_out(
    tmp_path: Path, corpus: Path, tokenizer_directory: str
) -> None:
    preprocess_data.preprocess(
        [corpus], str(tmp_path / "out"), tokenizer_directory, append_eod=False
    )
    tokenizer = byte_level_bpe()
    assert stored(tmp_path / "out") == [tokenizer(text).input_ids for text in DOCUMENTS]


def test_tokenizer_that_ends_each_text_itself_gets_no_second_end(
    tmp_path: Path, tokenizer_directory: str
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", ["x<|endoftext|>", "x"])
    preprocess_data.preprocess(
        [corpus], str(tmp_path / "out"), tokenizer_directory, special_tokens="special"
    )
    first, second = stored(tmp_path / "out")
    assert first == second
    assert first.count(byte_level_bpe().eos_token_id) == 1

    ending = byte_level_bpe()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>",
        special_tokens=[("<|im_start|>", 1), ("<|endoftext|>", 0)],
    )
    ending.save_pretrained(tmp_path / "ending")
    texts = ["x", "Half of 84 is 42. " * 40_000]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts)
    preprocess_data.preprocess([corpus], str(tmp_path / "end"), str(tmp_path / "ending"))
    assert stored(tmp_path / "end") == [[1, *byte_level_bpe()(text).input_ids, 0] for text in texts]


def test_special_tokens_in_texts_end_no_document_and_the_first_is_reported(
    tmp_path: Path, tokenizer_directory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["x", "a page on <|endoftext|> goes on, <|im_start|> too", "y <|endoftext|>"]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts)
    arguments = ["--input", str(corpus), "--tokenizer", tokenizer_directory]
    tokenizer = byte_level_bpe()

    preprocess_data.main([*arguments, "--output-prefix", str(tmp_path / "plain")])
    printed = capsys.readouterr().out
    assert "3 special tokens are written in the texts, the first, '<|endoftext|>', at" in printed
    assert f"{corpus}:2: they are plain text here" in printed
    for text, ids in zip(texts, stored(tmp_path / "plain"), strict=True):
        assert ids.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(ids[:-1]) == text

    arguments += ["--special-tokens"]
    preprocess_data.main([*arguments, "special", "--output-prefix", str(tmp_path / "special")])
    assert f"{corpus}:2: they are tokens here" in capsys.readouterr().out
    assert [ids.count(tokenizer.eos_token_id) for ids in stored(tmp_path / "special")] == [1, 2, 1]

    with pytest.raises(SystemExit, match=r"corpus.jsonl:2: the special token '<\|endoftext\|>' is"):
        preprocess_data.main([*arguments, "refuse", "--output-prefix", str(tmp_path / "refuse")])
    assert not list(tmp_path.glob("refuse*"))


def test_sentencepiece_model_is_read_and_ended_with_its_eos(tmp_path: Path, corpus: Path) -> None:
    import sentencepiece

    path = str(sentencepiece_model(tmp_path))
    preprocess_data.preprocess([corpus], str(tmp_path / "out"), path)
    model = sentencepiece.SentencePieceProcessor(model_file=path)
    assert stored(tmp_path / "out") == [[*model.encode(text), model.eos_id()] for text in DOCUMENTS]


def test_vocabulary_beyond_sixteen_bits_is_stored_in_thirty_two(
    tmp_path: Path,
) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(f"unused {number}" for number in range(65_743)), "ab", "</s>"]
    words = {piece: number for number, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(words, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(
        tmp_path / "large"
    )
    corpus = write_jsonl(tmp_path / "large.jsonl", ["bab"])
    summary = preprocess_data.preprocess([corpus], str(tmp_path / "out"), str(tmp_path / "large"))
    assert summary.dtype == "int32"
    assert stored(tmp_path / "out") == [[words["b"], 65_999, 66_000]]


def test_gpt_dataset_of_megatron_serves_the_documents_in_one_stream(
    tmp_path: Path, corpus: Path, tokenizer_directory: str
) -> None:
    prefix = str(tmp_path / "out")
    preprocess_data.preprocess([corpus], prefix, tokenizer_directory)
    tokenizer = preprocess_data.load_tokenizer(tokenizer_directory)
    sequence_length = 16
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=sequence_length,
        blend=([prefix], None),
        split="1",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
        path_to_cache=str(tmp_path / "cache"),
        mid_level_dataset_surplus=0.005,
    )
    indexed = IndexedDataset(prefix)
    dataset = GPTDataset(
        indexed, prefix, np.arange(len(DOCUMENTS), dtype=np.int32), None, Split.train, config
    )
    order = dataset.document_index.tolist()
    stream = [token for document in order for token in stored(Path(prefix))[document]]
    samples = {dataset.shuffle_index.tolist()[i]: dataset[i] for i in range(len(dataset))}
    assert len(samples) == (len(stream) - 1) // sequence_length
    ends = 0
    for number, sample in samples.items():
        window = stream[number * sequence_length : (number + 1) * sequence_length + 1]
        assert sample["tokens"].tolist() == window[:-1]
        assert sample["labels"].tolist() == window[1:]
        # eod_mask_loss takes the ends of documents, as training knows them, out of the loss.
        is_end = [token == tokenizer.eod for token in window[:-1]]
        assert sample["loss_mask"].tolist() == [0.0 if end else 1.0 for end in is_end]
        ends += sum(is_end)
    assert ends >= 2


def test_several_files_and_empty_documents_and_another_key(
    tmp_path: Path, tokenizer_directory: str
) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", ["x", "", "y"], key="body")
    second = write_jsonl(tmp_path / "b.jsonl", ["z"], key="body")
    second.write_text(second.read_text() + "\n  \n")
    summary = preprocess_data.preprocess(
        [first, second], str(tmp_path / "new" / "out"), tokenizer_directory, json_key="body"
    )
    assert (summary.documents, summary.empty) == (3, 1)
    tokenizer = byte_level_bpe()
    assert [ids[0] for ids in stored(tmp_path / "new" / "out")] == [
        tokenizer(text).input_ids[0] for text in "xyz"
    ]


@pytest.mark.multiprocess
def test_two_workers_write_the_same_bytes_as_one(
    tmp_path: Path,
    tokenizer_directory: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Progress is shown on a terminal, which stderr is for two workers only."""
    documents = [f"{DOCUMENTS[number % 4]} {number}" for number in range(298)]
    # One is cut by a worker, the other by this process.
    documents[70:70] = ["Half of 84 is 42. " * 16_000, "3 apples for 6 euros. " * 20_000]
    monkeypatch.setattr(preprocess_data, "LONGEST_SENT", 400_000)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", documents)
    for workers in ("1", "2"):
        monkeypatch.setattr(sys.stderr, "isatty", lambda on=workers == "2": on)
        arguments = ["--input", str(corpus), "--output-prefix", str(tmp_path / workers)]
        preprocess_data.main([*arguments, "--tokenizer", tokenizer_directory, "--workers", workers])
        printed = capsys.readouterr()
        assert printed.out.startswith("300 documents, ")
        assert ("100%" in printed.err) == (workers == "2")
    for kind in ("bin", "idx"):
        one, two = tmp_path / f"1.{kind}", tmp_path / f"2.{kind}"
        assert one.read_bytes() == two.read_bytes()


GOOD = b'{"text": "x"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + b'{"text": "x"\n', r"corpus.jsonl:2: not valid JSON"),
        (GOOD + b"\n" + b'{"text": "\xff"}\n', r"corpus.jsonl:3: not valid UTF-8"),
        (GOOD * 70 + b'{"body": "x"}\n', r"corpus.jsonl:71: no key 'text' among \['body'\]"),
        (b'{"text": 3}\n', r"corpus.jsonl:1: 'text' is a int"),
        (b'{"text": null}\n', r"corpus.jsonl:1: 'text' is a NoneType"),
        (b'["text"]\n', r"corpus.jsonl:1: a list"),
        (b'{"text": "\\ud83d"}\n', r"corpus.jsonl:1: 'text' holds half of a surrogate pair"),
        (b"", r"corpus.jsonl holds no documents"),
        (b"\n \n", r"corpus.jsonl holds no documents"),
        (b'{"text": ""}\n', r"every document is empty"),
    ],
)
def test_bad_input_is_named_with_its_line_and_leaves_nothing_behind(
    content: bytes, message: str, tmp_path: Path, tokenizer_directory: str
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        preprocess_data.preprocess([corpus], str(tmp_path / "out" / "p"), tokenizer_directory)
    assert not list((tmp_path / "out").glob("*"))


def test_a_tokenizer_that_loses_text_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    rightly = AddedToken("</think>", rstrip=True)
    of_bytes(added=(rightly,)).save_pretrained(tmp_path / "always")
    of_bytes(without=b"\x04").save_pretrained(tmp_path / "here")
    good = write_jsonl(tmp_path / "good.jsonl", ["no control characters"])
    bad = write_jsonl(tmp_path / "bad.jsonl", ["a", "b\x04c"])
    for inputs, name, place in (
        ([good], "always", "'a </think>  b"),
        ([good, bad], "here", r"'b\\x04c' becomes 'bc'"),
    ):
        sentence = f"--tokenizer .*{name}: the tokenizer .class .* do not spell the text: {place}"
        with pytest.raises(ValueError, match=sentence):
            preprocess_data.preprocess(inputs, str(tmp_path / "out/p"), str(tmp_path / name))
        assert not list((tmp_path / "out").glob("*"))
    preprocess_data.preprocess([good], str(tmp_path / "out/p"), str(tmp_path / "here"))


def test_existing_output_is_kept_unless_overwrite_is_asked_for_and_the_input_is_good(
    tmp_path: Path, corpus: Path, tokenizer_directory: str
) -> None:
    prefix = str(tmp_path / "out")
    preprocess_data.preprocess([corpus], prefix, tokenizer_directory)
    before = stored(tmp_path / "out")
    other = write_jsonl(tmp_path / "other.jsonl", ["y"])
    with pytest.raises(ValueError, match=r"out.bin or .idx exists.*--overwrite"):
        preprocess_data.preprocess([other], prefix, tokenizer_directory)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{")
    with pytest.raises(ValueError, match=r"bad\.jsonl:1"):
        preprocess_data.preprocess([other, bad], prefix, tokenizer_directory, overwrite=True)
    assert stored(tmp_path / "out") == before
    preprocess_data.preprocess([other], prefix, tokenizer_directory, overwrite=True)
    assert len(stored(tmp_path / "out")) == 1


def test_tokenizer_without_end_of_sequence_needs_no_append_eod(
    tmp_path: Path, corpus: Path
) -> None:
    tokenizer = byte_level_bpe()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    endless = str(tmp_path / "endless")
    with pytest.raises(ValueError, match=r"no end-of-sequence token.*--no-append-eod") as caught:
        preprocess_data.preprocess([corpus], str(tmp_path / "out"), endless)
    assert 'name one of its tokens as "eos_token" in its tokenizer_config.json' in str(caught.value)
    summary = preprocess_data.preprocess([corpus], str(tmp_path / "out"), endless, append_eod=False)
    assert summary.documents == 4

    # What the refusal asks for is enough.
    path = tmp_path / "endless" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|im_start|>"}))
    preprocess_data.preprocess([corpus], str(tmp_path / "ended"), endless)
    assert [ids[-1] for ids in stored(tmp_path / "ended")] == [1, 1, 1, 1]


def test_ids_beyond_the_number_of_tokens_are_refused_rather_than_wrapped(tmp_path: Path) -> None:
    of_bytes().save_pretrained(tmp_path / "holes")
    file = tmp_path / "holes/tokenizer.json"
    description = json.loads(file.read_text())
    description["model"]["vocab"]["x"] = 70_000
    file.write_text(json.dumps(description))
    corpus = write_jsonl(tmp_path / "corpus.jsonl", ["x"])
    with pytest.raises(ValueError, match=r"corpus.jsonl:1: the tokenizer's ids, 70000 here"):
        preprocess_data.preprocess([corpus], str(tmp_path / "out"), str(tmp_path / "holes"))


def test_targets_that_cannot_be_meant_are_refused_at_once(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.idx").mkdir()
    (tmp_path / "input.bin").write_bytes(corpus.read_bytes())
    for prefix, said in {
        "": "names no local file",
        ".": "names no local file",
        "..": "names no local file",
        "new/": "names no local file",
        "new/.": "names no local file",
        "s3://bucket/data": "names no local file",
        "file/data": "file is a file; choose another prefix",
        "file/deeper/data": "file is a file; choose another prefix",
        "taken": "taken.idx is a directory; choose another prefix",
        "input": "input.bin is an --input; choose another prefix",
        "x" * 300: "cannot be written (File name too long)",
    }.items():
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ValueError, match="--output-prefix") as caught:
            preprocess_data.preprocess(
                [corpus, tmp_path / "input.bin"], prefix, "hub/name", overwrite=True
            )
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.faults
def test_an_unwritable_folder_and_a_full_disk_are_one_sentence_and_leave_nothing(
    tmp_path: Path, corpus: Path, tokenizer_directory: str
) -> None:
    """A limit on the size of files stands for the disk; the last bytes are written on closing."""
    # Nobody can make a folder there.
    with pytest.raises(ValueError, match="--output-prefix /proc/no/p cannot be written"):
        preprocess_data.preprocess([corpus], "/proc/no/p", tokenizer_directory)
    prefix = str(tmp_path / "out" / "p")
    for texts in (["Half of 84 is 42. " * 20_000], ["Half of 84"] * 2000):
        write_jsonl(corpus, texts)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            with pytest.raises(ValueError, match="cannot be written") as caught:
                preprocess_data.preprocess([corpus], prefix, tokenizer_directory)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert f"--output-prefix {prefix} cannot be written (File too large)" in str(caught.value)
        assert not list((tmp_path / "out").glob("*"))


@contextlib.contextmanager
def _encode_inline(
    workers: int, name: str, special_tokens: str, eod: int
) -> Iterator[Callable[[list[preprocess_data.Document]], Future]]:
    """Encodes where it is called, with the tokenizer that workers would load."""
    tokenizer = preprocess_data.DocumentTokenizer(
        preprocess_data.load_tokenizer(name), special_tokens
    )

    def start(documents: list[preprocess_data.Document]) -> Future:
        future: Future = Future()
        future.set_result(
            [list(preprocess_data.encode_document(tokenizer, one, eod)) for one in documents]
        )
        return future

    yield start


def test_what_is_read_ahead_for_the_workers_is_bounded(
    tmp_path: Path, tokenizer_directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess_data, "_worker_pool", _encode_inline)
    monkeypatch.setattr(preprocess_data, "CHARACTERS_PER_BATCH", 1000)
    monkeypatch.setattr(preprocess_data, "LONGEST_SENT", 5000)
    texts = ["x" * size for size in (10, 400, 900, 30_000, 10, 10, 6000, 4000, 20) * 9]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts)
    tokenizer = preprocess_data.DocumentTokenizer(
        preprocess_data.load_tokenizer(tokenizer_directory)
    )
    ahead = 0
    largest = 0

    def counted() -> Iterator[preprocess_data.Batch]:
        nonlocal ahead, largest
        for batch in preprocess_data.read_batches([corpus], "text", tokenizer):
            ahead += batch.characters
            largest = max(largest, ahead - batch.characters)
            yield batch

    found = []
    for encoded in preprocess_data.encode_batches(counted(), tokenizer, tokenizer_directory, 0, 2):
        found += [sum(ids.size for ids in pieces) for pieces in encoded.ids]
        ahead -= encoded.batch.characters
    expected = [len(byte_level_bpe()(text).input_ids) + 1 for text in texts]
    assert found == expected
    # Four batches, or one that is larger, and what was read last.
    assert largest <= 30_000 + 4 * 1000


@pytest.mark.faults
@pytest.mark.multiprocess
def test_a_killed_worker_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, tokenizer_directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS * 400)
    read = preprocess_data.read_batches

    def kill_one(*arguments: Any) -> Iterator[preprocess_data.Batch]:
        for number, batch in enumerate(read(*arguments)):
            if number == 5:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            yield batch

    monkeypatch.setattr(preprocess_data, "read_batches", kill_one)
    with pytest.raises(ValueError, match=r"--workers 2: one of the processes was killed"):
        preprocess_data.preprocess(
            [corpus], str(tmp_path / "out" / "p"), tokenizer_directory, workers=2
        )
    assert not list((tmp_path / "out").glob("*"))
    assert multiprocessing.active_children() == []


@pytest.mark.faults
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("number", "workers"),
    [
        (signal.SIGTERM, "2"),
        (signal.SIGKILL, "2"),
        *(
            pytest.param(number, workers, marks=pytest.mark.slow)
            for number, workers in (
                (signal.SIGTERM, "1"),
                (signal.SIGKILL, "1"),
                (signal.SIGINT, "1"),
                (signal.SIGINT, "2"),
            )
        ),
    ],
)
def test_a_signal_ends_all_processes_with_one_sentence_and_leaves_nothing(
    tmp_path: Path, tokenizer_directory: str, number: signal.Signals, workers: str
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"text": "Half of 84 is 42. " * 500}) + "\n")
    corpus.write_bytes(corpus.read_bytes() * 5000)
    out = tmp_path / "out"
    words = ["--input", str(corpus), "--output-prefix", str(out / "p"), "--workers", workers]
    process = subprocess.Popen(
        [sys.executable, TOOLS / "preprocess_data.py", *words, "--tokenizer", tokenizer_directory],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _wait_until(lambda: any(path.stat().st_size for path in out.glob("*.partial.bin")))
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert said.count(f"preprocess_data: stopped by {number.name}; nothing was written.") == 1
        assert "Traceback" not in said
        assert not list(out.glob("*"))

    def all_gone() -> bool:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    _wait_until(all_gone)


@pytest.mark.faults
def test_what_a_killed_process_left_is_written_over_and_a_living_one_is_not_disturbed(
    tmp_path: Path, corpus: Path, tokenizer_directory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix, partial = str(tmp_path / "out"), tmp_path / "out.partial.bin"
    preprocess_data.preprocess([corpus], str(tmp_path / "whole"), tokenizer_directory)
    assert "written over" not in capsys.readouterr().err
    partial.write_bytes(b"left" * 1000)
    (tmp_path / "out.partial.idx").write_bytes(b"left" * 1000)
    with partial.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=rf"{prefix}: another process is writing {partial};"):
            preprocess_data.preprocess([corpus], prefix, tokenizer_directory)
        assert partial.read_bytes() == b"left" * 1000
    preprocess_data.preprocess([corpus], prefix, tokenizer_directory)
    assert capsys.readouterr().err.count(f"{partial}, which a killed process left, is written") == 1
    for kind in ("bin", "idx"):
        whole = (tmp_path / f"whole.{kind}").read_bytes()
        assert (tmp_path / f"out.{kind}").read_bytes() == whole
    assert not list(tmp_path.glob("*.partial.*"))

    partial.symlink_to(tmp_path / "whole.bin")
    with pytest.raises(ValueError, match="cannot be written"):
        preprocess_data.preprocess([corpus], prefix, tokenizer_directory, overwrite=True)
    assert (tmp_path / "whole.bin").read_bytes() == (tmp_path / "out.bin").read_bytes()


def _wait_until(happens: Callable[[], bool]) -> None:
    for _ in range(1200):
        if happens():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen within two minutes")


@pytest.mark.multiprocess
def test_memory_does_not_grow_with_a_document(tmp_path: Path, tokenizer_directory: str) -> None:
    """As a whole 8 MB of text took 1.9 GB."""
    program = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); import preprocess_data as p\n"
        "p.load_tokenizer(sys.argv[3]); peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "p.preprocess([p.Path(sys.argv[2])], sys.argv[4], sys.argv[3])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)"
    )
    corpus = write_jsonl(tmp_path / "corpus.jsonl", ["Half of 84 is 42, not 43. " * 310_000])
    words = [program, str(TOOLS), str(corpus), tokenizer_directory, str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) / 1024 < 250


def test_bad_arguments_are_named(tmp_path: Path, corpus: Path, tokenizer_directory: str) -> None:
    def attempt(tokenizer: str = tokenizer_directory, **changes: object) -> None:
        arguments = {"inputs": [corpus], "output_prefix": str(tmp_path / "out")} | changes
        preprocess_data.preprocess(tokenizer_name=tokenizer, **arguments)

    with pytest.raises(ValueError, match="--workers is 0"):
        attempt(workers=0)
    with pytest.raises(ValueError, match=r"--input .*absent.jsonl is not a file"):
        attempt(inputs=[tmp_path / "absent.jsonl"])
    with pytest.raises(ValueError, match=r"--tokenizer .*absent.model does not exist"):
        attempt(tokenizer=str(tmp_path / "absent.model"))
    with pytest.raises(ValueError, match="give the directory"):
        attempt(tokenizer=str(Path(tokenizer_directory) / "tokenizer.json"))
    (tmp_path / "fake.model").write_text("no model")
    with pytest.raises(ValueError, match="could not be loaded as a sentencepiece tokenizer"):
        attempt(tokenizer=str(tmp_path / "fake.model"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="could not be loaded as a huggingface tokenizer"):
        attempt(tokenizer=str(tmp_path / "bare"))


def test_script_reports_an_error_in_one_line_without_traceback(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--input", str(corpus), "--output-prefix", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"^preprocess_data: --tokenizer /absent does not exist"):
        preprocess_data.main([*arguments, "--tokenizer", "/absent"])


def test_overwriting_tells_of_the_sample_order_that_megatron_cached(
    tmp_path: Path, corpus: Path, tokenizer_directory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--input", str(corpus), "--output-prefix", str(tmp_path / "out")]
    arguments += ["--tokenizer", tokenizer_directory, "--overwrite"]
    preprocess_data.main(arguments)
    assert "delete" not in capsys.readouterr().out
    (tmp_path / "out" / "cache").mkdir(parents=True)
    preprocess_data.main(arguments)
    assert f"delete {tmp_path / 'out' / 'cache'}" in capsys.readouterr().out
