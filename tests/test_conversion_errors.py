"""Bad input to ``tools/convert_checkpoint.py``: one sentence each, and nothing left behind."""

import argparse
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import Metadata

from tests.tiny_checkpoints import TOOLS, assert_bit_equal, tensors

sys.path.insert(0, str(TOOLS))

import convert_checkpoint
from conversion import complete_directory

pytestmark = pytest.mark.faults

Spoil = Callable[[Path], object]


def files_below(directory: Path) -> dict[str, int]:
    return {str(p.relative_to(directory)): p.lstat().st_size for p in directory.rglob("*")}


def refuse(directory: Path, sentence: str, *words: str | Path) -> None:
    """The command ends with one sentence that matches; ``directory`` stays as it was."""
    before = files_below(directory)
    with pytest.raises(SystemExit, match=sentence) as caught:
        convert_checkpoint.main(list(map(str, words)))
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert files_below(directory) == before


@pytest.fixture
def source(tiny_checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of a model, to be spoiled."""
    return Path(shutil.copytree(tiny_checkpoints / "llama", tmp_path / "source"))


@pytest.fixture(scope="module")
def converted(tiny_checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("megatron") / "llama"
    convert_checkpoint.to_megatron(tiny_checkpoints / "llama", target)
    return target


def edit_json(name: str, **changes: object) -> Spoil:
    """Change keys of a JSON file; ``...`` removes one."""

    def spoil(directory: Path) -> None:
        content = json.loads((directory / name).read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not ...}
        (directory / name).write_text(json.dumps(kept))

    return spoil


def config(**changes: object) -> Spoil:
    return edit_json("config.json", **changes)


def edit_tensors(**changes: torch.Tensor | None) -> Spoil:
    """Replace tensors; None removes one."""

    def spoil(directory: Path) -> None:
        edited = tensors(directory) | {n.replace("__", "."): v for n, v in changes.items()}
        kept = {name: value for name, value in edited.items() if value is not None}
        save_file(kept, directory / "model.safetensors")

    return spoil


def edit_bytes(name: str, edit: Callable[[bytes], bytes]) -> Spoil:
    return lambda directory: (directory / name).write_bytes(edit((directory / name).read_bytes()))


def rename(edit: Callable[[str], str]) -> Spoil:
    """Give every tensor another name."""
    return lambda directory: save_file(
        {edit(name): value for name, value in tensors(directory).items()},
        directory / "model.safetensors",
    )


def spoil_value(name: str, value: float) -> Spoil:
    """Put a value into the middle of a tensor."""

    def spoil(directory: Path) -> None:
        found = tensors(directory)
        found[name].view(-1)[found[name].numel() // 2] = value
        save_file(found, directory / "model.safetensors")

    return spoil


def cast_all(dtype: torch.dtype) -> Spoil:
    return lambda directory: save_file(
        {name: value.to(dtype) for name, value in tensors(directory).items()},
        directory / "model.safetensors",
    )


def write(name: str, text: str) -> Spoil:
    return lambda directory: (directory / name).write_text(text)


def remove(*names: str) -> Spoil:
    return lambda directory: [(directory / name).unlink() for name in names]


def pipe(name: str) -> Spoil:
    """A named pipe that nobody writes to: whoever opens it waits forever."""

    def spoil(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return spoil


def shards(spoil: Spoil) -> Spoil:
    """Two files and an index instead of one file, then ``spoil``."""

    def split(directory: Path) -> None:
        found = tensors(directory)
        names = sorted(found)
        weight_map = {}
        for number, part in enumerate((names[::2], names[1::2]), 1):
            file = f"model-{number:05d}-of-00002.safetensors"
            save_file({name: found[name] for name in part}, directory / file)
            weight_map |= dict.fromkeys(part, file)
        (directory / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        spoil(directory)

    return split


def pickled(spoil: Spoil) -> Spoil:
    """``pytorch_model.bin`` instead of safetensors, then ``spoil``."""

    def pickle_weights(directory: Path) -> None:
        torch.save(tensors(directory), directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
        spoil(directory)

    return pickle_weights


class _TouchesAFile:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


def plant_code(directory: Path) -> None:
    content = {"x": _TouchesAFile(directory.parent / "ran")}
    torch.save(content, directory / "pytorch_model.bin")


def copy_shard(directory: Path) -> None:
    """The second file holds the tensors of the first as well."""
    found = tensors(directory)
    save_file(found, directory / "model-00002-of-00002.safetensors")


def frequencies(base: float) -> torch.Tensor:
    """``[head / 2]``, as transformers 4.30 stored them for heads of 8."""
    return 1 / base ** (torch.arange(0, 8, 2).float() / 8)


def rotary_base(value: float) -> Spoil:
    return config(rope_parameters={"rope_type": "default", "rope_theta": value})


ONE = "model.safetensors"
GATE = "model.layers.0.mlp.gate_proj.weight"
SECOND = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model__norm__weight"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
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
        "model_type None .* supported families: gpt_oss, llama, mistral",
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


def test_value_beyond_the_new_dtype_is_refused(source: Path, tmp_path: Path):
    spoil_value(GATE, 1e6)(source)
    convert_checkpoint.to_megatron(source, tmp_path / "megatron")
    words = ("--source", tmp_path / "megatron", "--target", tmp_path / "back")
    sentence = rf"{GATE} holds 1e\+06, beyond float16; choose another --dtype"
    refuse(tmp_path, sentence, "to-huggingface", *words, "--dtype", "float16")


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


def distcp(directory: Path) -> Path:
    return max((directory / "release").glob("*.distcp"), key=lambda path: path.stat().st_size)


def put_nan_into_final_norm(directory: Path) -> None:
    norm = tensors(directory.parent / "plain")["model.norm.weight"].numpy().tobytes()
    content = distcp(directory).read_bytes()
    assert content.count(norm) == 1
    spoiled = norm[:8] + b"\x00\x00\xc0\x7f" + norm[12:]
    distcp(directory).write_bytes(content.replace(norm, spoiled))


def write_index(edit: Callable[[Metadata], object]) -> Spoil:
    """Write the index again after ``edit``, which may give another object in its place."""

    def spoil(directory: Path) -> None:
        path = directory / "release/.metadata"
        index = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps(edit(index) or index))

    return spoil


def drop_chunk(index: Metadata) -> None:
    del index.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks[0]


def move_chunk(index: Metadata) -> None:
    chunk = index.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks[1]
    chunk.offsets = torch.Size([0, 0, 0])


def swap_places(index: Metadata) -> None:
    places = [place for place in index.storage_data if "linear_qkv.weight" in place.fqn]
    index.storage_data[places[0]].offset += 100


MEGATRON_CASES: dict[str, tuple[Spoil, str]] = {
    "no tracker": (
        remove("latest_checkpointed_iteration.txt"),
        "is not a Megatron checkpoint: latest_checkpointed_iteration.txt is missing",
    ),
    "tracker garbled": (
        write("latest_checkpointed_iteration.txt", "ten\n"),
        "holds 'ten' instead of an iteration",
    ),
    "tracker empty": (
        write("latest_checkpointed_iteration.txt", ""),
        r"latest_.*\.txt holds nothing instead of an iteration; write one of those saved into it",
    ),
    "tracker of bytes": (
        lambda d: (d / "latest_checkpointed_iteration.txt").write_bytes(b"\xff\x00\xfe" * 50),
        r"latest_.*\.txt cannot be read \(it is no text\)",
    ),
    "tracker with a long number": (
        write("latest_checkpointed_iteration.txt", "9" * 5000),
        "holds '9{40}' instead of an iteration",
    ),
    "tracker a directory": (
        lambda d: (
            (d / "latest_checkpointed_iteration.txt").unlink(),
            (d / "latest_checkpointed_iteration.txt").mkdir(),
        ),
        r"latest_checkpointed_iteration\.txt cannot be read \(Is a directory\)",
    ),
    "tracker a pipe": (
        pipe("latest_checkpointed_iteration.txt"),
        r"iteration\.txt cannot be read \(it is a pipe or a device, not a file\)",
    ),
    "tracker ahead": (write("latest_checkpointed_iteration.txt", "9"), "says 9, but .* missing"),
    "no metadata": (remove("release/metadata.json"), "not a complete torch_dist checkpoint"),
    "no index": (remove("release/.metadata"), "not a complete torch_dist checkpoint"),
    "index cut": (edit_bytes("release/.metadata", lambda b: b[:50]), ".metadata is damaged"),
    "index garbled": (edit_bytes("release/.metadata", lambda b: b"\xff" + b), "is damaged"),
    "index of nothing": (write_index(lambda _: {"a": 1}), "damaged .dict for Metadata"),
    "index runs code": (
        lambda d: (d / "release/.metadata").write_bytes(
            pickle.dumps(_TouchesAFile(d.parent / "ran"))
        ),
        r"\.metadata is damaged",
    ),
    "index without a chunk": (
        write_index(drop_chunk),
        r"\.metadata is damaged \(no chunk, or two, for a part of decoder.layers.mlp.linear_fc2",
    ),
    "index with a chunk twice": (write_index(move_chunk), "damaged .no chunk, or two, for a part"),
    "index with another place": (write_index(swap_places), "linear_qkv.weight cannot be read from"),
    "index with a name for a size": (
        write_index(lambda index: index.state_dict_metadata.update({"a": "b"})),
        r"\.metadata is damaged \(str for TensorStorageMetadata\)",
    ),
    "format of nothing": (write("release/metadata.json", "{}"), "says sharded_backend=None; only"),
    "format a list": (write("release/metadata.json", "[]"), "metadata.json holds no JSON object"),
    "another format": (
        write("release/metadata.json", '{"sharded_backend": "zarr"}'),
        "says sharded_backend='zarr'; only torch_dist checkpoints are read",
    ),
    "arguments of nothing": (
        lambda d: torch.save([1], d / "release/common.pt"),
        "arguments of the training job in .* cannot be read",
    ),
    "arguments damaged": (
        write("release/common.pt", "no zip file"),
        "arguments of the training job in .* cannot be read .*not a zip file",
    ),
    "NaN": (put_nan_into_final_norm, r"model\.norm\.weight holds NaN"),
    "data missing": (lambda d: distcp(d).unlink(), r"distcp is missing; copy it again"),
    "data cut": (
        lambda d: distcp(d).write_bytes(distcp(d).read_bytes()[:-20_000]),
        "distcp is cut; copy it again",
    ),
    "no configuration": (remove("huggingface/config.json"), "with --tokenizer HF_DIR"),
    "other width": (
        edit_json("huggingface/config.json", hidden_size=64, head_dim=8),
        r"has shape \[300, 32\], not \[300, 64\]",
    ),
    "one layer fewer": (
        edit_json("huggingface/config.json", num_hidden_layers=1),
        r"stacks \[2\] tensors, not \[1\]",
    ),
    "one layer more": (
        edit_json("huggingface/config.json", num_hidden_layers=3),
        r"at \(2,\) is missing",
    ),
    "larger vocabulary": (edit_json("huggingface/config.json", vocab_size=301), r"\[300, 32\]"),
    "other family": (
        edit_json("huggingface/config.json", model_type="qwen3", head_dim=8),
        r"q_layernorm\.weight is missing",
    ),
    "tied": (
        edit_json("huggingface/config.json", tie_word_embeddings=True),
        r"output_layer\.weight is unexpected",
    ),
}


@pytest.mark.parametrize("case", MEGATRON_CASES)
def test_spoiled_checkpoint_is_refused(
    converted: Path, tiny_checkpoints: Path, tmp_path: Path, case: str
):
    spoil, sentence = MEGATRON_CASES[case]
    source = Path(shutil.copytree(converted, tmp_path / "source"))
    shutil.copytree(tiny_checkpoints / "llama", tmp_path / "plain")
    spoil(source)
    words = ("to-huggingface", "--source", source, "--target", tmp_path / "target")
    refuse(tmp_path, sentence, *words)


def test_code_among_the_arguments_is_not_run(converted: Path, tmp_path: Path):
    source = Path(shutil.copytree(converted, tmp_path / "source"))
    arguments = argparse.Namespace(seed=7, own=_TouchesAFile(tmp_path / "ran"))
    torch.save({"args": arguments}, source / "release/common.pt")
    convert_checkpoint.to_huggingface(source, tmp_path / "back")
    note = json.loads((tmp_path / "back/provenance.json").read_text())
    assert note["training"]["seed"] == 7
    assert not (tmp_path / "ran").exists()


def damaged(content: bytes, end: int, generator: random.Random) -> bytes:
    """A bit flipped, or some bytes taken out or put in, before ``end``."""
    place, kind = generator.randrange(end), generator.randrange(4)
    if kind == 0:
        return content[:place] + content[place + generator.randint(1, 8) :]
    if kind == 1:
        return content[:place] + generator.randbytes(4) + content[place:]
    flipped = content[place] ^ 1 << generator.randrange(8)
    return content[:place] + bytes([flipped]) + content[place + 1 :]


@pytest.mark.parametrize(
    ("direction", "name"),
    [
        ("to-huggingface", "release/.metadata"),
        ("to-huggingface", "release/metadata.json"),
        ("to-megatron", "model.safetensors"),
        ("to-megatron", "config.json"),
    ],
)
def test_damaged_description_is_refused_or_changes_no_weight(
    source: Path, converted: Path, tmp_path: Path, direction: str, name: str
):
    model = source
    if direction == "to-huggingface":
        model = Path(shutil.copytree(converted, tmp_path / "megatron"))
    content = (model / name).read_bytes()
    end = len(content)
    if name == "model.safetensors":
        end = 8 + int.from_bytes(content[:8], "little")
    expected, target = tensors(source), tmp_path / "target"
    generator, refusals = random.Random(name), []
    for _ in range(60):
        (model / name).write_bytes(damaged(content, end, generator))
        try:
            convert_checkpoint.main([direction, "--source", str(model), "--target", str(target)])
        except SystemExit as error:
            refusals.append(str(error.code))
        else:
            if direction == "to-huggingface":
                assert_bit_equal(tensors(target), expected)
            shutil.rmtree(target)
        assert not target.exists()
    assert len(refusals) > 20
    assert "\n" not in "".join(refusals)


def test_iteration_that_was_not_saved_is_refused(converted: Path, tmp_path: Path):
    words = ("--source", converted, "--target", tmp_path / "target", "--iteration", "3")
    refuse(tmp_path, "--iteration 3 is not in .*; found: None", "to-huggingface", *words)


def test_target_that_exists_is_kept(source: Path):
    target = source.parent / "target"
    words = ("to-megatron", "--source", source, "--target", target)
    target.mkdir()
    (target / "mine").write_text("mine")
    refuse(source.parent, "exists; remove it or choose another name", *words)
    shutil.rmtree(target)
    target.write_text("mine")
    refuse(source.parent, "exists; remove it or choose another name", *words)
    target.unlink()
    target.symlink_to("nowhere")
    refuse(source.parent, "exists; remove it or choose another name", *words)
    words = ("to-megatron", "--source", source, "--target", source / "config.json/target")
    refuse(source.parent, "cannot be written .*config.json: ", *words)


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


@pytest.mark.parametrize("direction", ["to-megatron", "to-huggingface"])
def test_file_that_cannot_be_written_to_its_end_leaves_nothing(
    source: Path, converted: Path, direction: str
):
    """A limit on the size of files stops the writing half-way, as a full disk does."""
    model = source if direction == "to-megatron" else converted
    words = (direction, "--source", model, "--target", source.parent / "target")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        refuse(source.parent, "cannot be written .*File too large", *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, less than a tiny model takes; only root may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this user may not mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("direction", ["to-megatron", "to-huggingface"])
def test_disk_without_room_is_refused_before_anything_is_written(
    source: Path, converted: Path, small_disk: Path, direction: str
):
    model = source if direction == "to-megatron" else converted
    words = (direction, "--source", model, "--target", small_disk / "target")
    refuse(small_disk, "needs 0.00 GiB in .*disk, and only 0.00 GiB are free", *words)


@pytest.mark.parametrize("direction", ["to-megatron", "to-huggingface"])
def test_disk_that_fills_up_meanwhile_is_named_and_nothing_is_left(
    source: Path,
    converted: Path,
    small_disk: Path,
    direction: str,
    monkeypatch: pytest.MonkeyPatch,
):
    # As if there had been room when the conversion began.
    monkeypatch.setattr(complete_directory, "SPARE_BYTES", -(2**30))
    model = source if direction == "to-megatron" else converted
    words = (direction, "--source", model, "--target", small_disk / "target")
    refuse(small_disk, "cannot be written .*No space left on device.*; nothing was left", *words)
