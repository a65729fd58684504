"""What layers that are not plain attention and MLP cannot be combined with: multi-token prediction,
latent attention, state-space layers."""

import inspect
from argparse import Namespace
from collections.abc import Iterator

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention

# Of ``--hybrid-layer-pattern``: Mamba, attention, MLP.
_HYBRID_LAYERS = "M*-"


def layer_problems(args: Namespace) -> Iterator[str]:
    """A sentence for each of Megatron's ``args`` that these layers cannot be combined with."""
    yield from _multi_token_prediction(args)
    yield from _latent_attention(args)
    yield from _hybrid(args)


def _multi_token_prediction(args: Namespace) -> Iterator[str]:
    """What the layers of multi-token prediction cannot be combined with."""
    layers = args.mtp_num_layers
    if not layers:
        return
    given = f"--mtp-num-layers is {layers}; RMT needs it left out"
    if args.context_parallel_size > 1:
        yield (
            f"{given} with --context-parallel-size {args.context_parallel_size}: the trunk would "
            "lie on some ranks alone."
        )
    stages = args.pipeline_model_parallel_size
    if stages > 1 and not args.untie_embeddings_and_output_weights:
        yield (
            f"{given} with --pipeline-model-parallel-size {stages} and tied embeddings, of which "
            "Megatron can write no checkpoint; pass --untie-embeddings-and-output-weights."
        )
    if args.num_experts and (args.sequence_parallel or getattr(args, "fp8", None)):
        yield (
            f"{given} with --num-experts where rows are padded (--sequence-parallel, "
            "--fp8-format): its router would count the padding."
        )


def _latent_attention(args: Namespace) -> Iterator[str]:
    """What multi-head latent attention cannot be combined with."""
    if not args.multi_latent_attention:
        return
    with_it = "with --multi-latent-attention"
    ranks = args.context_parallel_size
    if ranks > 1:
        yield (
            f"--context-parallel-size is {ranks}; RMT needs 1 {with_it}: each rank would store the "
            "latents of its own rows."
        )
    for name in ("fp8", "fp4"):
        if getattr(args, name, None):
            yield (
                f"--{name}-format is {getattr(args, name)}; RMT needs it left out {with_it}: "
                "rollouts multiply by parts of a weight."
            )
    if args.apply_rope_fusion:
        yield (
            f"--rope-type is {args.rope_type or 'yarn'} and rotation is fused, which counts places "
            f"from 0; {with_it} pass --no-rope-fusion: tokens of a tree have other positions."
        )
    if args.cache_mla_latents:
        yield (
            "--cache-mla-latents is True; RMT needs it left out: it is for Megatron's inference "
            "engine, and rollouts store latents anyway."
        )
    if args.position_embedding_type == "yarn":
        yield (
            f"--position-embedding-type is yarn; {with_it}, whose layers rotate by themselves, "
            "pass rope, and --rope-type yarn."
        )
    built = inspect.signature(DotProductAttention.__init__, follow_wrapped=False).parameters
    if args.transformer_impl == "local" and "v_channels" not in built:
        yield (
            f"--transformer-impl is local, whose attention Megatron cannot build {with_it} on a "
            "GPU; pass transformer_engine."
        )


def _hybrid(args: Namespace) -> Iterator[str]:
    """What a stack with state-space layers cannot be combined with."""
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if not pattern:
        return
    given = f"--hybrid-layer-pattern is {pattern}"
    others = sorted(set(pattern) - set(_HYBRID_LAYERS))
    if others:
        yield (
            f"{given}; RMT trains stacks of M (Mamba), * (attention) and - (MLP) on one pipeline "
            f"stage, and has nothing for {' '.join(others)}."
        )
    if torch.cuda.is_available() and torch.device(torch.cuda.current_device()).type != "cpu":
        yield (
            f"{given}; RMT trains state-space layers on a CPU only: what rollouts hold of them on "
            "a GPU, and how mamba_ssm's kernels begin with states, is not written."
        )
    refused = {
        "pipeline_model_parallel_size": (1, "no pass has carried states over stages"),
        "context_parallel_size": (1, "each rank would need the states of those before it"),
        "sequence_parallel": (False, "it was not tried with state-space layers"),
        "reset_attention_mask": (
            False,
            "Megatron's Mamba layers go on over the ends of documents, and its attention does not",
        ),
        "mamba_training_ssm_states_dtype": (None, "states are fp32"),
        "multi_latent_attention": (False, "its layers were not tried among those with states"),
        "mtp_num_layers": (None, "its layers were not tried behind those with states"),
    }
    if not getattr(args, "use_mamba_mem_eff_path", True):
        yield (
            "--disable-mamba-mem-eff-path is given; RMT needs it left out with "
            "--hybrid-layer-pattern: that path of Megatron's layers is for inference."
        )
    for name, (needed, why) in refused.items():
        value = getattr(args, name, needed)
        if value != needed:
            flag, without = name.replace("_", "-"), "it left out" if needed is None else needed
            yield f"--{flag} is {value}; RMT needs {without} with --hybrid-layer-pattern: {why}."
