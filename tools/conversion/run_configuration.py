"""The configuration of the model that a training job trained: what its arguments say counts.

A job starts from the flags of a converted checkpoint and may change them: a larger rotary base for
longer contexts, another norm epsilon, more positions. The ``config.json`` that lies beside the
checkpoint is that of the start.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversion.mismatch import summary
from conversion.model_config import (
    LLAMA3_SCALING,
    OF_EXPERTS,
    OF_YARN,
    PLAIN_ARGUMENTS,
    WITH_EXPERTS_ALONE,
    megatron_arguments,
    read_config,
)
from conversion.weight_names import FAMILIES

# Argument, value of the run, value of the model.
Differences = dict[str, tuple[object, object]]


def differences(run: Mapping[str, Any], model: Mapping[str, Any]) -> Differences:
    """The arguments that decide what a model computes and differ between a run and a model.

    An argument that one of them lacks, as in another version of Megatron, is taken to agree.
    """
    run, model = _meaning(run), _meaning(model)
    return {
        name: (run[name], value)
        for name, value in model.items()
        if name in run and not _is_equal(run[name], value)
    }


def _meaning(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that decide what a model computes, without those that others make void."""
    found = {name: arguments[name] for name in PLAIN_ARGUMENTS if name in arguments}
    if not found.get("group_query_attention", True):
        found["group_query_attention"] = True
        found["num_query_groups"] = found.get("num_attention_heads")
    if "window_size" in found:
        found["window_attn_skip_freq"] = _windowed(found)
    frequency = found.get("moe_layer_freq")
    if isinstance(frequency, list) and all(step == 1 for step in frequency):
        found["moe_layer_freq"] = 1
    if found.get("vocab_size") is None:
        found.pop("vocab_size", None)
    if found.get("position_embedding_type") != "yarn":
        for name in [name for name in found if name.startswith(OF_YARN)]:
            del found[name]
    if not found.get("use_rope_scaling"):
        found.pop("rope_scaling_factor", None)
    if found.get("num_experts"):
        if found.get("moe_layer_freq") == 1:
            # Experts in every layer leave no other MLP.
            found.pop("ffn_hidden_size", None)
        return found
    return {name: value for name, value in found.items() if not name.startswith(OF_EXPERTS)}


def _windowed(arguments: Mapping[str, Any]) -> list[int]:
    """1 for each layer that has a window, else 0; empty without windows."""
    if not arguments["window_size"]:
        return []
    skip, layers = arguments.get("window_attn_skip_freq"), range(arguments["num_layers"])
    if isinstance(skip, int):
        return [int((layer + 1) % skip != 0) for layer in layers]
    return [1 for _ in layers] if skip is None else skip


def _is_equal(first: object, second: object) -> bool:
    """Whether two values of an argument mean the same; floats may have passed through text."""
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-9)
    return first == second


def configuration_of_run(
    config: Mapping[str, Any], run: Mapping[str, Any], companions: Path
) -> dict[str, Any]:
    """``config.json`` as it is right for the weights that a training job saved.

    Args:
        config: What lies beside the checkpoint.
        run: The job's arguments; empty: a converted checkpoint, which is as ``config`` says.
        companions: Where ``config`` is from, for messages.

    Raises:
        ValueError: The job trained a model of other sizes, or one that ``config.json`` has no form
            for.
    """
    shape = read_config(config)
    different = differences(run, megatron_arguments(shape))
    config = dict(config)
    for write in (_write_rotary, _write_windows, _write_others):
        write(config, run, different)
    if different:
        named = [
            f"{name}={trained!r} (config.json means {described!r})"
            for name, (trained, described) in different.items()
        ]
        raise ValueError(
            f"The training job had {summary(named)}, which {companions / 'config.json'} cannot be "
            f"made to say of this {shape.family} model; name the original model with --tokenizer "
            "HF_DIR, or train without these flags."
        )
    return config


def _write_rotary(config: dict[str, Any], run: Mapping[str, Any], different: Differences) -> None:
    """Write base and scaling of the rotary embedding where transformers 4, or 5, has them."""
    names = ("rotary_base", "use_rope_scaling", "rope_scaling_factor")
    changed = [name for name in names if different.pop(name, None)]
    if not changed:
        return
    rope: dict[str, Any] = {"rope_type": "default"}
    if run.get("use_rope_scaling"):
        factor = run.get("rope_scaling_factor")
        rope = {"rope_type": "llama3", "factor": factor, **LLAMA3_SCALING}
    if config.get("rope_parameters"):
        config.pop("rope_scaling", None)
        config["rope_parameters"] = {"rope_theta": run.get("rotary_base"), **rope}
    else:
        config["rope_theta"] = run.get("rotary_base")
        config["rope_scaling"] = rope if run.get("use_rope_scaling") else None


def _write_windows(config: dict[str, Any], run: Mapping[str, Any], different: Differences) -> None:
    """Write the sliding window, and which layers have it."""
    names = ("window_size", "window_attn_skip_freq")
    changed = {name: different[name] for name in names if name in different}
    family, layers = FAMILIES[config["model_type"]], config["num_hidden_layers"]
    has_window = _windowed(run) if changed else []
    writable = family.windows == "listed" or has_window in ([], [1] * layers)
    writable = writable and (not has_window or run["window_size"][1] == 0)
    if not changed or not family.windows or not writable:
        return
    for name in changed:
        different.pop(name)
    config["sliding_window"] = run["window_size"][0] + 1 if has_window else None
    if family.window_switch:
        config[family.window_switch] = bool(has_window)
    if family.windows == "listed":
        types = ("full_attention", "sliding_attention")
        config["layer_types"] = [types[one] for one in has_window or [0] * layers]


def _write_others(config: dict[str, Any], run: Mapping[str, Any], different: Differences) -> None:
    if different.pop("max_position_embeddings", None):
        config["max_position_embeddings"] = run["max_position_embeddings"]
    if different.pop("layernorm_epsilon", None):
        config["rms_norm_eps"] = run["layernorm_epsilon"]
    if different.pop("untie_embeddings_and_output_weights", None):
        config["tie_word_embeddings"] = not run["untie_embeddings_and_output_weights"]
    if different.pop("moe_router_topk", None):
        config["num_experts_per_tok"] = run["moe_router_topk"]
    alone = config["model_type"] in WITH_EXPERTS_ALONE
    if not alone and different.pop("moe_router_pre_softmax", None):
        config["norm_topk_prob"] = not run["moe_router_pre_softmax"]
