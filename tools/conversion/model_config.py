"""What a Hugging Face ``config.json`` says of a model, and Megatron's flags for the same model.

Nothing is guessed: a setting that Megatron would not compute in the same way is refused.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from conversion.weight_names import (
    FAMILIES,
    WITHOUT_TABLE,
    Latent,
    ModelShape,
    Yarn,
    parts_of,
)

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
# Layers times experts; the largest models have some ten thousand. Both directions walk all of them.
MOST_PLACES = 200_000
# Beyond it float32, in which rotary angles are computed, has no such base.
LARGEST_BASE = 2.0**63
# Arguments of Megatron that decide what a model computes, with the values that they have without a
# flag. For those that ``megatron_flags`` never sets, config.json has no form for another value.
PLAIN_ARGUMENTS: Mapping[str, Any] = {
    "num_layers": None,
    "hidden_size": None,
    "ffn_hidden_size": None,
    "num_attention_heads": None,
    "group_query_attention": False,
    "num_query_groups": 1,
    "kv_channels": None,
    "max_position_embeddings": None,
    "vocab_size": None,
    "position_embedding_type": "learned_absolute",
    "rotary_base": 10000,
    "rope_scaling_factor": 8.0,
    "rotary_scaling_factor": 1.0,
    "yarn_original_max_position_embeddings": None,
    "yarn_beta_fast": None,
    "yarn_beta_slow": None,
    "yarn_correction_range_round_to_int": None,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "normalization": "LayerNorm",
    "layernorm_epsilon": 1e-5,
    "swiglu": False,
    "add_bias_linear": True,
    "moe_ffn_hidden_size": None,
    "moe_router_topk": 2,
    "untie_embeddings_and_output_weights": False,
    "use_rope_scaling": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "num_experts": None,
    "moe_router_pre_softmax": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "no_rope_freq": None,
    "squared_relu": False,
    "quick_geglu": False,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "qk_l2_norm": False,
    "attention_output_gate": False,
    "softmax_type": "vanilla",
    "window_size": None,
    "window_attn_skip_freq": None,
    "multi_latent_attention": False,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "rope_type": None,
    "experimental_attention_variant": None,
    "hybrid_layer_pattern": None,
    "heterogeneous_layers_config_path": None,
    "mtp_num_layers": None,
    "use_mup": False,
    "moe_layer_freq": 1,
    "moe_latent_size": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_apply_probs_on_input": False,
}
# Flags that do not decide what a model computes but how precisely, or say so twice.
WITHOUT_MEANING = (
    *("--padded-vocab-size", "--attention-dropout", "--hidden-dropout"),
    "--moe-router-dtype",
)
# Their routers always take the softmax over the chosen experts.
WITH_EXPERTS_ALONE = ("mixtral", "gpt_oss")
# Layers behind the last that predict more tokens than the next; transformers reads none of them.
FURTHER_LAYERS = "num_nextn_predict_layers"
# By so many of a group's experts transformers chooses it.
BEST_OF_GROUP = 2
# The only one that Megatron's clamped GELU has.
SIGMOID_GAIN = 1.702
# What the names of arguments begin with that mean nothing without experts.
OF_EXPERTS = "moe_"
# What the names of arguments begin with that mean nothing without YaRN.
OF_YARN = ("yarn_", "rotary_scaling_factor", "mscale")
# Arguments that mean nothing without latent attention, and with it.
OF_LATENTS = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
NOT_OF_LATENTS = ("kv_channels", "group_query_attention", "num_query_groups")
# Of YaRN with latent attention, for which Megatron 0.19 has no flags.
LATENT_YARN = {"original_positions": 4096, "beta_fast": 32.0, "beta_slow": 1.0, "rounds": True}


def read_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape of the model that a Hugging Face ``config.json`` describes.

    Raises:
        ValueError: The family, or a setting, has no Megatron form here, or makes no sense.
    """
    _check_switches(config)
    family = config["model_type"]
    config = {**FAMILIES[family].defaults, **config}
    rotary_base, rotary_share, rotary_scaling, yarn = _rotary(config)
    heads = _size(config, "num_attention_heads")
    hidden = _size(config, "hidden_size")
    vocabulary = _size(config, "vocab_size")
    latent = _latent(config)
    shape = ModelShape(
        family=family,
        layers=_size(config, "num_hidden_layers"),
        hidden=hidden,
        ffn=_size(config, "intermediate_size"),
        heads=heads,
        groups=_size(config, "num_key_value_heads", heads) if latent is None else heads,
        head=_size(config, "head_dim", hidden // heads) if latent is None else latent.rotated,
        vocabulary=vocabulary,
        tied=_switch(config, "tie_word_embeddings"),
        maximum_positions=_size(config, "max_position_embeddings"),
        norm_epsilon=_positive(config, "rms_norm_eps", most=1),
        rotary_base=rotary_base,
        rotary_share=rotary_share,
        rotary_scaling=rotary_scaling,
        yarn=yarn,
        activation_bound=_activation_bound(config),
        without_rotary=_without_rotary(config),
        further_layers=_count(config, FURTHER_LAYERS),
        switches=tuple(name for name in FAMILIES[family].switches if _switch(config, name)),
        latent=latent,
        **_windows(config),
        **_experts(config),
    )
    if shape.layers * max(1, shape.experts) > MOST_PLACES:
        experts = f" of {shape.experts} experts each" if shape.experts else ""
        raise ValueError(
            f"config.json sets num_hidden_layers={shape.layers}{experts}; no more than "
            f"{MOST_PLACES} are converted: correct the number."
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
    name = family if isinstance(family, str) else ""
    if name not in FAMILIES:
        reason = f" ({WITHOUT_TABLE[name]})" if name in WITHOUT_TABLE else ""
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
    for switch in FAMILIES[family].needed:
        value = config.get(switch, FAMILIES[family].defaults[switch])
        if value is not True:
            raise ValueError(
                f"config.json sets {switch}={value!r}; of the family {family} only models with it "
                "are supported."
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


def _positive(
    config: Mapping[str, Any], key: str, default: float | None = None, most: float = math.inf
) -> float:
    """A positive number, finite and no more than ``most``; ``default`` where absent or null."""
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"config.json lacks {key!r}; is it complete?")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= most or value == math.inf:
        bound = f" of at most {most:g}" if most < math.inf else ""
        raise ValueError(f"config.json sets {key}={value!r}; it must be a positive number{bound}.")
    return value


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number; ``default`` where it is absent or null."""
    value = _positive(config, key, default, most=2**63)
    if not isinstance(value, int):
        raise ValueError(f"config.json sets {key}={value!r}; it must be a whole number.")
    return value


def _count(config: Mapping[str, Any], key: str) -> int:
    """A whole number that may be zero, which it is where it is absent or null."""
    return _size(config, key) if config.get(key) else 0


def _switch(config: Mapping[str, Any], key: str) -> bool:
    """True or false; false where it is absent or null."""
    value = config.get(key)
    if value not in (None, True, False):
        raise ValueError(f"config.json sets {key}={value!r}; it must be true or false.")
    return bool(value)


def _windows(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``ModelShape`` that say what layers with a sliding window see."""
    family, layers = FAMILIES[config["model_type"]], _size(config, "num_hidden_layers")
    positions = _size(config, "max_position_embeddings")
    if not family.windows or (family.window_switch and not _switch(config, family.window_switch)):
        return {}
    # How many tokens one sees, itself among them; all that there are without a window.
    seen = _size(config, "sliding_window", positions)
    types: Any = ["sliding_attention"] * layers
    if family.windows == "listed":
        types = config.get("layer_types") or _layer_types(config, layers)
    known = {"sliding_attention", "full_attention"}
    if not isinstance(types, list) or len(types) != layers or not set(map(str, types)) <= known:
        raise ValueError(
            f"config.json sets layer_types={types!r}; it must be a list of 'sliding_attention' and "
            f"'full_attention', one for each of the {layers} layers."
        )
    windowed = tuple(one == "sliding_attention" for one in types)
    if seen >= positions or not any(windowed):
        return {}
    return {"window": seen - 1, "windowed": () if all(windowed) else windowed}


def _layer_types(config: Mapping[str, Any], layers: int) -> list[str]:
    """What transformers takes for ``layer_types`` where config.json does not list them."""
    family = FAMILIES[config["model_type"]]
    if family.whole_every:
        windowed = [(layer + 1) % family.whole_every != 0 for layer in range(layers)]
    elif "max_window_layers" in family.defaults:
        first = config["max_window_layers"]
        if not isinstance(first, int):
            raise ValueError(
                f"config.json sets max_window_layers={first!r}; it must be a whole number."
            )
        windowed = [layer >= first for layer in range(layers)]
    else:
        windowed = [*_without_rotary(config)] or [False] * layers
    return ["sliding_attention" if one else "full_attention" for one in windowed]


def _experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``ModelShape`` that only a mixture of experts has."""
    weights = FAMILIES[config["model_type"]].weights
    if not any(".experts." in weight.megatron for weight in weights):
        return {}
    # They have no other MLP, whose size would need another name.
    alone = config["model_type"] in WITH_EXPERTS_ALONE
    # transformers 5 writes num_local_experts for every family.
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    count = next(name for name in names if name in config or name == names[-1])
    experts = {
        "experts": _size(config, count),
        "expert_ffn": _size(config, "intermediate_size" if alone else "moe_intermediate_size"),
        "experts_per_token": _size(config, "num_experts_per_tok"),
        "normalised_routing": alone or _switch(config, "norm_topk_prob"),
    }
    if experts["experts_per_token"] > experts["experts"]:
        raise ValueError(
            f"config.json sets num_experts_per_tok={experts['experts_per_token']}, more than "
            f"{count}={experts['experts']}."
        )
    return experts | _shared_experts(config)


def _shared_experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``ModelShape`` that only a mixture with shared experts has."""
    if "n_shared_experts" not in config:
        return {}
    dense, layers = _count(config, "first_k_dense_replace"), _size(config, "num_hidden_layers")
    if dense >= layers:
        raise ValueError(
            f"config.json sets first_k_dense_replace={dense}, but num_hidden_layers={layers}: no "
            "layer would have experts."
        )
    groups, chosen = _size(config, "n_group", 1), _size(config, "topk_group", 1)
    per_token = _size(config, "num_experts_per_tok")
    if groups == 1:
        groups = chosen = 0
    elif per_token != BEST_OF_GROUP * chosen:
        raise ValueError(
            f"config.json sets n_group={groups}, topk_group={chosen} and num_experts_per_tok="
            f"{per_token}; a group is chosen by its best {BEST_OF_GROUP} experts, and in Megatron "
            "by as many as the third is times the second: the two must be the same."
        )
    return {
        "expert_groups": groups,
        "chosen_groups": chosen,
        "dense_layers": dense,
        "shared_ffn": _size(config, "n_shared_experts") * _size(config, "moe_intermediate_size"),
        "routed_scaling": float(_positive(config, "routed_scaling_factor")),
    }


def _activation_bound(config: Mapping[str, Any]) -> float | None:
    if "swiglu_limit" not in FAMILIES[config["model_type"]].defaults:
        return None
    gain = config.get("swiglu_alpha", SIGMOID_GAIN)
    if gain != SIGMOID_GAIN:
        raise ValueError(
            f"config.json sets swiglu_alpha={gain!r}; Megatron has {SIGMOID_GAIN} only."
        )
    return float(_positive(config, "swiglu_limit"))


def _latent(config: Mapping[str, Any]) -> Latent | None:
    """The sizes of latent attention, if the family has it."""
    if "kv_lora_rank" not in FAMILIES[config["model_type"]].defaults:
        return None
    if not config.get("q_lora_rank"):
        raise ValueError(
            f"config.json sets q_lora_rank={config.get('q_lora_rank')!r}; without a latent of "
            "queries Megatron 0.19 normalises them by --qk-layernorm, which the model's keys need "
            "and its queries do not have: only models with it are supported."
        )
    return Latent(
        query=_size(config, "q_lora_rank"),
        key=_size(config, "kv_lora_rank"),
        plain=_size(config, "qk_nope_head_dim"),
        rotated=_size(config, "qk_rope_head_dim"),
        value=_size(config, "v_head_dim"),
    )


def _latent_yarn(rope: Mapping[str, Any], positions: int) -> Yarn:
    """What rotary parameters say where attention is latent, which scales its scores as well."""
    scales = {key: rope.get(key) or 0 for key in ("mscale", "mscale_all_dim")}
    yarn = _yarn({key: value for key, value in rope.items() if key not in scales}, positions)
    for name, only in LATENT_YARN.items():
        if getattr(yarn, name) != only:
            raise ValueError(
                f"config.json sets rotary scaling {rope!r}; with latent attention Megatron 0.19 "
                f"has YaRN with original_max_position_embeddings=4096, beta_fast=32, beta_slow=1 "
                "and truncate only."
            )
    if not scales["mscale_all_dim"]:
        return yarn
    # transformers takes the first only beside the second.
    return dataclasses.replace(
        yarn, **{key: float(_positive(scales, key)) for key in ("mscale", "mscale_all_dim")}
    )


def _yarn(rope: Mapping[str, Any], positions: int) -> Yarn:
    """What rotary parameters say, with the defaults of transformers."""
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if rope.get(key) is not None:
            raise ValueError(
                f"config.json sets {key}={rope[key]!r} for YaRN; only models without are supported."
            )
    return Yarn(
        factor=float(_positive(rope, "factor")),
        original_positions=_size(rope, "original_max_position_embeddings", positions),
        beta_fast=float(_positive(rope, "beta_fast", 32.0)),
        beta_slow=float(_positive(rope, "beta_slow", 1.0)),
        rounds=rope.get("truncate") is None or _switch(rope, "truncate"),
    )


def _rotary(config: Mapping[str, Any]) -> tuple[int, float, float | None, Yarn | None]:
    """Rotary base, share of a head, the factor of Llama 3's scaling, and YaRN.

    transformers 4 and 5 differ here.
    """
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key), dict | None):
            raise ValueError(
                f"config.json sets {key}={config[key]!r}; it must be an object or null."
            )
    rope = {"rope_theta": config.get("rope_theta", 10000.0)}
    rope |= config.get("rope_scaling") or config.get("rope_parameters") or {}
    base = _positive(rope, "rope_theta", most=LARGEST_BASE)
    if base != int(base):
        raise ValueError(f"config.json sets rope_theta={base!r}; Megatron needs a whole number.")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    family = FAMILIES[config["model_type"]]
    if partial != 1.0 and not family.turns_in_part:
        raise ValueError(
            f"config.json sets partial_rotary_factor={partial!r}; only 1.0 is supported."
        )
    partial = float(_positive({"partial_rotary_factor": partial}, "partial_rotary_factor", most=1))
    kind = rope.get("rope_type", rope.get("type", "default"))
    by_layer = any(isinstance(value, dict) for value in rope.values())
    if kind == "default" and not by_layer:
        return int(base), partial, None, None
    # Megatron's YaRN turns whole heads.
    if kind == "yarn" and not by_layer and partial == 1:
        read = _yarn if _latent(config) is None else _latent_yarn
        return int(base), partial, None, read(rope, _size(config, "max_position_embeddings"))
    if kind == "llama3" and all(rope.get(key) == value for key, value in LLAMA3_SCALING.items()):
        return int(base), partial, float(_positive(rope, "factor")), None
    raise ValueError(
        f"config.json sets rotary scaling {rope!r}; Megatron has 'default', 'yarn', and 'llama3' "
        f"with a factor and {LLAMA3_SCALING} only."
    )


