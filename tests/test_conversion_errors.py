"""Spoiled Hugging Face models: one sentence each, and nothing left behind."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.spoiled_models import (
    GATE,
    INDEX,
    LLAMA3,
    NORM,
    ONE,
    SECOND,
    Spoil,
    cast_all,
    config,
    copy_shard,
    distcp,
    edit_bytes,
    edit_json,
    edit_tensors,
    frequencies,
    pickled,
    pipe,
    plant_code,
    refuse,
    remove,
    rename,
    rotary_base,
    shards,
    spoil_value,
    write,
)
from tests.tiny_checkpoints import TOOLS, tensors

sys.path.insert(0, str(TOOLS))

import convert_checkpoint

pytestmark = pytest.mark.faults


HUGGING_FACE_CASES: dict[str, tuple[Spoil, str]] = {
    # Files.
    "half a file": (edit_bytes(ONE, lambda b: b[: len(b) // 2]), "not a complete safetensors"),
    "last byte missing": (edit_bytes(ONE, lambda b: b[:-1]), "not a complete safetensors"),
    "header cut": (edit_bytes(ONE, lambda b: b[:4]), "not a complete safetensors"),
    "empty file": (edit_bytes(ONE, lambda b: b""), "not a complete safetensors"),
    "garbage": (edit_bytes(ONE, lambda b: b"\xff" * 64 + b[64:]), "not a complete safetensors"),
    "no weights": (remove(ONE), "holds no weights"),
    "shard missing": (shards(remove(SECOND)), f"{SECOND} is missing, but .*index.json names it"),
    "shard cut": (shards(edit_bytes(SECOND, lambda b: b[:-9])), f"{SECOND} is not a complete"),
    "shards overlap": (shards(copy_shard), "is in both model-00001-of-00002"),
    "index not JSON": (shards(write(INDEX, "{")), "index.json is not valid JSON"),
    "index empty": (shards(write(INDEX, "{}")), "has no weight_map"),
    "index leads elsewhere": (
        shards(edit_json(INDEX, weight_map={"a": "../stolen.safetensors"})),
        "names '../stolen.safetensors', which is not a file beside it",
    ),
    "pickle runs code": (pickled(plant_code), "cannot be read as plain weights without running"),
    "pickle cut": (
        pickled(edit_bytes("pytorch_model.bin", lambda b: b[: len(b) // 2])),
        "cannot be read as plain weights",
    ),
    "pickle of no model": (
        pickled(lambda d: torch.save([1, 2], d / "pytorch_model.bin")),
        "does not hold a model's tensors",
    ),
    "old pickle": (
        pickled(lambda d: (d / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))),
        "cannot be read as plain weights",
    ),
    # Tensors.
    "tensor missing": (edit_tensors(**{NORM: None}), r"model\.norm\.weight is missing"),
    "tensor extra": (edit_tensors(model__more=torch.ones(1)), r"model\.more is unexpected"),
    "tensor of a third layer": (
        edit_tensors(model__layers__2__input_layernorm__weight=torch.ones(32)),
        r"model\.layers\.2\.input_layernorm\.weight is unexpected",
    ),
    "wrong shape": (edit_tensors(**{NORM: torch.ones(31)}), r"has shape \[31\], not \[32\]"),
    "transposed": (
        edit_tensors(model__layers__0__mlp__up_proj__weight=torch.ones(32, 48)),
        r"up_proj\.weight has shape \[32, 48\], not \[48, 32\]",
    ),
    "bias of another family": (
        edit_tensors(model__layers__0__self_attn__q_proj__bias=torch.ones(32)),
        r"q_proj\.bias is unexpected",
    ),
    "integers": (cast_all(torch.int8), "is stored as I8, not as float32"),
    "8-bit floats": (cast_all(torch.float8_e4m3fn), "is stored as F8_E4M3"),
    "double precision": (cast_all(torch.float64), "is stored as F64"),
    "float16": (cast_all(torch.float16), "stored as float16; choose --dtype"),
    "mixed": (
        edit_tensors(**{NORM: torch.ones(32, dtype=torch.bfloat16)}),
        "stored as bfloat16/float32; choose --dtype",
    ),
    "NaN": (spoil_value(GATE, float("nan")), rf"{GATE} holds NaN; choose a checkpoint from"),
    "Infinity": (spoil_value("lm_head.weight", float("inf")), r"lm_head\.weight holds Infinity"),
    "negative Infinity": (spoil_value("model.norm.weight", -float("inf")), "norm.weight holds Inf"),
    "tied, and another head": (
        config(tie_word_embeddings=True),
        r"tie_word_embeddings=true, but lm_head\.weight is not model\.embed_tokens\.weight; set it",
    ),
    "tied, and a head of another shape": (
        lambda d: (
            edit_tensors(lm_head__weight=torch.ones(7, 32))(d),
            config(tie_word_embeddings=True)(d),
        ),
        r"lm_head\.weight is not model\.embed_tokens\.weight",
    ),
    "frequencies of another base": (
        edit_tensors(model__layers__0__self_attn__rotary_emb__inv_freq=frequencies(10**6)),
        r"layers\.0\.self_attn\.rotary_emb\.inv_freq in .* is not that of rope_theta=10000",
    ),
    "compiled": (
        rename("_orig_mod.".__add__),
        r"model\.embed_tokens\.weight is missing; .*and 18 more are missing; _orig_mod\..* and 18 "
        "more are unexpected; it seems that torch.compile's wrapper was saved",
    ),
    "within DistributedDataParallel": (
        rename("module.".__add__),
        "a wrapper for parallel training",
    ),
    "with images": (
        rename(lambda name: name.replace("model.", "model.language_model.")),
        "is a model for images and text; save its language model alone",
    ),
    "without the head": (
        rename(lambda name: name.removeprefix("model.")),
        "the names lack 'model.', because .* AutoModelForCausalLM",
    ),
    "adapter beside the model": (
        edit_tensors(model__layers__0__mlp__up_proj__lora_A__weight=torch.ones(2, 32)),
        r"up_proj\.lora_A\.weight is unexpected; it seems that this is an adapter",
    ),
    "quantised without saying so": (
        rename(lambda name: name.replace("_proj.weight", "_proj.qweight")),
        "it seems that the weights are quantised",
    ),
    # Configuration.
    "no configuration": (remove("config.json"), "config.json is missing"),
    "configuration a pipe": (pipe("config.json"), r"config.json cannot be read \(it is a pipe or"),
    "index a pipe": (pipe(INDEX), rf"{INDEX} cannot be read \(it is a pipe or a device"),
    "configuration nested": (
        write("config.json", '{"a": ' * 10**5),
        "config.json is not valid JSON .*recursion",
    ),
    "configuration with a long number": (
        write("config.json", '{"vocab_size": ' + "9" * 5000 + "}"),
        "config.json is not valid JSON .*4300",
    ),
    "configuration not JSON": (write("config.json", "{,}"), "config.json is not valid JSON"),
    "configuration a list": (write("config.json", "[]"), "holds no JSON object"),
    "key missing": (config(rms_norm_eps=...), "lacks 'rms_norm_eps'"),
    "word for a number": (config(hidden_size="wide"), "hidden_size='wide'; it must be a pos"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers=0; it must be a positive"),
    "half a layer": (config(num_hidden_layers=1.5), "num_hidden_layers=1.5; it must be a whole"),
    "a thousand million layers": (
        config(num_hidden_layers=10**9),
        "num_hidden_layers=1000000000; no more than 200000",
    ),
    "an infinite epsilon": (
        config(rms_norm_eps=float("inf")),
        "rms_norm_eps=inf; it must be a pos",
    ),
    "an epsilon of NaN": (config(rms_norm_eps=float("nan")), "rms_norm_eps=nan; it must be a pos"),
    "an epsilon above one": (config(rms_norm_eps=100), "rms_norm_eps=100; .* number of at most 1"),
    "word for a switch": (
        config(tie_word_embeddings="false"),
        "='false'; it must be true or false",
    ),
    "list for a number": (config(hidden_size=[32]), r"hidden_size=\[32\]; it must be a positive"),
    "heads and groups": (config(num_key_value_heads=3), "must be a multiple of the second"),
    "odd heads": (config(head_dim=7), "heads of size 7"),
    "no family": (
        config(model_type=...),
        "model_type None .* supported families: deepseek_v3, glm4_moe, gpt_oss, llama",
    ),
    "list of families": (config(model_type=[]), r"model_type \[\] of config.json is not supported"),
    "object of families": (
        config(model_type={"llama": 1}),
        "model_type {'llama': 1} of config.json",
    ),
    "unknown family": (config(model_type="gpt2"), "'gpt2' .* megatron-bridge may know others"),
    "OLMo-2": (config(model_type="olmo2"), "'olmo2' .* normalises what attention and MLP give"),
    "own code": (config(auto_map={"AutoModel": "modeling.X"}), "auto_map"),
    "attention bias": (config(attention_bias=True), "attention_bias=True"),
    "quantized": (config(quantization_config={"bits": 4}), "quantization_config"),
    "activation": (config(hidden_act="gelu"), "hidden_act='gelu'"),
    "YaRN without a factor": (config(rope_parameters={"rope_type": "yarn"}), "lacks 'factor'"),
    "YaRN with a factor of attention": (
        config(rope_parameters={"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0}),
        "attention_factor=2.0 for YaRN; only models without",
    ),
    "longrope": (config(rope_parameters={"rope_type": "longrope"}), "rotary scaling .*'longrope'"),
    "gpt-oss without biases": (
        config(model_type="gpt_oss", attention_bias=False),
        "attention_bias=False; of the family gpt_oss only models with it",
    ),
    "gain of the sigmoid": (
        config(model_type="gpt_oss", attention_bias=True, swiglu_alpha=1.0),
        "swiglu_alpha=1.0; Megatron has 1.702 only",
    ),
    "GLM-4.5 without experts": (
        config(model_type="glm4_moe", first_k_dense_replace=2),
        "first_k_dense_replace=2, but num_hidden_layers=2: no layer would have experts",
    ),
    "GLM-4.5 with groups of experts": (
        config(model_type="glm4_moe", n_group=4),
        "n_group=4, topk_group=1 and num_experts_per_tok=8; .* the two must be the same",
    ),
    "GLM-4.5 with raw sigmoids": (
        config(model_type="glm4_moe", norm_topk_prob=False),
        "norm_topk_prob=False; of the family glm4_moe only models with it",
    ),
    "more than whole heads turned": (
        config(model_type="glm4_moe", partial_rotary_factor=1.5),
        "partial_rotary_factor=1.5; it must be a positive number of at most 1",
    ),
    "DeepSeek-V3 that rotates halves": (
        config(model_type="deepseek_v3", first_k_dense_replace=1, rope_interleave=False),
        "rope_interleave=False; of the family deepseek_v3 only models with it",
    ),
    "DeepSeek-V3 without a latent of queries": (
        config(model_type="deepseek_v3", first_k_dense_replace=1, q_lora_rank=None),
        "q_lora_rank=None; without a latent of queries Megatron 0.19 normalises them",
    ),
    "YaRN that latent attention has no flags for": (
        config(
            model_type="deepseek_v3",
            first_k_dense_replace=1,
            rope_parameters={"rope_type": "yarn", "factor": 4.0, "beta_fast": 16},
        ),
        "with latent attention Megatron 0.19 has YaRN with original_max_position_embeddings=4096",
    ),
    "rotary base": (config(rope_parameters={"rope_theta": 1.5}), "rope_theta=1.5"),
    "infinite rotary base": (rotary_base(float("inf")), "rope_theta=inf; it must be a positive"),
    "rotary base of NaN": (rotary_base(float("nan")), "rope_theta=nan; it must be a positive"),
    "vast rotary base": (rotary_base(1e300), "rope_theta=1e[+]300; .* at most 9.22337e[+]18"),
    "number for rotary scaling": (config(rope_scaling=5), "rope_scaling=5; it must be an object"),
    "list of rotary parameters": (
        config(rope_parameters=[]),
        r"rope_parameters=\[\]; it must be an",
    ),
    "rotary base by layer": (
        config(rope_parameters={"full_attention": {"rope_theta": 7}}),
        "rotary scaling .*full_attention",
    ),
    "infinite rotary factor": (
        config(rope_parameters=LLAMA3 | {"factor": float("inf")}),
        "factor=inf; it must be a positive number",
    ),
    "Gemma 2": (config(model_type="gemma2"), "'gemma2' .* get and what they give, and bounds"),
    "layer types": (
        config(model_type="qwen2", use_sliding_window=True, layer_types=["chunked_attention"] * 2),
        r"layer_types=\['chunked_attention', .* one for each of the 2 layers",
    ),
    "first layer with a window": (
        config(model_type="qwen3", use_sliding_window=True, max_window_layers="all"),
        "max_window_layers='all'; it must be a whole number",
    ),
    "layers without rotary": (
        config(no_rope_layers=[1, 2]),
        r"no_rope_layers=\[1, 2\]; it must be a list of 0 and 1, one for each of the 2 layers",
    ),
    "too few layers without rotary": (
        config(no_rope_layers=[1]),
        "a list of 0 and 1, one for each of the 2 layers",
    ),
    "rotary share": (config(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    "vocabulary": (config(vocab_size=298), r"has shape \[300, 32\], not \[298, 32\]"),
    "end token": (config(eos_token_id=[1, 128009]), "eos_token_id=128009, beyond vocab_size=300"),
    "tied by mistake": (
        lambda d: (edit_tensors(lm_head__weight=None)(d), config(tie_word_embeddings=False)(d)),
        r"lm_head\.weight is missing",
    ),
    # Tokenizer.
    "no tokenizer": (remove("tokenizer.json"), "holds no tokenizer"),
    "tokenizer damaged": (write("tokenizer.json", "{"), "tokenizer in .* cannot be loaded"),
    "tokenizer without capitals": (
        edit_json("tokenizer.json", normalizer={"type": "Lowercase"}),
        "does not suit the model: the tokenizer .* do not spell the text: .*Anna's",
    ),
}


@pytest.mark.parametrize("case", HUGGING_FACE_CASES)
def test_spoiled_model_is_refused(source: Path, case: str):
    spoil, sentence = HUGGING_FACE_CASES[case]
    spoil(source)
    target = source.parent / "target"
    refuse(source.parent, sentence, "to-megatron", "--source", source, "--target", target)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5, more than num_.*experts=4"),
        ({"num_experts": 10**9}, "num_hidden_layers=2 of 1000000000 experts each; no more than"),
        ({"norm_topk_prob": "no"}, "norm_topk_prob='no'; it must be true or false"),
        ({"moe_intermediate_size": 25}, r"experts\.0\.gate_proj\.weight has shape \[24, 32\]"),
    ],
)
def test_experts_without_megatron_form_are_refused(
    tiny_checkpoints: Path, tmp_path: Path, change: dict[str, object], sentence: str
):
    source = Path(shutil.copytree(tiny_checkpoints / "qwen3-moe", tmp_path / "source"))
    config(**change)(source)
    refuse(tmp_path, sentence, "to-megatron", "--source", source, "--target", tmp_path / "target")


def test_expert_that_is_missing_is_named(tiny_checkpoints: Path, tmp_path: Path):
    source = Path(shutil.copytree(tiny_checkpoints / "mixtral", tmp_path / "source"))
    name = "model__layers__1__block_sparse_moe__experts__3__w2__weight"
    edit_tensors(**{name: None})(source)
    sentence = r"layers\.1\.block_sparse_moe\.experts\.3\.w2\.weight is missing\."
    refuse(tmp_path, sentence, "to-megatron", "--source", source, "--target", tmp_path / "target")


def test_experts_in_one_tensor_are_named_beside_those_missing(
    tiny_checkpoints: Path, tmp_path: Path
):
    source = Path(shutil.copytree(tiny_checkpoints / "qwen3-moe", tmp_path / "source"))
    found = tensors(source)
    for layer in range(2):
        block = f"model.layers.{layer}.mlp.experts."
        for expert in range(4):
            for name in ("gate", "up", "down"):
                del found[f"{block}{expert}.{name}_proj.weight"]
        found[block + "gate_up_proj"] = torch.ones(4, 48, 32)
        found[block + "down_proj"] = torch.ones(4, 32, 24)
    save_file(found, source / "model.safetensors")
    sentence = (
        r"layers\.0\.mlp\.experts\.0\.gate_proj\.weight is missing; .*and 21 more are missing; "
        r".*layers\.0\.mlp\.experts\.gate_up_proj is unexpected; .*and 1 more are unexpected; "
        "it seems that the experts of a layer are fused .* save_original_format=True"
    )
    refuse(tmp_path, sentence, "to-megatron", "--source", source, "--target", tmp_path / "target")


def test_redundant_tensors_that_agree_are_left_out(source: Path, tmp_path: Path):
    embedding = tensors(source)["model.embed_tokens.weight"]
    edit_tensors(
        lm_head__weight=embedding.clone(),
        model__layers__1__self_attn__rotary_emb__inv_freq=frequencies(10000),
    )(source)
    config(tie_word_embeddings=True)(source)
    convert_checkpoint.to_megatron(source, tmp_path / "megatron")
    convert_checkpoint.to_huggingface(tmp_path / "megatron", tmp_path / "back")
    redundant = {"lm_head.weight", "model.layers.1.self_attn.rotary_emb.inv_freq"}
    assert tensors(tmp_path / "back").keys() == tensors(source).keys() - redundant


def test_all_end_tokens_come_back(source: Path, tmp_path: Path):
    config(eos_token_id=[1, 3, 5])(source)
    edit_json("generation_config.json", eos_token_id=[1, 3])(source)
    convert_checkpoint.to_megatron(source, tmp_path / "megatron")
    convert_checkpoint.to_huggingface(tmp_path / "megatron", tmp_path / "back")
    for name, expected in (("config.json", [1, 3, 5]), ("generation_config.json", [1, 3])):
        assert json.loads((tmp_path / "back" / name).read_text())["eos_token_id"] == expected


def test_tokenizer_with_more_tokens_than_embeddings_is_refused(source: Path):
    config(vocab_size=60)(source)
    cut = {n: v[:60].clone() for n, v in tensors(source).items() if len(v) == 300}
    edit_tensors(**{name.replace(".", "__"): value for name, value in cut.items()})(source)
    target = source.parent / "target"
    sentence = "has 258 tokens, but .* vocab_size=60"
    refuse(source.parent, sentence, "to-megatron", "--source", source, "--target", target)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"low_freq_factor": 2.0}, "'low_freq_factor': 2.0.*; Megatron has"),
        ({"original_max_position_embeddings": 4096}, "embeddings': 4096.*; Megatron has"),
        ({"factor": -1.0}, "factor=-1.0; it must be a positive number"),
        ({"factor": None}, "lacks 'factor'"),
    ],
)
def test_rotary_scaling_without_megatron_form_is_refused(
    source: Path, change: dict[str, object], sentence: str
):
    config(rope_parameters=LLAMA3 | change)(source)
    words = ("to-megatron", "--source", source, "--target", source.parent / "target")
    refuse(source.parent, sentence, *words)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("nowhere", None, "neither a directory nor a .gguf file"),
        ("nowhere.gguf", None, "does not exist"),
        ("wrong.gguf", b"safetensors", "is not a GGUF file"),
        ("cut.gguf", b"GGUF\x03\x00\x00\x00", "cannot be dequantised"),
    ],
)
def test_source_that_is_no_model_is_refused(
    tmp_path: Path, name: str, content: bytes | None, sentence: str
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    words = ("to-megatron", "--source", tmp_path / name, "--target", tmp_path / "target")
    refuse(tmp_path, sentence, *words)


def test_megatron_bridge_is_asked_for_where_it_is_missing(source: Path):
    words = ("to-megatron", "--source", source, "--target", source.parent / "target")
    sentence = "megatron-bridge needs NVIDIA's Megatron-Bridge .* not installed"
    refuse(source.parent, sentence, *words, "--backend", "megatron-bridge")
    sentence = "--verify is not available with --backend megatron-bridge"
    refuse(source.parent, sentence, *words, "--backend", "megatron-bridge", "--verify")


def test_pickled_weights_give_what_safetensors_give(source: Path, tmp_path: Path):
    convert_checkpoint.to_megatron(source, tmp_path / "plain")
    pickled(lambda directory: None)(source)
    convert_checkpoint.to_megatron(source, tmp_path / "pickled")
    first, second = (distcp(tmp_path / name).read_bytes() for name in ("plain", "pickled"))
    assert first == second
