"""Hugging Face to Megatron and back: bit-equal weights, equal logits, clear refusals."""

import argparse
import enum
import importlib.util
import json
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from tests.distributed import run_distributed
from tests.tiny_checkpoints import (
    EXPERTS,
    LATENT,
    MODELS,
    TOKENS,
    TOOLS,
    UNEVEN,
    WORDS,
    assert_bit_equal,
    tensors,
)

sys.path.insert(0, str(TOOLS))

import convert_checkpoint
import model_on_hand
from conversion import weight_names
from conversion.checkpoint_logits import build_megatron_model, megatron_logits
from conversion.model_config import megatron_arguments, read_config

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def models(tiny_checkpoints: Path) -> Path:
    """A directory with one Hugging Face directory, and a file of logits, for each model."""
    return tiny_checkpoints


@pytest.fixture(scope="module")
def converted(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one Megatron directory for each model."""
    root = tmp_path_factory.mktemp("megatron")
    for name in MODELS:
        convert_checkpoint.to_megatron(models / name, root / name)
    return root


def _logits(
    directories: list[str], flags: list[str]
) -> list[tuple[torch.Tensor | None, list[str]]]:
    """Megatron's logits, and its checkpoint's keys, of several models, on the same ranks."""
    torch.set_num_threads(1)
    found = []
    for directory in directories:
        model = build_megatron_model(Path(directory), TOKENS, flags)
        found.append((megatron_logits(model, torch.arange(TOKENS)[None]), _keys_of(model)))
        _forget_megatron()
    return found


def _forget_megatron() -> None:
    """Let Megatron be initialised once more in this process."""
    from megatron.core import parallel_state, rerun_state_machine
    from megatron.training import global_vars

    global_vars.unset_global_variables()
    rerun_state_machine.destroy_rerun_state_machine()
    parallel_state.destroy_model_parallel()


def _keys_of(model: torch.nn.Module) -> list[str]:
    """The keys, of tensors and of objects, under which Megatron itself would save a model."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories
    from megatron.training import get_args
    from megatron.training.checkpointing import _build_sharded_state_dict_metadata

    state = model.sharded_state_dict(metadata=_build_sharded_state_dict_metadata(get_args()))
    apply_factories(state)
    return [
        value.unique_key if isinstance(value, ShardedObject) else value.key
        for value in nested_values(state)
    ]


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_equal(models: Path, converted: Path, tmp_path: Path, name: str):
    convert_checkpoint.to_huggingface(converted / name, tmp_path / "back")
    assert_bit_equal(tensors(tmp_path / "back"), tensors(models / name))
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (models / name / "config.json").read_text()
    )
    assert (tmp_path / "back/tokenizer.json").exists()
    generation = json.loads((tmp_path / "back/generation_config.json").read_text())
    assert generation["eos_token_id"] == 1


Found = Mapping[str, list[tuple[torch.Tensor | None, list[str]]]]


def run_megatron(
    converted: Path,
    names: Sequence[str],
    ranks: int,
    *flags: str,
    run: Callable[[list[str], list[str]], Any] = _logits,
) -> Found:
    """For each model, what every rank found."""
    directories = [str(converted / name) for name in names]
    by_rank = run_distributed(ranks, run, directories, list(flags))
    return {name: [found[i] for found in by_rank] for i, name in enumerate(names)}


def assert_logits_are_those_of_transformers(models: Path, found: Found) -> None:
    """On the last rank, to 1e-5, with the same most probable token everywhere."""
    for name, by_rank in found.items():
        logits, _ = by_rank[-1]
        expected = torch.load(models / f"{name}.pt")
        assert expected.std() > 0.3
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5, msg=name)
        assert torch.equal(logits.argmax(-1), expected.argmax(-1)), name


@pytest.fixture(scope="module")
def alone(converted: Path) -> Found:
    """All models on one rank."""
    return run_megatron(converted, MODELS, 1)


def test_megatron_gives_the_logits_of_transformers(models: Path, alone: Found):
    assert_logits_are_those_of_transformers(models, alone)


def written_keys(converted: Path, name: str) -> set[str]:
    """What the converter writes beside Megatron's common state."""
    weights = convert_checkpoint.MegatronWeights(converted / name / "release")
    return weights.keys() - {"common_state/shard_0_1"}


