"""Whether the model rotates queries and keys as the command line asks."""

from argparse import Namespace

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_rmt.model.gpt import Model, chunks_of


def check_rotary_scaling(args: Namespace, model: Model) -> None:
    """Compare the model's rotary frequencies with those of the flags.

    Megatron 0.19's ``gpt_config_from_args`` drops ``--rope-scaling-factor``
    (github.com/NVIDIA/Megatron-LM/issues/6305), and a script that builds the model by itself may
    forget the scaling: a converted checkpoint would then train as a different model.

    Raises:
        ValueError: ``--use-rope-scaling`` or ``--rope-scaling-factor`` did not reach the model.
    """
    if not args.use_rope_scaling or args.position_embedding_type != "rope":
        return
    if args.multi_latent_attention:
        # Its layers have a table of their own, and flags for it.
        return
    built = chunks_of(model)[0].rotary_pos_emb
    asked = RotaryEmbedding(
        kv_channels=args.kv_channels,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=True,
        rope_scaling_factor=args.rope_scaling_factor,
        use_cpu_initialization=True,
        cp_group=built.cp_group,
    )
    if not torch.allclose(built.inv_freq.cpu(), asked.inv_freq, rtol=1e-3, atol=0):
        raise ValueError(
            f"--use-rope-scaling with --rope-scaling-factor {args.rope_scaling_factor:g} did not "
            "reach the model: Megatron 0.19's gpt_config_from_args drops the factor; set "
            "config.rope_scaling_factor = args.rope_scaling_factor on what it returns, or pass "
            "rope_scaling and rope_scaling_factor to the GPTModel that your script builds."
        )
