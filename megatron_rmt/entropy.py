"""Difficulty of every token: the entropy of the policy's own prediction.

H(position) = entropy in nats of pi(. | tokens before it), over the full vocabulary (RPT used the 16
most likely tokens of a small proxy model: ``top_k``). The same pass fills the key-value store that
the rollouts read.
"""

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rmt.decoding import KeyValueStore, TrunkPlan
from megatron_rmt.head import token_entropies
from megatron_rmt.stages import forward_through_stages, from_last_stage
from megatron_rmt.tree import Trunk, trunk_blocks


@torch.no_grad()
def read_trunk(
    model: GPTModel,
    trunk: Trunk,
    store: KeyValueStore,
    first_row: int,
    *,
    vocab_size: int,
    longest_position: int,
    chunk_size: int,
    top_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Read one micro-batch's trunk: keys and values go to ``store`` from ``first_row`` on.

    Returns, on every tensor- and pipeline-parallel rank and on the CPU, the entropies ``[rows]``
    fp32 in nats and the most likely next tokens ``[rows]`` int64.
    """
    device = next(model.parameters()).device
    plan = TrunkPlan(
        tokens=len(trunk), blocks=trunk_blocks(trunk), store=store, first_row=first_row
    )
    plan.use_positions(trunk.positions.to(device), longest_position)

    def read(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return token_entropies(
            hidden,
            weight,
            vocab_size=vocab_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            chunk_size=chunk_size,
            top_k=top_k,
        )

    result = forward_through_stages(model, trunk.tokens.to(device), plan, read)
    if result is None:
        entropies = torch.empty(len(trunk), device=device)
        predictions = torch.empty(len(trunk), dtype=torch.int64, device=device)
    else:
        entropies, predictions = result[0].float().contiguous(), result[1].contiguous()
    return from_last_stage(entropies).cpu(), from_last_stage(predictions).cpu()