def test_keys_are_those_of_megatrons_local_specification(converted: Path, alone: Found):
    for name, [(_, keys)] in alone.items():
        spare = written_keys(converted, name) - set(keys)
        assert not set(keys) - written_keys(converted, name), name
        # Local norms and sinks have no state, those of Transformer Engine have; see also
        # Weight.alias.
        own = ("layernorm._extra_state", "core_attention._extra_state")
        others = {key for key in spare if not any(name in key for name in own)}
        norms = {PRE_MLP_NORM} if name in EXPERTS else set()
        if name in UNEVEN:
            norms = {numbered(PRE_MLP_NORM, layer) for layer in (1, 2, 3)}
        if name in LATENT:
            projections = ("linear_q_up_proj", "linear_kv_up_proj")
            norms = {f"{ATTENTION}.{part}.layer_norm_weight" for part in projections}
            norms |= {"decoder.layers.mlp.linear_fc1.layer_norm_weight"}
            norms = {numbered(key, layer) for key in norms for layer in range(4)}
        assert others == norms, name


# Keys of ``GPTModel.sharded_state_dict`` with ``get_gpt_layer_with_transformer_engine_spec``, taken
# from Transformer Engine 2.20.2's Python modules. [] stands for the shards of an object.
PRE_MLP_NORM = "decoder.layers.pre_mlp_layernorm.weight"
ATTENTION = "decoder.layers.self_attention"
TRANSFORMER_ENGINE = f"""
embedding.word_embeddings.weight decoder.final_layernorm.weight
decoder.final_layernorm._extra_state[]
{ATTENTION}.linear_proj._extra_state[] {ATTENTION}.linear_proj.weight
{ATTENTION}.linear_qkv._extra_state[] {ATTENTION}.linear_qkv.layer_norm_weight
{ATTENTION}.linear_qkv.weight"""
DENSE_MLP = """
decoder.layers.mlp.linear_fc1._extra_state[] decoder.layers.mlp.linear_fc1.layer_norm_weight
decoder.layers.mlp.linear_fc1.weight decoder.layers.mlp.linear_fc2._extra_state[]
decoder.layers.mlp.linear_fc2.weight"""
EXPERT_MLP = f"""
decoder.layers.mlp.router.weight {PRE_MLP_NORM} decoder.layers.pre_mlp_layernorm._extra_state[]
decoder.layers.mlp.experts.experts.linear_fc1._extra_state[]
decoder.layers.mlp.experts.experts.linear_fc1.weight
decoder.layers.mlp.experts.experts.linear_fc2._extra_state[]
decoder.layers.mlp.experts.experts.linear_fc2.weight"""
BIASES_AND_SINKS = f"""
{ATTENTION}.linear_qkv.bias {ATTENTION}.linear_proj.bias {ATTENTION}.core_attention.softmax_offset
{ATTENTION}.core_attention._extra_state[]
decoder.layers.mlp.router.bias decoder.layers.mlp.experts.experts.linear_fc1.bias
decoder.layers.mlp.experts.experts.linear_fc2.bias"""
QUERY_KEY_NORMS = f"""
{ATTENTION}.q_layernorm.weight {ATTENTION}.q_layernorm._extra_state[]
{ATTENTION}.k_layernorm.weight {ATTENTION}.k_layernorm._extra_state[]"""


LATENT_ATTENTION = f"""
decoder.layers.input_layernorm.weight decoder.layers.input_layernorm._extra_state[]
{ATTENTION}.linear_proj.weight {ATTENTION}.linear_proj._extra_state[]
{ATTENTION}.linear_q_down_proj.weight {ATTENTION}.linear_q_down_proj._extra_state[]
{ATTENTION}.linear_q_up_proj.weight {ATTENTION}.linear_q_up_proj._extra_state[]
{ATTENTION}.linear_q_up_proj.layer_norm_weight
{ATTENTION}.linear_kv_down_proj.weight {ATTENTION}.linear_kv_down_proj._extra_state[]
{ATTENTION}.linear_kv_up_proj.weight {ATTENTION}.linear_kv_up_proj._extra_state[]
{ATTENTION}.linear_kv_up_proj.layer_norm_weight"""
SHARED_EXPERTS = """
decoder.layers.mlp.router.expert_bias
decoder.layers.mlp.shared_experts.linear_fc1._extra_state[]
decoder.layers.mlp.shared_experts.linear_fc1.weight
decoder.layers.mlp.shared_experts.linear_fc2._extra_state[]
decoder.layers.mlp.shared_experts.linear_fc2.weight"""