def _without_rotary(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Of each layer, whether it turns no queries and keys; empty where all do."""
    layers = _size(config, "num_hidden_layers")
    turned = config.get("no_rope_layers")  # 1 where a layer does
    if turned is None and "no_rope_layer_interval" in config:
        interval = _size(config, "no_rope_layer_interval")
        turned = [int((layer + 1) % interval != 0) for layer in range(layers)]
    if turned is None:
        return ()
    if not isinstance(turned, list) or len(turned) != layers or not set(turned) <= {0, 1}:
        raise ValueError(
            f"config.json sets no_rope_layers={turned!r}; it must be a list of 0 and 1, one for "
            f"each of the {layers} layers."
        )
    return () if all(turned) else tuple(not one for one in turned)


def megatron_flags(shape: ModelShape) -> list[str]:
    """The Megatron command-line flags that build exactly this model, at any parallel layout.

    Precision, parallel layout and the tokenizer are not part of it.
    """
    words = (word for flag in _flags(shape).items() for word in flag if word is not None)
    return [_written(word) for word in words]


def _written(value: Any) -> str:
    """As Megatron reads it: no list has blanks."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).replace(" ", "") if isinstance(value, list) else str(value)


def megatron_arguments(shape: ModelShape) -> dict[str, Any]:
    """What the arguments that decide what a model computes are for this one."""
    arguments = dict(PLAIN_ARGUMENTS)
    for flag, value in _flags(shape).items():
        if flag not in WITHOUT_MEANING:
            name = flag.removeprefix("--").replace("-", "_")
            arguments[name] = True if value is None else value
    arguments["layernorm_epsilon"] = arguments.pop("norm_epsilon")
    arguments["add_bias_linear"] = not arguments.pop("disable_bias_linear", False)
    if arguments.pop("no_yarn_correction_range_round_to_int", False):
        arguments["yarn_correction_range_round_to_int"] = False
    return arguments


def _flags(shape: ModelShape) -> dict[str, Any]:
    """The value of each flag, None where it takes none."""
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
    if shape.rotary_share != 1:
        flags["--rotary-percent"] = shape.rotary_share
    if shape.rotary_scaling is not None:
        flags["--use-rope-scaling"] = None
        flags["--rope-scaling-factor"] = shape.rotary_scaling
    if shape.latent is not None:
        flags |= _latent_flags(shape.latent, shape.yarn)
    elif shape.yarn is not None:
        flags["--position-embedding-type"] = "yarn"
        flags["--rotary-scaling-factor"] = shape.yarn.factor
        flags["--yarn-original-max-position-embeddings"] = shape.yarn.original_positions
        flags["--yarn-beta-fast"] = shape.yarn.beta_fast
        flags["--yarn-beta-slow"] = shape.yarn.beta_slow
        if not shape.yarn.rounds:
            flags["--no-yarn-correction-range-round-to-int"] = None
    if shape.activation_bound is not None:
        flags["--activation-func-clamp-value"] = shape.activation_bound
    if shape.without_rotary:
        flags["--no-rope-freq"] = [int(one) for one in shape.without_rotary]
    if shape.window is not None:
        flags["--window-size"] = (shape.window, 0)
    if shape.windowed:
        flags["--window-attn-skip-freq"] = [int(one) for one in shape.windowed]
    if not shape.tied:
        flags["--untie-embeddings-and-output-weights"] = None
    if shape.experts:
        flags["--num-experts"] = shape.experts
        flags["--moe-ffn-hidden-size"] = shape.expert_ffn
        flags["--moe-router-topk"] = shape.experts_per_token
        if not shape.normalised_routing:
            flags["--moe-router-pre-softmax"] = None
    if shape.dense_layers:
        dense = shape.dense_layers
        flags["--moe-layer-freq"] = [0] * dense + [1] * (shape.layers - dense)
    if shape.shared_ffn:
        flags["--moe-shared-expert-intermediate-size"] = shape.shared_ffn
    if shape.expert_groups:
        flags["--moe-router-num-groups"] = shape.expert_groups
        flags["--moe-router-group-topk"] = shape.chosen_groups
    if shape.routed_scaling is not None:
        flags["--moe-router-score-function"] = "sigmoid"
        flags["--moe-router-enable-expert-bias"] = None
        flags["--moe-router-topk-scaling-factor"] = shape.routed_scaling
    family = FAMILIES[shape.family]
    for flag in family.without:
        del flags[flag]
    extra = (flag for part in parts_of(shape) for flag in part.flags)
    for flag in (*family.flags, *extra):
        name, _, value = flag.partition(" ")
        flags[name] = _value(value)
    return flags


def _latent_flags(latent: Latent, yarn: Yarn | None) -> dict[str, Any]:
    """Those of latent attention, whose layers rotate by themselves."""
    flags: dict[str, Any] = {
        "--q-lora-rank": latent.query,
        "--kv-lora-rank": latent.key,
        "--qk-head-dim": latent.plain,
        "--qk-pos-emb-head-dim": latent.rotated,
        "--v-head-dim": latent.value,
        "--rope-type": "rope" if yarn is None else "yarn",
    }
    if yarn is not None:
        flags["--rotary-scaling-factor"] = yarn.factor
        flags["--mscale"] = yarn.mscale
        flags["--mscale-all-dim"] = yarn.mscale_all_dim
    return flags


def _value(word: str) -> str | float | None:
    """Of a flag in a family's table."""
    return float(word) if word.replace(".", "").isdigit() else word or None


def cautions(shape: ModelShape) -> list[str]:
    """What the Megatron model lacks, and what a script of one's own must do to build it: one
    sentence each."""
    found = []
    if shape.further_layers:
        found.append(
            f"the {shape.further_layers} layer(s) behind the last ({FURTHER_LAYERS}), which "
            "predict more tokens than the next, are left out, and on the way back as well."
        )
    if shape.rotary_scaling not in (None, DEFAULT_FACTOR):
        found.append(
            f"this model needs --rope-scaling-factor {shape.rotary_scaling:g}, which Megatron "
            "0.19's gpt_config_from_args drops; examples/pretrain_rmt.py passes it on, a script of "
            "your own must set config.rope_scaling_factor = args.rope_scaling_factor."
        )
    return found


def without_further_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` of a model whose layers behind the last are left out."""
    return {**config, FURTHER_LAYERS: 0} if config.get(FURTHER_LAYERS) else {**config}
