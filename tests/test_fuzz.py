"""Damaged inputs of every sort that a person can write end in success or in one sentence.

Each input is a valid file with a few changes: bits flipped, parts cut, doubled or moved, other
encodings; values of other types, huge or endless ones, deep nesting, half surrogates, keys gone or
strange. A hundred for each sort in the ordinary suite, a thousand in the slow one (``bash
tests/run.sh -m slow tests/test_fuzz.py``), always the same ones.
"""

import contextlib
import copy
import gzip
import io
import json
import math
import shutil
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import pytest
import torch
from hypothesis import strategies
from megatron.core.datasets.indexed_dataset import IndexedDataset
from safetensors.torch import load_file

from megatron_rmt.job.settings import add_rmt_arguments, setting_problems
from megatron_rmt.prompt.prompt import Prompt
from tests.test_evaluation import record, settings
from tests.tiny_checkpoints import TOOLS
from tests.tokenizer_family import TEXTS, write_member

sys.path.insert(0, str(TOOLS))

import convert_checkpoint
import evaluate
import evaluation
import evaluation_documents
import plot_curves
import preprocess_data
from document_tokens import DocumentTokenizer

pytestmark = pytest.mark.faults

SECONDS = 30

# What JSON's own writer does not write, as it stands in a file.
RAW_JSON = {
    "@endless": "1e999",
    "@nan": "NaN",
    "@infinity": "-Infinity",
    "@digits": "9" * 5000,
    "@nested": "[" * 3000 + "]" * 3000,
    "@open": '{"a":' * 100_000,
    "@surrogate": '"\\ud800"',
    "@twice": '{"a": 1, "a": 2}',
}
VALUES = [None, True, False, 0, -1, 1, 3, 0.5, -0.0, 10**9, 2**31, 2**63, -(10**30), 1e-320, 1e308]
VALUES += [
    "",
    " ",
    "x",
    "1",
    "nan",
    "\0",
    "a\nb",
    "é" * 9,
    "/",
    "x" * 20_000,
    "{budget}",
    *RAW_JSON,
]
VALUES += [[], {}, [0], [None], [[]], [1, 2, 3], ["a", "b"], {"": 0}, {"a": {"a": []}}]
RAW_YAML = [
    *("!!timestamp abc", "!!int ''", "!!bool foo", "!!float x", "!!binary é", "!!set {a}"),
    *("!!python/name:os.system", "2001-99-99", "2001-01-01", "&a [*a]", "*b", "[", "{a: ", "|"),
    *("? [1, 2]", "${oc.env:HOME}", "${group-size}", "${", "???", ".nan", "-.inf", "1e999", "0x"),
    *("0b2", "1_000", "0o9", "1:60", "~", "'", '"\\ud800"', '"\\x', "<<: *c", "%TAG", "@x"),
    *("`x", "- - - 1", "\t", "# x", "--- 1", "...", ": :", "yes", "null", "1e", "[1, [2, [3]]]"),
]
RAW_YAML += ["[" * 2000, "9" * 5000, "x" * 20_000]


HOW_OFTEN = strategies.sampled_from([1, 1, 1, 1, 2, 3])


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


@strategies.composite
def damaged_value(draw: Any, original: Any) -> str:
    """A JSON value with one to three other values, lost keys or strange ones, as text."""
    value = [json.loads(json.dumps(original))]
    for _ in range(draw(HOW_OFTEN)):
        container, key = draw(strategies.sampled_from(list(places(value))))
        action = draw(strategies.sampled_from(["replace"] * 4 + ["lose", "rename", "more"]))
        if action == "replace" or container is value:
            container[key] = copy.deepcopy(draw(strategies.sampled_from(VALUES)))
        elif action == "lose":
            del container[key]
        elif action == "rename" and isinstance(container, dict):
            container[draw(strategies.sampled_from(["", "x", "model_type", key * 2]))] = (
                container.pop(key)
            )
        elif isinstance(container, dict):
            container["more"] = copy.deepcopy(container[key])
        else:
            container.insert(key, copy.deepcopy(container[key]))
    text = json.dumps(value[0])
    for name, raw in RAW_JSON.items():
        text = text.replace(f'"{name}"', raw)
    return text


