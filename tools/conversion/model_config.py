"""What a Hugging Face ``config.json`` says of a model, and Megatron's flags for the same model.

Nothing is guessed: a setting that Megatron would not compute in the same way is refused.
"""

from collections.abc import Mapping
from typing import Any

from conversion.weight_names import FAMILIES, WITHOUT_TABLE, ModelShape

# What is constant in Megatron's form of Llama 3's rotary scaling; the factor is a flag.
LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Megatron 0.19's gpt_config_from_args drops --rope-scaling-factor, and the model gets this one
# (github.com/NVIDIA/Megatron-LM/issues/6305).
DEFAULT_FACTOR = 8.0
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape of the model that a Hugging Face ``config.json`` describes.

    Raises:
        ValueError: The family, or a setting, has no Megatron form here, or makes no sense.
    """
    family = config.get("model_type")
    _check_switches(config)
    config = {**FAMILIES[family].defaults, **config}
    rotary_base, rotary_scaling = _rotary(config)
    heads = _size(config, "num_attention_heads")
    hidden = _size(config, "hidden_size")
    vocabulary = _size(config, "vocab_size")
    shape = ModelShape(
        family=family,
        layers=_size(config, "num_hidden_layers"),
        hidden=hidden,
        ffn=_size(config, "intermediate_size"),
        heads=heads,
        groups=_size(config, "num_key_value_heads", heads),
        head=_size(config, "head_dim", hidden // heads),
        vocabulary=vocabulary,
        tied=bool(config.get("tie_word_embeddings", False)),
        maximum_positions=_maximum_positions(config),
        norm_epsilon=_positive(config, "rms_norm_eps"),
        rotary_base=rotary_base,
        rotary_scaling=rotary_scaling,
        **_experts(config),
    )
    if shape.heads % shape.groups:
        raise ValueError(
            f"config.json sets num_attention_heads={heads} and num_key_value_heads="
            f"{shape.groups}; the first must be a multiple of the second."
        )
    if shape.head % 2:
        raise ValueError(f"config.json asks for heads of size {shape.head}; rotary needs an even.")
    for key in TOKEN_IDS:
        ids = config.get(key)
        for token in ids if isinstance(ids, list) else [ids]:
            if isinstance(token, int) and token >= vocabulary:
                raise ValueError(
                    f"config.json sets {key}={token}, beyond vocab_size={vocabulary}; "
                    "resize the model's embeddings, or correct the id."
                )
    return shape


def _check_switches(config: Mapping[str, Any]) -> None:
    family = config.get("model_type")
    if family not in FAMILIES:
        reason = f" ({WITHOUT_TABLE[family]})" if family in WITHOUT_TABLE else ""
        raise ValueError(
            f"model_type {family!r} of config.json is not supported{reason}; supported families: "
            f"{', '.join(sorted(FAMILIES))}; --backend megatron-bridge may know others."
        )
    if config.get("auto_map"):
        raise ValueError(
            "config.json brings its own modelling code (auto_map), which is never run here; "
            f"if the model is a plain {family}, remove auto_map from config.json."
        )
    for switch in FAMILIES[family].refused:
        if config.get(switch):
            raise ValueError(
                f"config.json sets {switch}={config[switch]!r}, which has no Megatron form for "
                f"the family {family}; convert a model without it."
            )
    if config.get("quantization_config"):
        raise ValueError(
            "config.json describes quantized weights (quantization_config); "
            "dequantise the model and save it as safetensors first."
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(
            f"config.json sets hidden_act={config['hidden_act']!r}; only 'silu' is supported."
        )
    if config.get("decoder_sparse_step", 1) != 1:
        raise ValueError(
            f"config.json sets decoder_sparse_step={config['decoder_sparse_step']!r}; only models "
            "with experts in every layer (1) are supported."
        )


def _positive(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number; ``default`` where it is absent or null."""
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"config.json lacks {key!r}; is it complete?")
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"config.json sets {key}={value!r}; it must be a positive number.")
    return value


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number; ``default`` where it is absent or null."""
    value = _positive(config, key, default)
    if not isinstance(value, int):
        raise ValueError(f"config.json sets {key}={value!r}; it must be a whole number.")
    return value


def _maximum_positions(config: Mapping[str, Any]) -> int:
    """The longest context in which every token sees all before it.

    Within a sliding window, attention with and without the window are the same.
    """
    positions = _size(config, "max_position_embeddings")
    switch = FAMILIES[config["model_type"]].window_switch
    windowed = config.get(switch, False) if switch else True
    return min(positions, _size(config, "sliding_window", positions)) if windowed else positions


def _experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``ModelShape`` that only a mixture of experts has."""
    if not any(weight.per_expert for weight in FAMILIES[config["model_type"]].weights):
        return {}
    is_mixtral = config["model_type"] == "mixtral"
    # transformers 5 writes num_local_experts for every family.
    count = "num_experts" if "num_experts" in config else "num_local_experts"
    experts = {
        "experts": _size(config, count),
        "expert_ffn": _size(config, "intermediate_size" if is_mixtral else "moe_intermediate_size"),
        "experts_per_token": _size(config, "num_experts_per_tok"),
        "normalised_routing": is_mixtral or bool(config.get("norm_topk_prob", False)),
    }
    if experts["experts_per_token"] > experts["experts"]:
        raise ValueError(
            f"config.json sets num_experts_per_tok={experts['experts_per_token']}, more than "
            f"{count}={experts['experts']}."
        )
    return experts


