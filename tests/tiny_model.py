"""A small random Megatron model and what the stock model says of one sequence.

The reference of the tests about trees and rollouts is always the stock model: stock attention,
stock positions, one sequence at a time, with the same weights.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer import MLATransformerConfig, ModuleSpec, TransformerConfig
from torch import Tensor

from megatron_rmt.cpu.state_space import StateSpace

# The embedding is padded, as Megatron's is; padding must never be drawn nor count.
VOCAB, PADDED_VOCAB = 53, 64
LONGEST_POSITION = 200
YARN = {
    "rotary_scaling_factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "correction_range_round_to_int": False,
}


# Of latent attention: keys, queries and values of different widths, and latents of another.
LATENT = {
    "multi_latent_attention": True,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 7,
    "rope_type": "rope",
    "transformer_impl": "local",
    "qk_layernorm": True,
}


LATENT_YARN = {
    "rope_type": "yarn",
    "rotary_scaling_factor": 8.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}


def build_model(
    dtype: torch.dtype = torch.float64,
    position_embedding: str = "rope",
    tied: bool = False,
    pre_process: bool = True,
    post_process: bool = True,
    make_spec: Callable[..., ModuleSpec] = get_gpt_layer_local_spec,
    vp_stage: int | None = None,
    rotary_percent: float = 1.0,
    pattern: str | None = None,
    **changes: Any,
) -> GPTModel | HybridModel:
    """Two layers of width 32 with 4 query and 2 key heads, Llama's shape unless ``changes``.

    tied: the output layer is the embedding. pre_process, post_process: this pipeline stage has the
    embedding, the head. make_spec: Megatron's function that makes the specification of the layers.
    vp_stage: number of this chunk, with virtual pipeline stages. pattern: of a hybrid stack, as
    ``--hybrid-layer-pattern``.
    """
    options: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": dtype,
        "use_cpu_initialization": True,
        "perform_initialization": True,
        "init_method_std": 0.2,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
    }
    latent = changes.get("multi_latent_attention", False)
    if latent:
        options |= {"num_query_groups": None, "gated_linear_unit": True} | LATENT
    if pattern is not None:
        options |= {
            "num_layers": len(pattern),
            "is_hybrid_model": True,
            "mamba_state_dim": 6,
            "mamba_head_dim": 8,
            "mamba_num_groups": 2,
            "mamba_num_heads": 4,
        }
    config = (MLATransformerConfig if latent else TransformerConfig)(**options | changes)
    if position_embedding == "yarn":
        # As Megatron's flags set them, which are no fields.
        for name, value in YARN.items():
            setattr(config, f"yarn_{name}", value)
    if pattern is not None:
        model = HybridModel(
            config,
            hybrid_stack_spec,
            vocab_size=PADDED_VOCAB,
            max_sequence_length=LONGEST_POSITION,
            hybrid_layer_pattern=pattern,
            position_embedding_type=position_embedding,
            share_embeddings_and_output_weights=tied,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        for mixer in filter(lambda module: isinstance(module, MambaMixer), model.modules()):
            # Larger than a new model's, so that a state matters to rows far behind.
            torch.nn.init.uniform_(mixer.A_log, -4.0, 0.0)
            torch.nn.init.uniform_(mixer.dt_bias, -2.0, 1.0)
            torch.nn.init.normal_(mixer.D)
        return model.to(dtype)
    named = {"num_experts": config.num_moe_experts, "qk_layernorm": config.qk_layernorm}
    if latent:
        named["multi_latent_attention"] = True
    if make_spec is get_gpt_layer_local_spec:
        named["normalization"] = config.normalization
    spec = make_spec(**named)
    further = None
    if config.mtp_num_layers:
        further = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
    model = GPTModel(
        config,
        spec,
        vocab_size=PADDED_VOCAB,
        pre_process=pre_process,
        post_process=post_process,
        max_sequence_length=LONGEST_POSITION,
        position_embedding_type=position_embedding,
        rotary_percent=rotary_percent,
        share_embeddings_and_output_weights=tied,
        mtp_block_spec=further,
        vp_stage=vp_stage,
    )
    return model.to(dtype)


def stock_logits(
    model: GPTModel | HybridModel, tokens: Tensor, positions: Tensor | None = None
) -> Tensor:
    """Scores ``[tokens, VOCAB]`` of one sequence ``[tokens]``, causal attention."""
    count = len(tokens)
    if positions is None:
        positions = torch.arange(count)
    hidden = torch.ones(1, 1, count, count, dtype=torch.bool).triu(1)
    return model(tokens[None], positions[None], hidden)[0, :, :VOCAB]


def mix_row_by_row(model: HybridModel) -> None:
    """Let the Mamba layers of ``model`` go by the recurrence itself, one row after the other."""
    for mixer in filter(lambda module: isinstance(module, MambaMixer), model.modules()):
        mixer._ssm_training = functools.partial(_mix_row_by_row, mixer)


def _mix_row_by_row(mixer: MambaMixer, projected: Tensor, packed_seq_params: Any) -> Tensor:
    assert packed_seq_params is None
    space = StateSpace.of(mixer)
    mixed = []
    for sequence in projected.unbind(1):
        mixed.append(rows_mixed_one_by_one(space, *space.split(sequence)))
    return mixer.norm(torch.stack(mixed, dim=1))


def rows_mixed_one_by_one(space: StateSpace, gate: Tensor, inputs: Tensor, steps: Tensor) -> Tensor:
    """``state_space.mix`` of one sequence: the equations, in loops over rows and heads."""
    heads, groups, width = space.heads, space.groups, space.width
    state = [inputs.new_zeros(space.head_dim, space.state_dim) for _ in range(heads)]
    mixed = []
    for row in range(len(inputs)):
        convolved = space.bias
        for age in range(min(width, row + 1)):
            convolved = convolved + space.kernel[:, width - 1 - age] * inputs[row - age]
        shared = groups * space.state_dim
        x, b, c = F.silu(convolved).split([len(convolved) - 2 * shared, shared, shared])
        x, b, c = x.view(heads, -1), b.view(groups, -1), c.view(groups, -1)
        of_heads = []
        for head in range(heads):
            group = head * groups // heads
            dt = F.softplus(steps[row, head] + space.dt_bias[head])
            decay = torch.exp(-dt * torch.exp(space.a_log[head]))
            state[head] = decay * state[head] + dt * torch.outer(x[head], b[group])
            of_heads.append(state[head] @ c[group] + space.skip[head] * x[head])
        mixed.append(torch.cat(of_heads) * F.silu(gate[row]))
    return torch.stack(mixed)