CHANGES = ("flip", "flip", "flip", "cut", "lose", "double", "other", "coding")


@strategies.composite
def damaged_bytes(draw: Any, content: bytes) -> bytes:
    """One to three changes that know nothing of what the bytes say."""
    for _ in range(draw(HOW_OFTEN)):
        first = draw(strategies.integers(0, len(content)))
        length = draw(strategies.sampled_from([1, 1, 1, 2, 8, 64, 1024]))
        kind = draw(strategies.sampled_from(CHANGES))
        before, part, behind = content[:first], content[first:][:length], content[first + length :]
        if kind == "flip" and part:
            flipped = part[0] ^ (1 << draw(strategies.integers(0, 7)))
            content = before + bytes([flipped]) + part[1:] + behind
        elif kind == "cut":
            content = before
        elif kind == "lose":
            content = before + behind
        elif kind == "double":
            content = before + part + part + behind
        elif kind == "other":
            others = [
                b"\0" * length,
                b"\xff",
                b"\r",
                b"\n",
                b"\xed\xa0\x80",
                b'"',
                b"{",
                b"\\ud800",
            ]
            content = before + draw(strategies.sampled_from(others)) + behind
        else:
            content = draw(strategies.sampled_from(ENCODINGS))(content)
    return content


ENCODINGS: list[Callable[[bytes], bytes]] = [
    lambda content: b"\xef\xbb\xbf" + content,
    lambda content: content.decode("latin-1").encode("utf-16"),
    lambda content: content.decode("latin-1").encode("latin-1").replace(b"\n", b"\r"),
    lambda content: gzip.compress(content, mtime=0),
    lambda content: b"PAR1" + content,
    lambda content: b"",
]


def damaged_json(original: Any) -> strategies.SearchStrategy[bytes]:
    values = damaged_value(original).map(str.encode)
    return strategies.one_of(values, values, damaged_bytes(json.dumps(original).encode()))


def damaged_lines(originals: list[Any]) -> strategies.SearchStrategy[bytes]:
    """JSON lines, one of which has other values, or all of which have other bytes."""
    lines = [json.dumps(original).encode() + b"\n" for original in originals]

    def with_one(number: int) -> strategies.SearchStrategy[bytes]:
        before, behind = b"".join(lines[:number]), b"".join(lines[number + 1 :])
        one = damaged_value(originals[number]).map(str.encode)
        return one.map(lambda line: before + line + b"\n" + behind)

    values = strategies.integers(0, len(lines) - 1).flatmap(with_one)
    return strategies.one_of(values, values, damaged_bytes(b"".join(lines)))


@dataclass(frozen=True)
class Sort:
    """One sort of input.

    prepare: makes what lies beside it in a directory, and returns its valid contents by file.
    inputs: the damaged contents of one file. use: what a person does with it; may raise ValueError
    or SystemExit. named: what the sentence names of it, one of these.
    """

    prepare: Callable[[Path], dict[str, bytes]]
    inputs: Callable[[str, bytes], strategies.SearchStrategy[bytes]]
    use: Callable[[Path], None]
    named: Callable[[Path, str], list[str]] = lambda directory, file: [file]


@contextlib.contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


def files_of(directory: Path) -> set[Path]:
    return set(directory.rglob("*"))


def sentence_of(sort: Sort, directory: Path) -> str | None:
    """With which an input is refused; None if it is taken. Any other error is a failure."""
    try:
        with no_longer_than(SECONDS):
            sort.use(directory)
    except (ValueError, SystemExit) as error:
        return str(error)
    return None


def fuzz(sort: Sort, root: Path, examples: int) -> None:
    """``examples`` damaged inputs of one sort, each in a directory of its own."""
    valid = root / "valid"
    valid.mkdir()
    contents = sort.prepare(valid)
    for file, content in contents.items():
        (valid / file).write_bytes(content)
    used = shutil.copytree(valid, root / "used")
    # The valid input itself is taken.
    sort.use(used)
    inputs = strategies.sampled_from(sorted(contents)).flatmap(
        lambda file: strategies.tuples(strategies.just(file), sort.inputs(file, contents[file]))
    )

    @hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(inputs)
    def one_sentence_or_success(damaged: tuple[str, bytes]) -> None:
        file, content = damaged
        directory = root / "damaged"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(valid, directory)
        (directory / file).write_bytes(content)
        before = files_of(directory)
        sentence = sentence_of(sort, directory)
        if sentence is not None:
            assert sentence.strip()
            assert "\n" not in sentence, sentence
            # It may repeat a long value, but not the file.
            assert len(sentence.replace("x" * 1000, "")) < 2000, sentence
            assert any(name in sentence for name in sort.named(directory, file)), sentence
            assert files_of(directory) == before, "something was left behind"

    one_sentence_or_success()