def numbered(key: str, layer: int) -> str:
    """The key of one layer, where layers differ from one another."""
    return key.replace("decoder.layers.", f"decoder.layers.{layer}.")


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("gpt-oss", EXPERT_MLP + BIASES_AND_SINKS + " output_layer.weight"),
        ("llama", DENSE_MLP + " output_layer.weight"),
        ("smollm2", DENSE_MLP),
        ("mistral", DENSE_MLP + " output_layer.weight"),
        ("qwen2", DENSE_MLP + f" {ATTENTION}.linear_qkv.bias"),
        ("qwen3", DENSE_MLP + QUERY_KEY_NORMS + " output_layer.weight"),
        ("mixtral", EXPERT_MLP + " output_layer.weight"),
        ("qwen3-moe", EXPERT_MLP + QUERY_KEY_NORMS + " output_layer.weight"),
    ],
)
def test_keys_are_those_of_the_transformer_engine_specification(
    converted: Path, name: str, keys: str
):
    expected = set((TRANSFORMER_ENGINE + keys).split())
    written = {re.sub(r"/shard_.*", "[]", key) for key in written_keys(converted, name)}
    alias = {"decoder.layers.mlp.linear_fc1.layer_norm_weight"} if name in EXPERTS else set()
    assert written - alias == expected


@pytest.mark.parametrize("name", UNEVEN)
def test_layers_that_differ_have_keys_of_their_own(converted: Path, name: str):
    """As the Transformer Engine specification has them."""
    attention = TRANSFORMER_ENGINE + f" {ATTENTION}.linear_qkv.bias"
    attention += QUERY_KEY_NORMS if name == "glm-4.5" else ""
    # What the local specification has elsewhere.
    spare = {numbered("decoder.layers.mlp.linear_fc1.layer_norm_weight", n) for n in (1, 2, 3)}
    if name in LATENT:
        attention = LATENT_ATTENTION
        spare |= {
            numbered(f"{ATTENTION}.{k}_layernorm.weight", n) for k in ["q", "kv"] for n in range(4)
        }
        spare.add(numbered(PRE_MLP_NORM, 0))
    expected = {"embedding.word_embeddings.weight", "output_layer.weight"}
    expected |= {f"decoder.final_layernorm.{key}" for key in ("weight", "_extra_state[]")}
    for layer in range(4):
        mlp = EXPERT_MLP + SHARED_EXPERTS if layer else DENSE_MLP
        expected |= {numbered(key, layer) for key in (attention + mlp).split()}
    written = {re.sub(r"/shard_.*", "[]", key) for key in written_keys(converted, name)}
    assert written - expected == spare
    assert not expected - written


def _loaded_keys(directories: list[str], flags: list[str]) -> list[tuple[None, list[str]]]:
    """``_logits`` of a model that is loaded and cannot run."""
    found = []
    for directory in directories:
        # Megatron asks before it takes the products of all experts together.
        with mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)):
            model = build_megatron_model(Path(directory), TOKENS, flags)
        found.append((None, _keys_of(model)))
        _forget_megatron()
    return found


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine_torch") is None,
    reason="Transformer Engine's extension for PyTorch is not installed (docs/null-device.md)",
)
def test_transformer_engines_layers_load_every_model(converted: Path):
    flags = ("--transformer-impl", "transformer_engine", "--moe-grouped-gemm")
    for name, [(_, keys)] in run_megatron(converted, MODELS, 1, *flags, run=_loaded_keys).items():
        assert not set(keys) - written_keys(converted, name), name


def test_logits_are_those_of_transformers_at_tensor_parallel_size_2(models: Path, converted: Path):
    names = [name for name in MODELS if name not in ("smollm2", "gpt-oss")]
    flags = ("--tensor-model-parallel-size", "2")
    assert_logits_are_those_of_transformers(models, run_megatron(converted, names, 2, *flags))
    # Megatron splits no experts that have biases.
    flags = (*flags, "--expert-tensor-parallel-size", "1")
    found = run_megatron(converted, ["gpt-oss"], 2, *flags)
    assert_logits_are_those_of_transformers(models, found)


