"""Tokenize documents into the ``.bin`` and ``.idx`` files that Megatron trains on.

    python tools/preprocess_data.py --input train.jsonl --output-prefix data/train \\
        --tokenizer path/to/tokenizer

writes ``data/train.bin`` and ``data/train.idx``, to be named ``--data-path data/train`` in
training. Each line of the input is a JSON object whose ``text`` (or ``--json-key``) is one
document; so is each row of a Parquet file. Inputs may be compressed, and folders of shards (see
``corpus_files.py``). The tokenizer is Megatron's own, so ids, special tokens that the tokenizer
adds (a beginning of sequence, say) and the end-of-document token are those that training will use:
``--tokenizer-type HuggingFaceTokenizer`` for a directory or a name on the Hugging Face hub,
``--tokenizer-type SentencePieceTokenizer`` for a file ``*.model``; for both the end of a document
is the tokenizer's end-of-sequence token.

The two files appear under their names only when they are complete. Until then they are
``data/train.partial.bin`` and ``.idx``, which one process writes at a time; what a killed one left
there is written over by the next.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

import numpy as np
from tqdm import tqdm

from corpus_files import files_of, read_corpus
from document_tokens import SPECIAL_TOKENS, DocumentTokenizer, SpecialTokens
from megatron_rmt.job import console
from megatron_rmt.prompt.ids_of_text import CHARACTERS, DOCUMENTS, check_ids_are_text
from token_file_output import check_output, partial_files, replace_both, writing

DOCUMENTS_PER_BATCH = 64
CHARACTERS_PER_BATCH = 2**20
# Characters of a batch that goes to another process.
LONGEST_SENT = 2**23


@dataclass(frozen=True)
class Summary:
    """What was written.

    ``text_bytes`` counts the UTF-8 bytes of the documents, ``tokens`` the ids in the ``.bin`` file
    (ends of documents included), ``empty`` the documents left out because they had no text.
    ``special_tokens`` says in a line how many special tokens the texts spell out; "" for none.
    """

    documents: int
    tokens: int
    text_bytes: int
    empty: int
    dtype: str
    special_tokens: str = ""


@dataclass(frozen=True)
class Document:
    """A text and where it stands, ``file:line``."""

    text: str
    place: str


@dataclass(frozen=True)
class Batch:
    """Some documents in a row, their characters, and the bytes that were read for them."""

    documents: list[Document]
    characters: int
    read: int


@dataclass(frozen=True)
class EncodedBatch:
    """A batch, and for each document its token ids in pieces (int32 ``[tokens]``), in order.

    The pieces of a long document are made while they are taken, once.
    """

    batch: Batch
    ids: Iterable[Iterable[np.ndarray]]


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
            f"--tokenizer {name} has no end-of-sequence token to end documents with; name one of "
            'its tokens as "eos_token" in its tokenizer_config.json (--no-append-eod would join '
            "the documents without any end)."
        )
    return token_id


def check_tokenizer(tokenizer: Any, name: str, inputs: Sequence[Path], json_key: str) -> None:
    """Check on the first documents of each input that the ids are the text.

    Raises:
        ValueError: they are not, or see ``read_batches``.
    """
    first = (itertools.islice(read_corpus(path, [json_key]), DOCUMENTS) for path in inputs)
    texts = [row.text(json_key)[:CHARACTERS] for row in itertools.chain.from_iterable(first)]
    try:
        check_ids_are_text(tokenizer, texts)
    except ValueError as error:
        raise ValueError(f"--tokenizer {name}: {error}") from None


def read_batches(
    paths: Sequence[Path], json_key: str, tokenizer: DocumentTokenizer
) -> Iterator[Batch]:
    """The documents of the files in order, some ``CHARACTERS_PER_BATCH`` at a time.

    Raises:
        ValueError: with file and line, for a line that is no document (``json_lines``) or spells
            out a special token that ``tokenizer`` refuses; or a file without documents.
    """
    for path in paths:
        documents: list[Document] = []
        characters = position = before = 0
        found = False
        for row in read_corpus(path, [json_key]):
            document = Document(row.text(json_key), row.place)
            tokenizer.note_special_tokens(document.text, document.place)
            documents.append(document)
            characters += len(document.text)
            position, found = row.position, True
            # A row of a long text goes with it.
            del row, document
            if len(documents) == DOCUMENTS_PER_BATCH or characters >= CHARACTERS_PER_BATCH:
                yield Batch(documents, characters, position - before)
                documents, characters, before = [], 0, position
        if not found:
            raise ValueError(f"{path} holds no documents; remove it from --input.")
        yield Batch(documents, characters, position - before)


def encode_document(
    tokenizer: DocumentTokenizer, document: Document, eod: int | None
) -> Iterator[np.ndarray]:
    """Token ids in pieces, int32 ``[tokens]`` each, ended by ``eod`` once unless it is None."""
    last = None
    for ids in tokenizer.encode(document.text, document.place):
        if ids:
            last = ids[-1]
            yield np.asarray(ids, dtype=np.int32)
    # Some tokenizers end every text themselves.
    if last is not None and eod is not None and last != eod:
        yield np.asarray([eod], dtype=np.int32)


def _work(
    connection: Connection, name: str, special_tokens: SpecialTokens, eod: int | None
) -> None:
    """Encode the documents that come, until the process at the other end has ended."""
    # Ctrl-C reaches all processes of a terminal; the first of them ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, ConnectionError):
        tokenizer = DocumentTokenizer(load_tokenizer(name), special_tokens)
        while True:
            documents = connection.recv()
            try:
                ids = [list(encode_document(tokenizer, document, eod)) for document in documents]
            except Exception as error:
                connection.send(ValueError(str(error)))
            else:
                connection.send(ids)


@contextlib.contextmanager
def _worker_pool(
    workers: int, name: str, special_tokens: SpecialTokens, eod: int | None
) -> Iterator[Callable[[list[Document]], Future[list[list[np.ndarray]]]]]:
    """Processes that tokenize, each behind a thread, and the function that gives them documents.

    In the end they are killed, whatever they do. (A ``ProcessPoolExecutor`` waits for ever for the
    rest of a result whose sender was killed.)

    Raises:
        ValueError: one of them was killed, or could not be started.
    """
    # This process may have threads, so that a fork of it could hang; the server has none, and
    # imports for all workers once.
    context = get_context("forkserver")
    context.set_forkserver_preload(["transformers", "megatron.core.tokenizers"])
    processes: list[BaseProcess] = []
    idle: SimpleQueue[Connection] = SimpleQueue()

    def encode(documents: list[Document]) -> list[list[np.ndarray]]:
        connection = idle.get()
        try:
            connection.send(documents)
            result = connection.recv()
        finally:
            idle.put(connection)
        if isinstance(result, ValueError):
            raise result
        return result

    threads = ThreadPoolExecutor(workers)
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            with theirs:
                arguments = (theirs, name, special_tokens, eod)
                processes.append(context.Process(target=_work, args=arguments, daemon=True))
                processes[-1].start()
            idle.put(ours)
        yield functools.partial(threads.submit, encode)
    except (EOFError, OSError):
        raise ValueError(
            f"--workers {workers}: one of the processes was killed or could not be started, most "
            "often for want of memory; pass fewer."
        ) from None
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
        threads.shutdown(cancel_futures=True)


def encode_batches(
    batches: Iterable[Batch],
    tokenizer: DocumentTokenizer,
    name: str,
    eod: int | None,
    workers: int,
) -> Iterator[EncodedBatch]:
    """Each batch with its token ids, in order; a few million characters are read ahead at most.

    A check of the first documents' ids against their texts goes between this and what writes them.

    Raises:
        ValueError: a document cannot be encoded, or a worker died.
    """

    def encode_here(batch: Batch) -> Iterator[Iterator[np.ndarray]]:
        return (encode_document(tokenizer, document, eod) for document in batch.documents)

    if workers == 1:
        for batch in batches:
            yield EncodedBatch(batch, encode_here(batch))
            del batch
        return
    with _worker_pool(workers, name, tokenizer.special_tokens, eod) as start:
        pending: deque[tuple[Batch, Callable[[], Iterable[Iterable[np.ndarray]]]]] = deque()

        def oldest() -> EncodedBatch:
            batch, result = pending.popleft()
            return EncodedBatch(batch, result())

        for batch in batches:
            while pending and (
                len(pending) > 2 * workers
                or sum(other.characters for other, _ in pending) + batch.characters
                > 2 * workers * CHARACTERS_PER_BATCH
            ):
                yield oldest()
            if batch.characters > LONGEST_SENT:
                # Sent to another process and back it would be in memory several times.
                pending.append((batch, functools.partial(encode_here, batch)))
            else:
                pending.append((batch, start(batch.documents).result))
        while pending:
            yield oldest()


def preprocess(
    inputs: Sequence[Path],
    output_prefix: str,
    tokenizer_name: str,
    json_key: str = "text",
    append_eod: bool = True,
    workers: int = 1,
    overwrite: bool = False,
    special_tokens: SpecialTokens = "plain",
) -> Summary:
    """Tokenize ``inputs`` into ``output_prefix`` + ``.bin`` and ``.idx``.

    ``workers`` processes tokenize; the output does not depend on their number. The ids are stored
    as uint16 where the vocabulary allows it (Megatron's ``DType.optimal_dtype``), else as int32.

    Raises:
        ValueError: an input, the tokenizer or an argument is not as it must be, the output is there
            already and ``overwrite`` is false or cannot be written, or a worker was killed. The
            output is then left as it was.
    """
    if workers < 1:
        raise ValueError(f"--workers is {workers}; it must be 1 or more.")
    try:
        inputs, left_out = files_of(inputs)
    except ValueError as error:
        raise ValueError(f"--input {error}") from None
    if left_out:
        print(f"--input leaves out: {', '.join(map(str, left_out))}", file=sys.stderr)
    for path in inputs:
        if not os.path.isfile(path):
            raise ValueError(f"--input {path} is not a file; give an existing file or folder.")
    with writing(output_prefix):
        final = check_output(output_prefix, inputs, overwrite)
    loaded = load_tokenizer(tokenizer_name)
    eod = end_of_document(loaded, tokenizer_name) if append_eod else None
    check_tokenizer(loaded, tokenizer_name, inputs, json_key)
    # Reads special tokens in texts as it is told from now on, so it comes after the check.
    tokenizer = DocumentTokenizer(loaded, special_tokens)

    with contextlib.ExitStack() as stack:
        batches = read_batches(inputs, json_key, tokenizer)
        encoded = encode_batches(batches, tokenizer, tokenizer_name, eod, workers)
        size = sum(path.stat().st_size for path in inputs)
        partial = stack.enter_context(partial_files(output_prefix))
        stack.enter_context(contextlib.closing(encoded))
        progress = stack.enter_context(
            tqdm(total=size, unit="B", unit_scale=True, desc="tokenizing", disable=None)
        )
        summary = _write(encoded, partial, output_prefix, loaded.vocab_size, progress)
        if summary.documents == 0:
            raise ValueError(f"{inputs[0]}: every document is empty; nothing to train on.")
        replace_both(partial, final, output_prefix)
    return dataclasses.replace(summary, special_tokens=tokenizer.report())


def _write(
    encoded: Iterable[EncodedBatch],
    paths: dict[str, Path],
    prefix: str,
    vocab_size: int,
    progress: Any,
) -> Summary:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(vocab_size)
    with writing(prefix):
        builder = IndexedDatasetBuilder(str(paths["bin"]), dtype=dtype)
    documents = tokens = text_bytes = empty = 0
    try:
        for one in encoded:
            for document, pieces in zip(one.batch.documents, one.ids, strict=True):
                length = _write_tokens(builder, pieces, document.place, prefix)
                if length:
                    documents += 1
                    tokens += length
                    text_bytes += len(document.text.encode())
                else:
                    empty += 1
                # The next batch is read without the memory of this one.
                del document, pieces
            progress.update(one.batch.read)
            del one
        with writing(prefix):
            builder.finalize(str(paths["idx"]))
    finally:
        with contextlib.suppress(OSError):
            builder.data_file.close()
    return Summary(documents, tokens, text_bytes, empty, dtype.__name__)


def _write_tokens(builder: Any, pieces: Iterable[np.ndarray], place: str, prefix: str) -> int:
    """Write a document as one sequence, piece by piece, and return its tokens; 0 writes none."""
    length = 0
    for ids in pieces:
        if ids.max() > np.iinfo(builder.dtype).max:
            raise ValueError(
                f"{place}: the tokenizer's ids, {ids.max()} here, go beyond the number of its "
                "tokens; give one without holes in its vocabulary."
            )
        with writing(prefix):
            builder.data_file.write(ids.astype(builder.dtype).tobytes())
        length += ids.size
    if length:
        # Its tokens are in the file already.
        builder.add_document(np.empty(0), [length])
    return length


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, by the names of ``preprocess``'s parameters."""
    parser = argparse.ArgumentParser(
        description="Tokenize documents into Megatron's .bin and .idx files."
    )
    add = functools.partial(parser.add_argument, required=True)
    add(
        "--input",
        dest="inputs",
        nargs="+",
        type=Path,
        help="files of JSON lines, also .gz, .bz2, .xz or .zst, or Parquet, or folders of them",
    )
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
    add(
        "--special-tokens",
        choices=SPECIAL_TOKENS,
        default="plain",
        help="what a special token is that a text spells out, such as <|endoftext|>: plain text, "
        "the special token (which may end the document), or refused (default: plain)",
    )
    add("--workers", type=int, default=1, help="processes that tokenize (default: 1)")
    add("--overwrite", action="store_true", help="replace an output that is there already")
    return parser.parse_args(argv)


class Stopped(BaseException):
    """A signal asked this process to end; ``args`` is its number."""


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise ``Stopped`` once, so that what is left is cleaned up."""

    def stop(number: int, frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # What the caller ignores (nohup) stays ignored.
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> None:
    """Preprocess; what goes wrong ends it with one sentence."""
    arguments = parse_arguments(argv)
    try:
        with stopped_by_signals():
            summary = preprocess(**vars(arguments))
    except ValueError as error:
        raise SystemExit(f"preprocess_data: {error}") from None
    except MemoryError:
        raise SystemExit("preprocess_data: memory ran out; pass fewer --workers.") from None
    except Stopped as stopped:
        (number,) = stopped.args
        name = signal.Signals(number).name
        print(f"preprocess_data: stopped by {name}; nothing was written.", file=sys.stderr)
        raise SystemExit(128 + number) from None
    left_out = f" ({summary.empty} empty ones left out)" if summary.empty else ""
    print(
        f"{summary.documents} documents{left_out}, {summary.tokens} tokens, "
        f"{summary.tokens / summary.text_bytes:.3f} tokens per byte, stored as {summary.dtype} in "
        f"{arguments.output_prefix}.bin and .idx"
    )
    if summary.special_tokens:
        print(summary.special_tokens)
    cache = Path(arguments.output_prefix, "cache")
    if arguments.overwrite and cache.is_dir():
        print(
            f"delete {cache}: Megatron keeps there the sample order of the data that was replaced, "
            "and would read the new data with it"
        )


if __name__ == "__main__":
    console.leave_out_library_warnings()
    main()