# YAML settings

SETTINGS = b"""rmt: true
group-size: 4
force-close: true
entropy-thresholds: [0.5, 1.0, 1.5]
template: inline
temperature: 0.9
"""


def yaml_file(file: str, content: bytes) -> strategies.SearchStrategy[bytes]:
    """Other values, in the place of values or of whole lines, or other bytes."""
    lines = content.splitlines()

    def with_one(number: int) -> strategies.SearchStrategy[bytes]:
        key = lines[number].partition(b":")[0] + b": "
        raw = strategies.sampled_from(RAW_YAML).map(str.encode)
        line = strategies.one_of(raw.map(lambda value: key + value), raw)
        return line.map(lambda one: b"\n".join([*lines[:number], one, *lines[number + 1 :]]))

    values = strategies.integers(0, len(lines) - 1).flatmap(with_one)
    return strategies.one_of(values, values, damaged_bytes(content))


def use_settings(directory: Path) -> None:
    parser = add_rmt_arguments(ArgumentParser())
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = parser.parse_args(["--rmt-config", str(directory / "settings.yaml")])
    except SystemExit:
        # The parser says it on stderr.
        raise ValueError(said.getvalue().removesuffix("\n")) from None
    args.train_iters, args.seq_length = 10, 64
    for problem in setting_problems(args):
        assert "\n" not in problem


# Templates

TEMPLATE = {"name": "own", "head": "Text:\n", "stem": "<think {budget}>", "close": "</think>"}
TEMPLATE |= {"answer": "boxed"}


@cache
def tokenizer_of(directory: Path) -> Any:
    return preprocess_data.load_tokenizer(str(directory))


def prepare_template(directory: Path) -> dict[str, bytes]:
    write_member("end only", directory.parent / "model")
    return {"template.json": json.dumps(TEMPLATE).encode()}


def use_template(directory: Path) -> None:
    tokenizer = tokenizer_of(directory.parent / "model")
    path = str(directory / "template.json")
    prompt = Prompt.of(tokenizer, path, chat=True, answer_tokens=4, force_close=True)
    assert prompt.close
    assert prompt.stem(6)
    assert isinstance(prompt.preamble, list)
    prompt.grammar(torch.device("cpu"))


# A corpus

LINES = [{"text": text, "problem_chars": 4, "meta": {"url": ["x", 1]}} for text in TEXTS[:4]]


def prepare_corpus(directory: Path) -> dict[str, bytes]:
    write_member("end only", directory.parent / "model")
    return {"corpus.jsonl": b"".join(json.dumps(line).encode() + b"\n" for line in LINES)}


def use_corpus_for_training(directory: Path) -> None:
    arguments = ["--input", directory / "corpus.jsonl", "--output-prefix", directory / "data"]
    arguments += ["--tokenizer", directory.parent / "model"]
    with contextlib.redirect_stdout(io.StringIO()):
        preprocess_data.main(list(map(str, arguments)))
    assert len(IndexedDataset(str(directory / "data"))) > 0


def use_corpus_for_evaluation(directory: Path) -> None:
    tokenizer = DocumentTokenizer(tokenizer_of(directory.parent / "model"))
    path = directory / "corpus.jsonl"
    texts = evaluation_documents.read_texts(path, "text", solution_only=True, limit=None)
    table = [b"x"] * 400
    try:
        evaluation_documents.tokenize(texts, tokenizer, table)
    except ValueError as error:
        # It knows the texts only, and names their flag.
        raise ValueError(str(error).replace("--data ", f"--data {path} ")) from None


# Models and checkpoints


def prepare_model(directory: Path) -> dict[str, bytes]:
    write_member("end only", directory / "source")
    return {"source/config.json": (directory / "source/config.json").read_bytes()}


