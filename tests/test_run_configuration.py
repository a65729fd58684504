"""Defaults of config.json, and what a training job's arguments make of it."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.tiny_checkpoints import TOOLS

sys.path.insert(0, str(TOOLS))

from conversion.model_config import (
    LLAMA3_SCALING,
    PLAIN_ARGUMENTS,
    TOKEN_IDS,
    megatron_arguments,
    megatron_flags,
    read_config,
)
from conversion.run_configuration import configuration_of_run, differences
from conversion.weight_names import FAMILIES

# What every config.json says.
SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 4096,
    "intermediate_size": 48,
    "num_attention_heads": 64,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SCALED = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, **LLAMA3_SCALING}
COMPANIONS = Path("beside")
LISTED = ["full_attention", "sliding_attention"]
WINDOWS = {"use_sliding_window": True, "sliding_window": 16, "layer_types": LISTED}


def config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    return {"model_type": family, **SIZES, **changes}


def run_of(described: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """The arguments of a job that trained what a config.json describes, some of them changed."""
    return megatron_arguments(read_config(described)) | {"lr": 1e-3} | changes


def exported(described: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """What is written instead of a config.json for a job that changed some arguments."""
    return configuration_of_run(described, run_of(described, **changes), COMPANIONS)


@pytest.mark.parametrize("family", FAMILIES)
def test_silent_configuration_means_what_it_means_to_transformers(family: str):
    from transformers import AutoConfig

    silent = config(family)
    # The ids that transformers takes are those of a model of another vocabulary.
    described = AutoConfig.for_model(**silent).to_dict() | dict.fromkeys(TOKEN_IDS)
    assert read_config(silent) == read_config(described)
    for default, value in FAMILIES[family].defaults.items():
        if default not in ("rope_theta", "rope_parameters", "sliding_window"):
            # transformers 5 has the share of a head among the rotary parameters.
            known = {**(described.get("rope_parameters") or {}), **described}
            assert known[default] == value, default


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("llama", "num_key_value_heads"),
        ("llama", "head_dim"),
        ("mistral", "head_dim"),
        ("mistral", "sliding_window"),
        ("mixtral", "head_dim"),
        ("qwen2", "num_key_value_heads"),
        ("qwen3", "num_key_value_heads"),
    ],
)
def test_null_means_what_it_means_to_transformers(family: str, key: str):
    """Where absence is one number for all models, null is one that follows from others."""
    from transformers import AutoConfig

    null = config(family, **{key: None})
    described = AutoConfig.for_model(**null).to_dict()
    assert read_config(null) == read_config(described)


def _parse(words: list[list[str]]) -> list[dict[str, Any]]:
    """Megatron's own arguments after each command line; without one for the last."""
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return [vars(parser.parse_args(line)) for line in words]


@pytest.mark.multiprocess
def test_arguments_are_those_of_megatrons_parser():
    described = [config(family, **EXPERTS) for family in FAMILIES]
    described += [config(rope_parameters={"rope_type": "yarn", "factor": 4.0})]
    described += [config(family, **WINDOWS) for family in ("mistral", "qwen2", "smollm3")]
    described += [config(rope_parameters=SCALED), config("qwen2", tie_word_embeddings=True)]
    shapes = [read_config(one) for one in described]
    (found,) = run_distributed(1, _parse, [[], *map(megatron_flags, shapes)])
    assert {name: found[0][name] for name in PLAIN_ARGUMENTS} == dict(PLAIN_ARGUMENTS)
    for shape, parsed in zip(shapes, found[1:], strict=True):
        expected = megatron_arguments(shape)
        assert expected.keys() == PLAIN_ARGUMENTS.keys()
        assert {name: parsed[name] for name in expected} == expected


