"""From JSONL to Megatron's dataset, with real tokenizers and Megatron's own readers."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from tokenizers import AddedToken, decoders, models, pre_tokenizers
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
    preprocess_data.preprocess([corpus], str(tmp_path / "out"), tokenizer_directory)
    first, second = stored(tmp_path / "out")
    assert first == second
    assert first.count(byte_level_bpe().eos_token_id) == 1


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
    documents = [f"{DOCUMENTS[number % 4]} {number}" for number in range(300)]
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
    assert not list((tmp_path / "out").iterdir())


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
        assert not list((tmp_path / "out").iterdir())
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
    with pytest.raises(ValueError, match=r"no end-of-sequence token.*--no-append-eod"):
        preprocess_data.preprocess([corpus], str(tmp_path / "out"), endless)
    summary = preprocess_data.preprocess([corpus], str(tmp_path / "out"), endless, append_eod=False)
    assert summary.documents == 4


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
