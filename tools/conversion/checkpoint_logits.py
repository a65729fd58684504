"""Logits of a model on a text, computed by transformers or by Megatron, for comparing the two.

    python tools/conversion/checkpoint_logits.py huggingface HF_DIR \\
        --text-file FILE --companions DIR --output FILE
    python tools/conversion/checkpoint_logits.py megatron MEGATRON_DIR ... [further Megatron flags]

Each side needs a process of its own: a Hugging Face model must not be loaded where the CPU stands
in for CUDA. The Megatron side builds the model from the flags that ``convert_checkpoint.py flags``
prints and fills it with Megatron's own ``load_checkpoint``; started by torchrun it takes parallel
sizes from the further flags. Both compute in float32 and store ``[1, tokens, vocabulary]``.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conversion.huggingface_weights import read_json
from conversion.model_config import read_config

# Of a longer text the beginning is compared, which bounds the memory that the logits take.
MAXIMUM_TOKENS = 4096


def tokenize(text: str, companions: Path) -> torch.Tensor:
    """Token ids ``[1, tokens]``, no more than the model has positions for."""
    from transformers import AutoTokenizer

    shape = read_config(read_json(companions / "config.json"))
    limit = min(MAXIMUM_TOKENS, shape.maximum_positions)
    return torch.tensor([AutoTokenizer.from_pretrained(companions).encode(text)[:limit]])


def huggingface_logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits ``[1, tokens, vocabulary]`` of transformers, the weights as stored."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(ids).logits


def build_megatron_model(directory: Path, sequence_length: int, flags: list[str]) -> Any:
    """This rank's part of the model, from the checkpoint's own flags, with its weights loaded."""
    from convert_checkpoint import flags_of

    sys.argv[1:] = shlex.split(
        f"{flags_of(directory)} --load {shlex.quote(str(directory))} --finetune "
        "--ckpt-format torch_dist --exit-on-missing-checkpoint --micro-batch-size 1 --lr 1e-5 "
        f"--train-iters 1 --seq-length {sequence_length}"
    )
    sys.argv += flags
    # Megatron insists on it under tensor parallelism (it matters on GPUs before Blackwell).
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}

    from megatron_rmt.cpu import platform as cpu_platform
    from megatron_rmt.job import console

    console.leave_out_library_warnings()
    cpu_platform.install_if_no_cuda()

    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import get_args, initialize
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.models.gpt import GPTModelBuilder

    parse_and_validate_args()
    # Only data sets need the helpers that it compiles.
    initialize._compile_dependencies = lambda: None
    initialize.initialize_megatron()
    config = gpt_config_from_args(get_args())
    # Megatron 0.19 drops it (github.com/NVIDIA/Megatron-LM/issues/6305).
    config.rope_scaling_factor = get_args().rope_scaling_factor
    config.parallel_output = False
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = GPTModelBuilder(config).build_model(groups).cuda().eval()
    load_checkpoint([model], None, None)
    return model


def megatron_logits(model: Any, ids: torch.Tensor) -> torch.Tensor | None:
    """Logits ``[1, tokens, vocabulary]`` of Megatron; None on all but the last pipeline stage."""
    from megatron.core import parallel_state
    from megatron.training import get_args

    args = get_args()
    device = next(model.parameters()).device
    ids = ids.to(device)
    positions = torch.arange(ids.shape[1], device=device)
    hidden_of_others = (positions[None, :] > positions[:, None])[None, None]
    stage = torch.empty(ids.shape[1], 1, args.hidden_size, device=device)
    if not parallel_state.is_pipeline_first_stage():
        torch.distributed.recv(stage, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(stage)
    with torch.no_grad():
        output = model(ids, positions[None], hidden_of_others)
    if not parallel_state.is_pipeline_last_stage():
        next_rank = parallel_state.get_pipeline_model_parallel_next_rank()
        torch.distributed.send(output.contiguous(), next_rank)
        return None
    return output[..., : args.vocab_size].float().cpu()


def main() -> None:
    """Compute and store the logits of one side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("side", choices=("huggingface", "megatron"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--text-file", type=Path, required=True)
    parser.add_argument("--companions", type=Path, required=True, help="has the tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="gets the logits")
    parser.add_argument("--ids-output", type=Path, help="gets the token ids")
    arguments, flags = parser.parse_known_args()
    ids = tokenize(arguments.text_file.read_text(encoding="utf-8"), arguments.companions)
    if arguments.ids_output and int(os.environ.get("RANK", "0")) == 0:
        torch.save(ids, arguments.ids_output)
    if arguments.side == "huggingface":
        logits = huggingface_logits(arguments.directory, ids)
    else:
        logits = megatron_logits(
            build_megatron_model(arguments.directory, ids.shape[1], flags), ids
        )
    if logits is not None and int(os.environ.get("LOCAL_RANK", "0")) in (0, last_rank()):
        torch.save(logits, arguments.output)


def last_rank() -> int:
    """The highest rank of this job."""
    return int(os.environ.get("WORLD_SIZE", "1")) - 1


if __name__ == "__main__":
    main()