def test_logits_are_those_of_transformers_at_pipeline_parallel_size_2(
    models: Path, converted: Path
):
    flags = ("--pipeline-model-parallel-size", "2")
    assert_logits_are_those_of_transformers(models, run_megatron(converted, MODELS, 2, *flags))


def test_logits_are_those_of_transformers_at_expert_parallel_size_2(models: Path, converted: Path):
    flags = ("--expert-model-parallel-size", "2")
    assert_logits_are_those_of_transformers(models, run_megatron(converted, EXPERTS, 2, *flags))


def _train_and_save(jobs: list[tuple[str, str, list[str]]], own: object = None) -> None:
    """For each job one optimizer step of learning rate 0, saved as iteration 7.

    ``own`` is kept among the arguments, as a script may keep what it likes.
    """
    torch.set_num_threads(1)
    # Megatron saves through a process of its own, which a daemon, such as this rank, may not start.
    multiprocessing.current_process()._config["daemon"] = False
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    for checkpoint, save, flags in jobs:
        _step_and_save(checkpoint, save, flags, own)
        _forget_megatron()


def _step_and_save(checkpoint: str, save: str, flags: list[str], own: object) -> None:
    words = shlex.split(convert_checkpoint.flags_of(Path(checkpoint)))
    words += shlex.split(
        f"--load {checkpoint} --finetune --save {save} --save-interval 1 --ckpt-format torch_dist "
        "--micro-batch-size 1 --lr 0 --train-iters 9 --seq-length 16"
    )
    words += flags
    from megatron_rmt.cpu import platform as cpu_platform

    sys.argv[1:] = cpu_platform.add_required_flags(words)

    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import get_args, initialize
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.checkpointing import save_checkpoint
    from megatron.training.models.gpt import GPTModelBuilder
    from megatron.training.training import setup_model_and_optimizer

    def build(pre_process: bool = True, post_process: bool = True, **kwargs: object):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        builder = GPTModelBuilder(gpt_config_from_args(get_args()))
        return builder.build_model(groups, pre_process, post_process)

    parse_and_validate_args()
    get_args().own = own
    initialize._compile_dependencies = lambda: None
    initialize.initialize_megatron()
    model, optimizer, scheduler = setup_model_and_optimizer(ModelType.encoder_or_decoder, build)
    for parameter in model[0].parameters():
        parameter.main_grad.fill_(1.0)
    optimizer.step()
    save_checkpoint(7, model, optimizer, scheduler, 0)


JOBS = {
    "qwen2": ["--tensor-model-parallel-size", "2"],
    "llama": ["--pipeline-model-parallel-size", "2"],
    "mixtral": ["--expert-model-parallel-size", "2"],
    "glm-4.5-air": ["--expert-model-parallel-size", "2"],
}


def test_checkpoints_of_training_jobs_with_optimizer_state_convert_back(
    models: Path, converted: Path, tmp_path: Path
):
    jobs = [
        (str(converted / name), str(tmp_path / name), [*flags, "--use-distributed-optimizer"])
        for name, flags in JOBS.items()
    ]
    run_distributed(2, _train_and_save, jobs)
    for name in JOBS:
        saved = convert_checkpoint.MegatronWeights(tmp_path / name / "iter_0000007")
        assert any("optimizer" in key for key in saved.stored)
        # The job saved beside the converted checkpoint: its arguments lead to config.json.
        back = tmp_path / f"{name}-back"
        convert_checkpoint.to_huggingface(tmp_path / name, back, iteration=7)
        assert_bit_equal(tensors(back), tensors(models / name))
        note = json.loads((back / "provenance.json").read_text())
        assert note["source"] == str(tmp_path / name)
        assert note["iteration"] == 7
        assert note["training"]["load"] == str(converted / name)
        assert "rmt" not in note


def _train_with_own_class(checkpoint: str, save: str, flags: list[str]) -> None:
    """Train, with an argument whose class no other process can import."""
    module = types.ModuleType("company_modes")
    module.Mode = enum.Enum("Mode", {"SLOW": "slow"}, module=module.__name__)
    sys.modules[module.__name__] = module
    _train_and_save([(checkpoint, save, flags)], module.Mode.SLOW)


