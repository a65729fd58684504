"""The model that a tool works with: a checkpoint's flags, and Megatron started with them.

Megatron must not be imported before the CPU stands in for CUDA where there is none, so this module
imports it in ``start_megatron`` only; what a tool imports after that may import it as usual.
"""

import argparse
import contextlib
import io
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rmt.job import console

if TYPE_CHECKING:
    from megatron_rmt.mid_training import MidTraining
    from megatron_rmt.model.gpt import Model

# What a converted checkpoint holds beside the weights: Megatron's model flags in one line, and the
# folder of config.json and tokenizer.
FLAGS, HUGGINGFACE = "model_flags.txt", "huggingface"
# Megatron loads weights as a run does that starts from them, and trains nothing.
_LOADING = (
    "--finetune --no-load-optim --no-load-rng --exit-on-missing-checkpoint --no-initialization "
    "--ckpt-format torch_dist --micro-batch-size 1 --train-iters 1 --lr 1e-5"
)


def model_flags(load: Path, flags_from: Path | None) -> list[str]:
    """Megatron's flags of the model, as the converter stored them.

    Raises:
        ValueError: there is no checkpoint, or no flags.
    """
    if not (load / "latest_checkpointed_iteration.txt").is_file():
        raise ValueError(
            f"--load {load} is no Megatron checkpoint directory (it lacks "
            "latest_checkpointed_iteration.txt); name what training had as --save, or what "
            "tools/convert_checkpoint.py wrote."
        )
    source = load if flags_from is None else flags_from
    file = source / FLAGS if source.is_dir() else source
    if not file.is_file():
        remedy = "pass --model-flags with the directory that the run started from"
        if flags_from is not None:
            remedy = "pass a file of Megatron's model flags, or a directory with model_flags.txt"
        raise ValueError(f"{file} does not exist; {remedy}.")
    flags = shlex.split(file.read_text(encoding="utf-8"), comments=True)
    tokenizer = file.parent / HUGGINGFACE
    # The stored path is stale if the directory was moved.
    return [*flags, "--tokenizer-model", str(tokenizer)] if tokenizer.is_dir() else flags


def loading_flags(load: Path, seq_length: int) -> list[str]:
    """Megatron's flags beside the model's: load the weights in ``load``, and train nothing."""
    return [*shlex.split(_LOADING), "--load", str(load), "--seq-length", str(seq_length)]


@contextlib.contextmanager
def quiet_unless_it_fails() -> Iterator[None]:
    """Megatron prints some hundred lines while it starts: show them only with an error."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    except BaseException:
        sys.stderr.write(printed.getvalue())
        raise


def start_megatron(flags: Sequence[str]) -> "Model":
    """Megatron's own initialisation with ``flags`` as its command line, patched by RMT.

    Returns this rank's part of the model, with the weights of ``--load``. What is pickled beside
    them is not run, and may be of classes that are not at hand (``conversion.inert_pickles``).

    Raises:
        ValueError: Megatron cannot work with these flags, or ``--load`` holds no such checkpoint or
            one that was trained as another model.
    """
    sys.argv[1:] = flags
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    # Megatron wants it set for tensor parallelism on GPUs before Blackwell.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    console.leave_out_library_warnings()
    import megatron_rmt
    from megatron_rmt.cpu import platform as cpu_platform

    cpu_platform.install_if_no_cuda()
    megatron_rmt.patch()
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import get_args
    from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron
    from megatron.training.models.gpt import GPTModelBuilder
    from megatron.training.models.hybrid import HybridModelBuilder

    from conversion.inert_pickles import pickles_run_nothing
    from megatron_rmt.model.gpt import gpt_model

    try:
        parse_and_validate_args()
    except AssertionError as error:
        if not str(error):
            raise
        raise ValueError(f"Megatron refuses these flags: {error}") from error
    _check_arguments_of_run(get_args())
    initialize_megatron()
    if get_args().hybrid_layer_pattern:
        builder = HybridModelBuilder(hybrid_config_from_args(get_args()))
    else:
        config = gpt_config_from_args(get_args())
        # Megatron 0.19 drops it (github.com/NVIDIA/Megatron-LM/issues/6305).
        config.rope_scaling_factor = get_args().rope_scaling_factor
        builder = GPTModelBuilder(config)
    chunks = builder.build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        wrap_with_ddp=False,
        data_parallel_random_init=False,
    )
    try:
        with pickles_run_nothing():
            load_checkpoint(chunks, None, None)
    except SystemExit as error:
        # Megatron's own end to what it cannot read, with exit code 0.
        raise ValueError(f"Megatron could not load {get_args().load}, see above.") from error
    return gpt_model(chunks).eval()


def _check_arguments_of_run(args: argparse.Namespace) -> None:
    """Compare the model that is built with the one that the job trained which saved ``--load``.

    Raises:
        ValueError: They compute different things, or there is no such checkpoint.
    """
    from conversion.megatron_weights import MegatronWeights, iteration_directory
    from conversion.run_configuration import differences

    directory = iteration_directory(Path(args.load), args.ckpt_step)
    different = differences(MegatronWeights(directory).arguments(), vars(args))
    # They decide how long a text may be, and nothing about any token of it.
    different.pop("max_position_embeddings", None)
    if different:
        named = ", ".join(f"{name}={run!r} ({ours!r})" for name, (run, ours) in different.items())
        raise ValueError(
            f"The model in {directory} was trained with {named}, where the flags at hand mean what "
            "is in brackets; pass the flags of that training as well."
        )


def start_mid_training(flags: Sequence[str]) -> "MidTraining":
    """``start_megatron``, and all that a step of RMT needs besides.

    Raises:
        ValueError: Megatron or RMT cannot work with these flags.
    """
    model = start_megatron(flags)
    from megatron.training import get_args, get_tokenizer

    from megatron_rmt.mid_training import prepare

    return prepare(get_args(), model, get_tokenizer())
