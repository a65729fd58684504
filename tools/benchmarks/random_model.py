"""Megatron's GPTModel in the shape of Llama, with random weights and tree attention."""

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer import TransformerConfig

from megatron_rmt.model.visibility import attach_tree_attention


def random_model(
    *,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    width: int,
    vocab_size: int,
    longest: int,
    dtype: torch.dtype,
    device: torch.device,
    deviation: float = 0.02,
) -> GPTModel:
    """The model, on ``device``; Megatron's parallel state and random numbers must be set up.

    Args:
        width: of a head.
        longest: position that it may see.
        deviation: of its weights.
    """
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=kv_heads,
        kv_channels=width,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=device.type == "cpu",
        init_method_std=deviation,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=vocab_size,
        max_sequence_length=longest,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )
    attach_tree_attention(model)
    return model.to(device, dtype)