def prepare_weights(directory: Path) -> dict[str, bytes]:
    write_member("end only", directory / "source")
    return {
        "source/model.safetensors": (directory / "source/model.safetensors").read_bytes(),
        "source/tokenizer_config.json": (directory / "source/tokenizer_config.json").read_bytes(),
    }


def use_model(directory: Path) -> None:
    words = ["to-megatron", "--source", directory / "source", "--target", directory / "megatron"]
    with contextlib.redirect_stdout(io.StringIO()):
        convert_checkpoint.main(list(map(str, words)))
    shape = convert_checkpoint.shape_of(directory / "megatron/huggingface")
    assert 0 < shape.norm_epsilon < math.inf
    assert 0 < shape.rotary_base < 2**63
    for name, weight in load_file(directory / "source/model.safetensors").items():
        assert weight.isfinite().all(), name
    convert_checkpoint.main(
        [
            "to-huggingface",
            "--source",
            str(directory / "megatron"),
            "--target",
            str(directory / "back"),
        ]
    )


def names_of_model(directory: Path, file: str) -> list[str]:
    return [Path(file).name, str(directory / "source")]


def weights_file(file: str, content: bytes) -> strategies.SearchStrategy[bytes]:
    """A header with other values, of the right length or not, or other bytes in its place."""
    if not file.endswith(".safetensors"):
        return damaged_json(json.loads(content))
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]

    def with_length(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + data

    values = damaged_value(header).map(str.encode).map(with_length)
    return strategies.one_of(
        values,
        values,
        damaged_bytes(content[8 : 8 + length]).map(with_length),
        damaged_bytes(content[: 8 + length]).map(lambda head: head + data),
        damaged_bytes(content),
    )


METADATA = ("release/.metadata", "release/metadata.json", "latest_checkpointed_iteration.txt")
METADATA += ("huggingface/config.json", "release/common.pt")


def prepare_checkpoint(directory: Path) -> dict[str, bytes]:
    write_member("end only", directory.parent / "model")
    convert_checkpoint.to_megatron(directory.parent / "model", directory / "megatron")
    # A run's own checkpoint may hold its common state in a file of its own.
    torch.save(
        {"iteration": 0, "args": Namespace(load="x")},
        directory / "megatron/release/common.pt",
    )
    return {f"megatron/{name}": (directory / "megatron" / name).read_bytes() for name in METADATA}


def metadata_file(file: str, content: bytes) -> strategies.SearchStrategy[bytes]:
    if file.endswith(".json"):
        return damaged_json(json.loads(content))
    if file.endswith(".txt"):
        words = ["", "release\n", "-1", "1e3", "\0", "²", "9" * 5000, "x" * 300, "../..", "0"]
        words = strategies.sampled_from(words).map(str.encode)
        return strategies.one_of(words, damaged_bytes(content))
    return damaged_bytes(content)


def use_checkpoint(directory: Path) -> None:
    words = ["to-huggingface", "--source", directory / "megatron", "--target", directory / "back"]
    convert_checkpoint.main(list(map(str, words)))
    assert (directory / "back/model.safetensors").exists()


def names_of_checkpoint(directory: Path, file: str) -> list[str]:
    return [Path(file).name, str(directory / "megatron")]


# Evaluations and metrics


COMMON_SETTINGS = {"seq_length": 4, "positions_per_document": 2, "solution_only": False}
COMMON_SETTINGS |= {"positions": "uncertain"}
COMMON_SETTINGS |= {"entropy_top_k": 0, "load": "x", "template": "inline", "greedy": False}


def prepare_evaluation(directory: Path) -> dict[str, bytes]:
    records = []
    for line in (1, 2, 3):
        digest = evaluation_documents.Document(line, [1, 2, 3, line], 0, file="corpus").digest
        lists = {name: [1, 0] for name in ("thought", "thought_length", "well_formed")}
        lists |= {name: [0, 1] for name in ("closed_by_itself", "no_thought")}
        lists |= {"no_thought_well_formed": [1, 1], "positions": [2, 3]}
        records.append(record("-012", "-101", file="corpus", line=line, id=digest, **lists))
    measured = evaluation.Measured(settings() | COMMON_SETTINGS, records)
    evaluation.write_output(directory / "good.json", measured, 1.0)
    return {"other.json": (directory / "good.json").read_bytes()}


def evaluation_file(file: str, content: bytes) -> strategies.SearchStrategy[bytes]:
    return strategies.one_of(damaged_json(json.loads(content)), damaged_bytes(content))


def use_evaluation(directory: Path) -> None:
    assert evaluation.compare([directory / "good.json", directory / "other.json"])


def prepare_positions(directory: Path) -> dict[str, bytes]:
    """A checkpoint without weights, and what was evaluated on the corpus."""
    contents = prepare_evaluation(directory)
    (directory / "latest_checkpointed_iteration.txt").write_text("release")
    (directory / "model_flags.txt").write_text("--num-layers 1")
    lines = (json.dumps({"text": text}) + "\n" for text in TEXTS[:3])
    (directory / "corpus.jsonl").write_text("".join(lines))
    return contents


class ModelIsLoadedError(Exception):
    """What comes before the model went well."""


def use_positions(directory: Path) -> None:
    earlier = directory / "other.json"
    words = ["--load", directory, "--data", directory / "corpus.jsonl", "--positions-from", earlier]
    words += ["--output", directory / "later.json"]
    flags, others = evaluate.build_parser().parse_known_args(list(map(str, words)))
    with (
        mock.patch.object(evaluate, "start_mid_training", side_effect=ModelIsLoadedError),
        contextlib.suppress(ModelIsLoadedError),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        evaluate.evaluate(flags, others)
    documents = [
        evaluation_documents.Document(line, [1, 2, 3, line], 0, file="corpus") for line in (1, 2, 3)
    ]
    evaluation_documents.documents_of(evaluation.read_output(earlier), earlier, documents)


def metrics_line(iteration: int) -> dict[str, Any]:
    return {"iteration": iteration, "match rate": 0.5, "budget": 6, "ntp loss": 3.0, "reward": None}


def prepare_metrics(directory: Path) -> dict[str, bytes]:
    lines = [json.dumps(metrics_line(iteration)).encode() + b"\n" for iteration in range(1, 5)]
    return {"metrics.jsonl": b"".join(lines)}


def use_metrics(directory: Path) -> None:
    words = [directory / "metrics.jsonl", "--output", directory / "curves.svg"]
    with contextlib.redirect_stdout(io.StringIO()):
        plot_curves.main(list(map(str, words)))
    assert (directory / "curves.svg").stat().st_size > 0
    plot_curves.plt.close("all")


def lines_of_file(file: str, content: bytes) -> strategies.SearchStrategy[bytes]:
    return damaged_lines([json.loads(line) for line in content.splitlines()])


def json_file(file: str, content: bytes) -> strategies.SearchStrategy[bytes]:
    return damaged_json(json.loads(content))


SORTS: dict[str, Sort] = {
    "settings": Sort(lambda directory: {"settings.yaml": SETTINGS}, yaml_file, use_settings),
    "template": Sort(prepare_template, json_file, use_template),
    "corpus": Sort(prepare_corpus, lines_of_file, use_corpus_for_training),
    "held-out corpus": Sort(prepare_corpus, lines_of_file, use_corpus_for_evaluation),
    "config.json": Sort(prepare_model, json_file, use_model, names_of_model),
    "weights": Sort(prepare_weights, weights_file, use_model, names_of_model),
    "checkpoint": Sort(prepare_checkpoint, metadata_file, use_checkpoint, names_of_checkpoint),
    "evaluation": Sort(prepare_evaluation, evaluation_file, use_evaluation),
    "positions": Sort(prepare_positions, evaluation_file, use_positions),
    "metrics": Sort(prepare_metrics, lines_of_file, use_metrics),
}


@pytest.mark.parametrize("sort", SORTS)
def test_a_damaged_input_is_taken_or_refused_in_one_sentence_that_names_it(
    sort: str, tmp_path: Path
):
    fuzz(SORTS[sort], tmp_path, examples=100)


@pytest.mark.slow
@pytest.mark.parametrize("sort", SORTS)
def test_a_thousand_damaged_inputs_are_taken_or_refused_in_one_sentence(sort: str, tmp_path: Path):
    fuzz(SORTS[sort], tmp_path, examples=1000)