def _rotary(config: Mapping[str, Any]) -> tuple[int, float | None]:
    """Rotary base, and the factor of Llama 3's scaling; transformers 4 and 5 differ here."""
    rope = {"rope_theta": config.get("rope_theta", 10000.0)}
    rope |= config.get("rope_scaling") or {}
    rope |= config.get("rope_parameters") or {}
    base = _positive(rope, "rope_theta")
    if base != int(base):
        raise ValueError(f"config.json sets rope_theta={base!r}; Megatron needs a whole number.")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(
            f"config.json sets partial_rotary_factor={partial!r}; only 1.0 is supported."
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return int(base), None
    if kind == "llama3" and all(rope.get(key) == value for key, value in LLAMA3_SCALING.items()):
        return int(base), float(_positive(rope, "factor"))
    raise ValueError(
        f"config.json sets rotary scaling {rope!r}; Megatron has 'default', and 'llama3' with a "
        f"factor and {LLAMA3_SCALING} only."
    )


def megatron_flags(shape: ModelShape) -> list[str]:
    """The Megatron command-line flags that build exactly this model, at any parallel layout.

    Precision, parallel layout and the tokenizer are not part of it.
    """
    flags: dict[str, Any] = {
        "--num-layers": shape.layers,
        "--hidden-size": shape.hidden,
        "--ffn-hidden-size": shape.ffn,
        "--num-attention-heads": shape.heads,
        "--group-query-attention": None,
        "--num-query-groups": shape.groups,
        "--kv-channels": shape.head,
        "--max-position-embeddings": shape.maximum_positions,
        "--position-embedding-type": "rope",
        "--rotary-base": shape.rotary_base,
        "--normalization": "RMSNorm",
        "--norm-epsilon": shape.norm_epsilon,
        "--swiglu": None,
        "--disable-bias-linear": None,
        "--attention-dropout": 0.0,
        "--hidden-dropout": 0.0,
        "--vocab-size": shape.vocabulary,
        "--padded-vocab-size": shape.padded_vocabulary,
    }
    if shape.rotary_scaling is not None:
        flags["--use-rope-scaling"] = None
        flags["--rope-scaling-factor"] = shape.rotary_scaling
    if not shape.tied:
        flags["--untie-embeddings-and-output-weights"] = None
    if shape.experts:
        flags["--num-experts"] = shape.experts
        flags["--moe-ffn-hidden-size"] = shape.expert_ffn
        flags["--moe-router-topk"] = shape.experts_per_token
        if not shape.normalised_routing:
            flags["--moe-router-pre-softmax"] = None
    words = [str(word) for flag in flags.items() for word in flag if word is not None]
    return [*words, *FAMILIES[shape.family].flags]


def caution(shape: ModelShape) -> str | None:
    """One sentence on what a script of one's own must do to build this model from the flags."""
    if shape.rotary_scaling in (None, DEFAULT_FACTOR):
        return None
    return (
        f"this model needs --rope-scaling-factor {shape.rotary_scaling:g}, which Megatron 0.19's "
        "gpt_config_from_args drops; examples/pretrain_rmt.py passes it on, a script of your own "
        "must set config.rope_scaling_factor = args.rope_scaling_factor."
    )