def test_what_a_training_job_changed_is_exported_and_verified(
    models: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    saved, start = tmp_path / "saved", converted / "llama"
    flags = ["--rotary-base", "50000", "--norm-epsilon", "0.01", "--max-position-embeddings", "96"]
    run_distributed(1, _train_with_own_class, str(start), str(saved), flags)
    (tmp_path / "text").write_text(WORDS)
    words = ["to-huggingface", "--source", str(saved), "--verify"]
    words += ["--verify-text", str(tmp_path / "text"), "--target"]
    convert_checkpoint.main([*words, str(tmp_path / "back")])
    output = capsys.readouterr().out
    assert float(output.split("largest difference ")[1].split(",")[0]) < 1e-5
    assert "same argmax 100.0%" in output
    before = json.loads((models / "llama/config.json").read_text())
    after = json.loads((tmp_path / "back/config.json").read_text())
    rotary = before["rope_parameters"] | {"rope_theta": 50000}
    assert before["rope_parameters"] != rotary
    assert after == before | {
        "rope_parameters": rotary,
        "rms_norm_eps": 0.01,
        "max_position_embeddings": 96,
    }
    assert_bit_equal(tensors(tmp_path / "back"), tensors(models / "llama"))

    convert_checkpoint.main(["flags", str(saved)])
    assert "--rotary-base 50000" in capsys.readouterr().out
    # Megatron is not started with the flags of the start.
    described = megatron_arguments(read_config(before))
    args = argparse.Namespace(**described, load=str(saved), ckpt_step=None)
    with pytest.raises(ValueError, match=r"with rotary_base=50000 \(10000\), layernorm_epsilon="):
        model_on_hand._check_arguments_of_run(args)
    args.rotary_base, args.layernorm_epsilon = 50000, 0.01
    model_on_hand._check_arguments_of_run(args)

    # Other heads of the same rows.
    other = shutil.copytree(models / "llama", tmp_path / "other")
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    (other / "config.json").write_text(json.dumps(before | heads))
    with pytest.raises(SystemExit, match=r"num_attention_heads=4 \(config.json means 8\)"):
        convert_checkpoint.main([*words, str(tmp_path / "wrong"), "--tokenizer", str(other)])
    assert not (tmp_path / "wrong").exists()


def test_verify_compares_the_way_back_of_a_mixture_of_experts(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "text").write_text(WORDS)
    words = ["to-huggingface", "--source", str(converted / "mixtral"), "--verify"]
    words += ["--verify-text", str(tmp_path / "text"), "--target", str(tmp_path / "back")]
    convert_checkpoint.main(words)
    output = capsys.readouterr().out
    # The model has positions for no more.
    assert "logits of 64 tokens" in output
    assert float(output.split("largest difference ")[1].split(",")[0]) < 1e-5
    assert "same argmax 100.0%" in output


def test_weights_larger_than_one_file_are_indexed_and_read_again(converted: Path, tmp_path: Path):
    convert_checkpoint.to_huggingface(converted / "qwen3", tmp_path / "one")
    convert_checkpoint.to_huggingface(converted / "qwen3", tmp_path / "many", shard_bytes=20_000)
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 3
    convert_checkpoint.to_megatron(tmp_path / "many", tmp_path / "again")
    convert_checkpoint.to_huggingface(tmp_path / "again", tmp_path / "back")
    assert_bit_equal(tensors(tmp_path / "back"), tensors(tmp_path / "one"))


def test_bfloat16_rounds_once(models: Path, tmp_path: Path):
    convert_checkpoint.to_megatron(models / "qwen2", tmp_path / "half", dtype="bfloat16")
    convert_checkpoint.to_huggingface(tmp_path / "half", tmp_path / "back")
    rounded = {name: value.bfloat16() for name, value in tensors(models / "qwen2").items()}
    assert_bit_equal(tensors(tmp_path / "back"), rounded)
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"


def test_rotary_factor_that_megatron_drops_is_cautioned_about(
    converted: Path, capsys: pytest.CaptureFixture[str]
):
    for name, words in (("llama3.1", "8.0"), ("llama3.2", "32.0")):
        convert_checkpoint.main(["flags", str(converted / name)])
        printed = capsys.readouterr()
        assert f"--use-rope-scaling --rope-scaling-factor {words} " in printed.out
        assert ("config.rope_scaling_factor = args" in printed.err) == (name == "llama3.2")


def test_layers_that_predict_more_tokens_are_left_out_and_said_to_be(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = tmp_path / "source"
    shutil.copytree(models / "glm-4.5-air", source)
    weights = tensors(source)
    further = {"eh_proj.weight": torch.ones(32, 64), "enorm.weight": torch.ones(32)}
    behind = {f"model.layers.4.{name}": value.bfloat16() for name, value in further.items()}
    save_file(weights | behind, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    words = ("--source", str(source), "--target", str(tmp_path / "megatron"))
    convert_checkpoint.main(["to-megatron", *words])
    said = capsys.readouterr().err
    assert "the 1 layer(s) behind the last (num_nextn_predict_layers), which predict" in said
    convert_checkpoint.to_huggingface(tmp_path / "megatron", tmp_path / "back")
    assert_bit_equal(tensors(tmp_path / "back"), weights)
    assert json.loads((tmp_path / "back/config.json").read_text()) == config


def test_the_bias_of_a_router_keeps_its_precision(models: Path, tmp_path: Path):
    convert_checkpoint.to_megatron(models / "glm-4.5", tmp_path / "half", dtype="bfloat16")
    convert_checkpoint.to_huggingface(tmp_path / "half", tmp_path / "back")
    (name,) = {n for n in tensors(tmp_path / "back") if "layers.1" in n and "correction" in n}
    assert torch.equal(tensors(tmp_path / "back")[name], tensors(models / "glm-4.5")[name])
    # What the model's own files mix is no reason to ask for a dtype.
    convert_checkpoint.to_megatron(tmp_path / "back", tmp_path / "again")
    convert_checkpoint.to_huggingface(tmp_path / "again", tmp_path / "same")
    assert_bit_equal(tensors(tmp_path / "same"), tensors(tmp_path / "back"))


def test_flags_follow_a_moved_checkpoint(converted: Path, tmp_path: Path):
    shutil.copytree(converted / "llama", tmp_path / "moved")
    assert str(tmp_path / "moved/huggingface") in convert_checkpoint.flags_of(tmp_path / "moved")


def test_qkv_rows_are_queries_key_value_of_each_group_in_turn():
    shape = read_config(
        {
            "model_type": "llama",
            "num_hidden_layers": 1,
            "hidden_size": 5,
            "intermediate_size": 7,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "vocab_size": 11,
            "max_position_embeddings": 8,
            "rms_norm_eps": 1e-5,
        }
    )
    query, key, value = torch.randn(24, 5), torch.randn(8, 5), torch.randn(8, 5)
    rows = []
    for group in range(2):
        for head in range(3 * group, 3 * group + 3):
            rows += [query[4 * head + i] for i in range(4)]
        rows += [key[4 * group + i] for i in range(4)]
        rows += [value[4 * group + i] for i in range(4)]
    (weight,) = (w for w in weight_names.ATTENTION if w.megatron.endswith("linear_qkv.weight"))
    names = weight.names((0,))
    parts = dict(zip(names, (query, key, value), strict=True))
    packed = weight.pack(parts.__getitem__, (0,), shape, torch.float32)
    assert torch.equal(packed, torch.stack(rows))
    for part, original in zip(weight.unpack(packed, shape), (query, key, value), strict=True):
        assert torch.equal(part, original)


@pytest.mark.parametrize(
    ("vocabulary", "groups", "padded"), [(49152, 3, 49152), (151936, 8, 151936), (100, 3, 384)]
)
def test_padded_vocabulary_suits_every_tensor_parallel_size(
    vocabulary: int, groups: int, padded: int
):
    shape = weight_names.ModelShape(
        family="llama", layers=1, hidden=1, ffn=1, heads=groups, groups=groups, head=1,
        vocabulary=vocabulary, tied=True, maximum_positions=1, norm_epsilon=1e-5,
        rotary_base=10000, rotary_scaling=None,
    )  # fmt: skip
    assert shape.padded_vocabulary == padded