@pytest.mark.parametrize(
    "described",
    [
        config(),
        config(rope_theta=1e4, rope_scaling=None),
        config(rope_parameters=SCALED),
        config("mistral", sliding_window=16),
        config("qwen2", sliding_window=16, use_sliding_window=True, max_window_layers=1),
        config("qwen3_moe", **EXPERTS),
    ],
)
def test_configuration_of_an_unchanged_job_is_kept_as_it_is(described: dict[str, Any]):
    assert exported(described) == described
    assert configuration_of_run(described, {}, COMPANIONS) == described


OLD, NEW = (
    config(rope_theta=1e4),
    config(rope_parameters={"rope_theta": 1e4, "rope_type": "default"}),
)


@pytest.mark.parametrize(
    ("described", "change", "written"),
    [
        (OLD, {"rotary_base": 10**6}, {"rope_theta": 10**6, "rope_scaling": None}),
        (config(), {"rotary_base": 10**6}, {"rope_theta": 10**6, "rope_scaling": None}),
        (
            NEW,
            {"rotary_base": 10**6},
            {"rope_parameters": {"rope_theta": 10**6, "rope_type": "default"}},
        ),
        (
            NEW,
            {"use_rope_scaling": True, "rope_scaling_factor": 32.0, "rotary_base": 500000},
            {"rope_parameters": SCALED},
        ),
        (
            OLD,
            {"use_rope_scaling": True, "rope_scaling_factor": 4.0},
            {
                "rope_theta": 10000,
                "rope_scaling": {"rope_type": "llama3", "factor": 4.0, **LLAMA3_SCALING},
            },
        ),
        (
            config(rope_parameters=SCALED),
            {"use_rope_scaling": False},
            {"rope_parameters": {"rope_theta": 500000, "rope_type": "default"}},
        ),
        (config(), {"layernorm_epsilon": 1e-4}, {"rms_norm_eps": 1e-4}),
        (config(), {"max_position_embeddings": 128}, {"max_position_embeddings": 128}),
        (
            config(tie_word_embeddings=True),
            {"untie_embeddings_and_output_weights": True},
            {"tie_word_embeddings": False},
        ),
        (config("mixtral", **EXPERTS), {"moe_router_topk": 1}, {"num_experts_per_tok": 1}),
        (
            config("qwen3_moe", **EXPERTS),
            {"moe_router_pre_softmax": False},
            {"norm_topk_prob": True},
        ),
    ],
)
def test_what_the_job_changed_is_written(
    described: dict[str, Any], change: dict[str, Any], written: dict[str, Any]
):
    found = exported(described, **change)
    assert found == {**described, **written}
    # And it is what the job trained.
    assert not differences(run_of(described, **change), megatron_arguments(read_config(found)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "windows",
    [
        {"use_sliding_window": True, "sliding_window": 16},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": LISTED},
        {"use_sliding_window": True, "sliding_window": 64},
        {"use_sliding_window": False, "sliding_window": 16},
    ],
)
def test_windows_are_those_of_transformers(family: str, windows: dict[str, Any]):
    """A layer sees that many tokens, itself among them, unless a context has no more."""
    from transformers import AutoConfig

    described = config(family, no_rope_layers=[1, 0], **windows)
    known = AutoConfig.for_model(**described)
    seen = getattr(known, "sliding_window", None)
    types = getattr(known, "layer_types", None) or ["sliding_attention"] * 2
    if FAMILIES[family].windows != "listed":
        types = ["sliding_attention"] * 2 if FAMILIES[family].windows else []
    windowed = [one == "sliding_attention" for one in types]
    if seen is None or seen >= 64 or not any(windowed):
        seen, windowed = None, []
    shape = read_config(described)
    assert shape.window == (None if seen is None else seen - 1)
    assert shape.windowed == (() if all(windowed) else tuple(windowed))


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_windows_that_the_job_changed_are_written(family: str):
    described = config(family, **WINDOWS)
    without = exported(described, window_size=None, max_position_embeddings=128)
    assert without["max_position_embeddings"] == 128
    assert without["sliding_window"] is None
    assert read_config(without).window is None
    wider = exported(described, window_size=(31, 0), window_attn_skip_freq=None)
    assert wider["sliding_window"] == 32
    assert read_config(wider).window == 31
    assert not read_config(wider).windowed
    some = {"window_size": (31, 0), "window_attn_skip_freq": 2}
    if family == "mistral":
        with pytest.raises(ValueError, match=r"window_attn_skip_freq=.* cannot be made to say of"):
            exported(described, **some)
    else:
        assert exported(described, **some)["layer_types"] == LISTED[::-1]
    with pytest.raises(ValueError, match=r"window_size=.* cannot be made to say of"):
        exported(described, window_size=(31, 4))


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"num_attention_heads": 32}),
        ("llama", {"num_query_groups": 8, "kv_channels": 512}),
        ("llama", {"num_layers": 3}),
        ("llama", {"hidden_size": 64}),
        ("llama", {"ffn_hidden_size": 64}),
        ("llama", {"vocab_size": 200}),
        ("llama", {"group_query_attention": False, "num_attention_heads": 32}),
        ("llama", {"swiglu": False}),
        ("llama", {"squared_relu": True}),
        ("llama", {"normalization": "LayerNorm"}),
        ("llama", {"layernorm_zero_centered_gamma": True}),
        ("llama", {"rotary_percent": 0.5}),
        ("llama", {"rotary_interleaved": True}),
        ("llama", {"rotary_seq_len_interpolation_factor": 2}),
        ("llama", {"position_embedding_type": "none"}),
        ("llama", {"no_rope_freq": 4}),
        ("llama", {"softmax_type": "learnable"}),
        ("llama", {"attention_output_gate": True}),
        ("llama", {"window_size": (16, 0)}),
        ("llama", {"use_mup": True}),
        ("gpt_oss", {"softmax_type": "off-by-one"}),
        ("gpt_oss", {"rotary_scaling_factor": 2.0}),
        ("gpt_oss", {"add_bias_linear": False}),
        ("gpt_oss", {"moe_router_pre_softmax": True}),
        ("llama", {"num_experts": 8}),
        ("qwen2", {"add_qkv_bias": False}),
        ("qwen3", {"qk_l2_norm": True}),
        ("mixtral", {"moe_router_pre_softmax": True}),
        ("mixtral", {"moe_router_score_function": "sigmoid"}),
        ("mixtral", {"moe_router_topk_scaling_factor": 2.5}),
        ("mixtral", {"moe_layer_freq": [0, 1]}),
        ("qwen3_moe", {"moe_ffn_hidden_size": 32}),
        ("qwen3_moe", {"moe_shared_expert_intermediate_size": 64}),
    ],
)
def test_what_config_json_cannot_say_is_refused_by_name(family: str, change: dict[str, Any]):
    described = config(family, **EXPERTS)
    with pytest.raises(ValueError, match=r"HF_DIR, or train without these flags") as caught:
        exported(described, **change)
    for name in change.keys() - {"group_query_attention"}:
        assert f"{name}={change[name]!r} (config.json means " in str(caught.value)


def test_arguments_that_mean_nothing_in_the_job_are_not_compared():
    described = config()
    for change in (
        {"moe_router_topk": 8, "moe_ffn_hidden_size": 7},
        {"rope_scaling_factor": 32.0},
        {"vocab_size": None},
        {"group_query_attention": False, "num_query_groups": 1},
    ):
        assert exported(described, **change) == described, change
    experts = config("qwen3_moe", **EXPERTS)
    assert exported(experts, ffn_hidden_size=7, moe_layer_freq=[1, 1]) == experts


def test_arguments_of_another_version_of_megatron_are_compared_where_they_are():
    described = config()
    run = run_of(described, rotary_base=7)
    for name in ("no_rope_freq", "use_mup", "layernorm_epsilon"):
        del run[name]
    found = configuration_of_run(described, run, COMPANIONS)
    assert found == {**described, "rope_theta": 7, "rope_scaling": None}
