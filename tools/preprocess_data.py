"""Tokenize JSONL documents into the ``.bin`` and ``.idx`` files that Megatron trains on.

    python tools/preprocess_data.py --input train.jsonl --output-prefix data/train \\
        --tokenizer path/to/tokenizer

writes ``data/train.bin`` and ``data/train.idx``, to be named ``--data-path data/train`` in
training. Each line of the input is a JSON object whose ``text`` (or ``--json-key``) is one
document. The tokenizer is Megatron's own, so ids, special tokens that the tokenizer adds (a
beginning of sequence, say) and the end-of-document token are those that training will use:
``--tokenizer-type HuggingFaceTokenizer`` for a directory or a name on the Hugging Face hub,
``--tokenizer-type SentencePieceTokenizer`` for a file ``*.model``; for both the end of a document
is the tokenizer's end-of-sequence token.

The two files appear under their names only when they are complete.
"""

import argparse
import functools
import itertools
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_rmt.job import console
from megatron_rmt.prompt.ids_of_text import DOCUMENTS, check_ids_are_text

DOCUMENTS_PER_BATCH = 64


@dataclass(frozen=True)
class Summary:
    """What was written.

    ``text_bytes`` counts the UTF-8 bytes of the documents, ``tokens`` the ids in the ``.bin`` file
    (ends of documents included), ``empty`` the documents left out because they had no text.
    """

    documents: int
    tokens: int
    text_bytes: int
    empty: int
    dtype: str


@dataclass(frozen=True)
class Batch:
    """Some documents in a row and how many bytes of input lines they took."""

    texts: list[str]
    line_bytes: int


def load_tokenizer(name: str) -> Any:
    """Megatron's tokenizer for a directory, a hub name or a sentencepiece ``.model`` file.

    Raises:
        ValueError: there is nothing there, or it is no tokenizer.
    """
    import transformers
    from megatron.core.tokenizers import MegatronTokenizer

    # Documents may be longer than a model's context; that is no news here.
    transformers.utils.logging.set_verbosity_error()
    path = Path(name)
    if path.is_file() and path.suffix != ".model":
        raise ValueError(
            f"--tokenizer {name} is a file but not a sentencepiece *.model; give the directory "
            "that holds tokenizer.json instead."
        )
    if not path.exists() and (path.suffix == ".model" or path.is_absolute()):
        raise ValueError(f"--tokenizer {name} does not exist; give an existing path.")
    library = "sentencepiece" if path.is_file() else "huggingface"
    try:
        return MegatronTokenizer.from_pretrained(name, metadata_path={"library": library})
    except Exception as error:
        raise ValueError(
            f"--tokenizer {name} could not be loaded as a {library} tokenizer "
            f"({str(error).strip().splitlines()[0]}); give a directory with tokenizer.json, a hub "
            "name, or a sentencepiece *.model file."
        ) from error


