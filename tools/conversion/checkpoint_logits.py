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
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conversion.huggingface_weights import read_json
from conversion.model_config import read_config
from convert_checkpoint import flags_of
from model_on_hand import loading_flags, start_megatron

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel

# Of a longer text the beginning is compared, which bounds the memory that the logits take.
MAXIMUM_TOKENS = 4096


def tokenize(text: str, companions: Path) -> torch.Tensor:
    """Token ids ``[1, tokens]``, no more than the model has positions for."""
    from transformers import AutoTokenizer

    shape = read_config(read_json(companions / "config.json"))
    limit = min(MAXIMUM_TOKENS, shape.maximum_positions)
    ids = AutoTokenizer.from_pretrained(companions).encode(text)[:limit]
    if not ids:
        sys.exit(f"The text has no token for the tokenizer in {companions}; pass --verify-text.")
    return torch.tensor([ids])


def huggingface_logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits ``[1, tokens, vocabulary]`` of transformers, the weights as stored."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(ids).logits


def build_megatron_model(
    directory: Path,
    sequence_length: int,
    flags: Sequence[str],
    iteration: int | None = None,
    companions: Path | None = None,
) -> "GPTModel":
    """This rank's part of the model, from the checkpoint's own flags, with its weights loaded.

    ``iteration`` and ``companions`` are as in ``convert_checkpoint.flags_of``.
    """
    words = shlex.split(flags_of(directory, iteration, companions))
    words += loading_flags(directory, sequence_length)
    if iteration is not None:
        words += ["--ckpt-step", str(iteration)]
    return start_megatron([*words, *flags])


def megatron_logits(model: "GPTModel", ids: torch.Tensor) -> torch.Tensor | None:
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
        output = model(ids, positions[None], hidden_of_others, runtime_gather_output=True)
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
    parser.add_argument("--iteration", type=int, help="of the Megatron checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="gets the logits")
    parser.add_argument("--ids-output", type=Path, help="gets the token ids")
    arguments, flags = parser.parse_known_args()
    ids = tokenize(arguments.text_file.read_text(encoding="utf-8"), arguments.companions)
    if arguments.ids_output and int(os.environ.get("RANK", "0")) == 0:
        torch.save(ids, arguments.ids_output)
    if arguments.side == "huggingface":
        logits = huggingface_logits(arguments.directory, ids)
    else:
        model = build_megatron_model(
            arguments.directory, ids.shape[1], flags, arguments.iteration, arguments.companions
        )
        logits = megatron_logits(model, ids)
    last_rank = int(os.environ.get("WORLD_SIZE", "1")) - 1
    if logits is not None and int(os.environ.get("LOCAL_RANK", "0")) in (0, last_rank):
        torch.save(logits, arguments.output)


if __name__ == "__main__":
    main()
