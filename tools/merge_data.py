"""Put token files that were made apart, such as one for each node, together into one pair.

    python tools/merge_data.py --input data/part-0 data/part-1 --output-prefix data/train

The documents stand in the order of the inputs, each of which is the prefix of a ``.bin`` and
``.idx`` file, tokenized with the same tokenizer. The two files appear under their names only when
they are complete.
"""

import argparse
from collections.abc import Sequence

from megatron_rmt.job import console
from megatron_rmt.job.data_files import Index, TokenFile, damage
from token_file_output import check_output, partial_files, replace_both, writing


def merge(inputs: Sequence[str], output_prefix: str, overwrite: bool = False) -> tuple[int, int]:
    """Write the token files ``inputs`` into one; (documents, tokens) of it.

    Raises:
        ValueError: an input is missing, damaged, or stores its tokens in another type than the
            first, or the output is there already or cannot be written.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    files = [TokenFile("--input", prefix) for prefix in inputs]
    for file in files:
        for path in (file.index, file.tokens):
            if not path.is_file():
                raise ValueError(f"--input {file.prefix}: there is no {path}; pass a prefix.")
        if problem := damage(file):
            raise ValueError(problem)
    dtypes = [Index.of(file).dtype for file in files]
    for file, dtype in zip(files, dtypes, strict=True):
        if dtype != dtypes[0]:
            raise ValueError(
                f"--input {file.prefix} stores tokens as {dtype}, but {inputs[0]} as {dtypes[0]}; "
                "tokenize both with the same tokenizer."
            )
    with writing(output_prefix):
        sources = [path for file in files for path in (file.index, file.tokens)]
        final = check_output(output_prefix, sources, overwrite)
    with partial_files(output_prefix) as partial:
        with writing(output_prefix):
            builder = IndexedDatasetBuilder(str(partial["bin"]), dtype=dtypes[0].type)
            for file in files:
                builder.add_index(file.prefix)
            builder.finalize(str(partial["idx"]))
        merged = Index.of(TokenFile("--output-prefix", f"{output_prefix}.partial"))
        replace_both(partial, final, output_prefix)
    return len(merged.documents) - 1, int(merged.lengths.sum())


def main(argv: Sequence[str] | None = None) -> None:
    """Merge; what goes wrong ends it with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--input", dest="inputs", nargs="+", required=True, help="prefixes of .bin and .idx files")
    add("--output-prefix", required=True, help="writes PREFIX.bin and PREFIX.idx")
    add("--overwrite", action="store_true", help="replace an output that is there already")
    arguments = parser.parse_args(argv)
    try:
        documents, tokens = merge(**vars(arguments))
    except ValueError as error:
        raise SystemExit(f"merge_data: {error}") from None
    prefix = arguments.output_prefix
    print(f"{documents} documents, {tokens} tokens in {prefix}.bin and .idx")


if __name__ == "__main__":
    console.leave_out_library_warnings()
    main()