def end_of_document(tokenizer: Any, name: str) -> int:
    """The id that Megatron's datasets take for the end of a document.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    token_id = tokenizer.eod
    if token_id is None or token_id < 0:
        raise ValueError(
            f"--tokenizer {name} has no end-of-sequence token to end documents with; "
            "set its eos_token, or pass --no-append-eod."
        )
    return token_id


def check_tokenizer(tokenizer: Any, name: str, inputs: Sequence[Path], json_key: str) -> None:
    """Check on the first documents of each input that the ids are the text.

    Raises:
        ValueError: they are not, or see ``read_batches``.
    """
    first = [next(read_batches([path], json_key)).texts[:DOCUMENTS] for path in inputs]
    try:
        check_ids_are_text(tokenizer, itertools.chain(*first))
    except ValueError as error:
        raise ValueError(f"--tokenizer {name}: {error}") from None


def read_batches(paths: Sequence[Path], json_key: str) -> Iterator[Batch]:
    """The documents of the files in order; blank lines are skipped.

    Raises:
        ValueError: with file and line, for a line that is not JSON or not UTF-8, not an object, has
            no ``json_key``, or holds something other than text there; or a file without documents.
    """
    for path in paths:
        texts: list[str] = []
        line_bytes = 0
        found = False
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                line_bytes += len(line)
                if line.strip():
                    texts.append(_document(line, f"{path}:{number}", json_key))
                    found = True
                if len(texts) == DOCUMENTS_PER_BATCH:
                    yield Batch(texts, line_bytes)
                    texts, line_bytes = [], 0
        if not found:
            raise ValueError(f"{path} holds no documents; remove it from --input.")
        yield Batch(texts, line_bytes)


def _document(line: bytes, place: str, json_key: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place}: not valid JSON ({error.msg} at column {error.colno}); "
            "each line must be one JSON object."
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not valid UTF-8 ({error.reason}); convert the file.") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a {type(row).__name__}, but each line must be a JSON object.")
    if json_key not in row:
        raise ValueError(
            f"{place}: no key {json_key!r} among {sorted(row)}; name the key of the text with "
            "--json-key."
        )
    text = row[json_key]
    if not isinstance(text, str):
        raise ValueError(
            f"{place}: {json_key!r} is a {type(text).__name__}, but must be a string; "
            "fix the line or choose another --json-key."
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{place}: {json_key!r} holds half of a surrogate pair, which is no text; fix the line."
        ) from None
    return text


def encode_documents(tokenizer: Any, texts: Iterable[str], eod: int | None) -> list[np.ndarray]:
    """Token ids of each text, ended by ``eod`` once unless it is None."""
    encoded = []
    for text in texts:
        ids = tokenizer.tokenize(text) if text else []
        # Some tokenizers end every text themselves.
        if ids and eod is not None and ids[-1] != eod:
            ids = [*ids, eod]
        encoded.append(np.asarray(ids, dtype=np.int64))
    return encoded


_worker_state: tuple[Any, int | None]


def _start_worker(name: str, eod: int | None) -> None:
    global _worker_state
    _worker_state = (load_tokenizer(name), eod)


def _encode_in_worker(texts: list[str]) -> list[np.ndarray]:
    tokenizer, eod = _worker_state
    return encode_documents(tokenizer, texts, eod)


def encode_batches(
    batches: Iterable[Batch], tokenizer: Any, name: str, eod: int | None, workers: int
) -> Iterator[tuple[Batch, list[np.ndarray]]]:
    """Each batch with its token ids, in order; at most a few batches are in memory at a time."""
    if workers == 1:
        for batch in batches:
            yield batch, encode_documents(tokenizer, batch.texts, eod)
        return
    # This process may have threads, so that a fork of it could hang; the server has none, and
    # imports for all workers once.
    context = get_context("forkserver")
    context.set_forkserver_preload(["transformers", "megatron.core.tokenizers"])
    with ProcessPoolExecutor(workers, context, _start_worker, (name, eod)) as pool:
        pending: deque[tuple[Batch, Any]] = deque()
        for batch in batches:
            pending.append((batch, pool.submit(_encode_in_worker, batch.texts)))
            if len(pending) > 2 * workers:
                first, future = pending.popleft()
                yield first, future.result()
        for batch, future in pending:
            yield batch, future.result()


def preprocess(
    inputs: Sequence[Path],
    output_prefix: str,
    tokenizer_name: str,
    json_key: str = "text",
    append_eod: bool = True,
    workers: int = 1,
    overwrite: bool = False,
) -> Summary:
    """Tokenize ``inputs`` into ``output_prefix`` + ``.bin`` and ``.idx``.

    ``workers`` processes tokenize; the output does not depend on their number. The ids are stored
    as uint16 where the vocabulary allows it (Megatron's ``DType.optimal_dtype``), else as int32.

    Raises:
        ValueError: an input, the tokenizer or an argument is not as it must be, or the output is
            there already and ``overwrite`` is false. The output is then left as it was.
    """
    if workers < 1:
        raise ValueError(f"--workers is {workers}; it must be 1 or more.")
    for path in inputs:
        if not path.is_file():
            raise ValueError(f"--input {path} is not a file; give an existing JSONL file.")
    final = {kind: Path(f"{output_prefix}.{kind}") for kind in ("bin", "idx")}
    if not overwrite and any(path.exists() for path in final.values()):
        raise ValueError(
            f"--output-prefix {output_prefix}: {output_prefix}.bin or .idx exists; choose another "
            "prefix, or pass --overwrite."
        )
    tokenizer = load_tokenizer(tokenizer_name)
    eod = end_of_document(tokenizer, tokenizer_name) if append_eod else None

    final["bin"].parent.mkdir(parents=True, exist_ok=True)
    partial = {kind: Path(f"{output_prefix}.{os.getpid()}.partial.{kind}") for kind in final}
    try:
        check_tokenizer(tokenizer, tokenizer_name, inputs, json_key)
        batches = read_batches(inputs, json_key)
        encoded = encode_batches(batches, tokenizer, tokenizer_name, eod, workers)
        size = sum(path.stat().st_size for path in inputs)
        with tqdm(
            total=size, unit="B", unit_scale=True, desc="tokenizing", disable=None
        ) as progress:
            summary = _write(encoded, partial, tokenizer.vocab_size, progress)
        if summary.documents == 0:
            raise ValueError(f"{inputs[0]}: every document is empty; nothing to train on.")
        # An index never stands beside the tokens of another run, even if this is interrupted.
        final["idx"].unlink(missing_ok=True)
        partial["bin"].replace(final["bin"])
        partial["idx"].replace(final["idx"])
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return summary


def _write(
    encoded: Iterable[tuple[Batch, list[np.ndarray]]],
    paths: dict[str, Path],
    vocab_size: int,
    progress: Any,
) -> Summary:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(str(paths["bin"]), dtype=dtype)
    documents = tokens = text_bytes = empty = 0
    try:
        for batch, documents_ids in encoded:
            for text, ids in zip(batch.texts, documents_ids, strict=True):
                if ids.size == 0:
                    empty += 1
                    continue
                builder.add_document(ids, [ids.size])
                documents += 1
                tokens += ids.size
                text_bytes += len(text.encode())
            progress.update(batch.line_bytes)
    finally:
        builder.data_file.close()
    builder.finalize(str(paths["idx"]))
    return Summary(documents, tokens, text_bytes, empty, dtype.__name__)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, by the names of ``preprocess``'s parameters."""
    parser = argparse.ArgumentParser(
        description="Tokenize JSONL documents into Megatron's .bin and .idx files."
    )
    add = functools.partial(parser.add_argument, required=True)
    add("--input", dest="inputs", nargs="+", type=Path, metavar="JSONL", help="one or more files")
    add("--output-prefix", help="writes PREFIX.bin and PREFIX.idx; training's --data-path")
    add(
        "--tokenizer",
        dest="tokenizer_name",
        metavar="TOKENIZER",
        help="a directory with tokenizer.json, a name on the Hugging Face hub, or a "
        "sentencepiece *.model file",
    )
    add = parser.add_argument
    add("--json-key", default="text", help="the key of the document in each line (default: text)")
    add(
        "--no-append-eod",
        dest="append_eod",
        action="store_false",
        help="do not end each document with the end-of-document token",
    )
    add("--workers", type=int, default=1, help="processes that tokenize (default: 1)")
    add("--overwrite", action="store_true", help="replace an output that is there already")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    try:
        summary = preprocess(**vars(arguments))
    except ValueError as error:
        raise SystemExit(f"preprocess_data: {error}") from None
    left_out = f" ({summary.empty} empty ones left out)" if summary.empty else ""
    print(
        f"{summary.documents} documents{left_out}, {summary.tokens} tokens, "
        f"{summary.tokens / summary.text_bytes:.3f} tokens per byte, stored as {summary.dtype} in "
        f"{arguments.output_prefix}.bin and .idx"
    )
    cache = Path(arguments.output_prefix, "cache")
    if arguments.overwrite and cache.is_dir():
        print(
            f"delete {cache}: Megatron keeps there the sample order of the data that was replaced, "
            "and would read the new data with it"
        )


if __name__ == "__main__":
    console.leave_out_library_warnings()
    main()
