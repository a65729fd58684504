"""Hugging Face to Megatron and back: bit-equal weights, equal logits, clear refusals."""

import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed import REPOSITORY, run_distributed

TOOLS = REPOSITORY / "tools"
sys.path.insert(0, str(TOOLS))

import convert_checkpoint  # noqa: E402
import weight_names  # noqa: E402
from checkpoint_logits import megatron_logits  # noqa: E402

pytestmark = pytest.mark.multiprocess

MODELS = ("llama", "llama-tied", "llama3.1", "qwen2", "qwen3")
TOKENS = 48
# Random tiny models; made in a process of its own, where the CPU does not stand in for CUDA.
MAKE_MODELS = """
import sys
from collections.abc import Sequence
from pathlib import Path
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config,
    Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

root, tokens = Path(sys.argv[1]), int(sys.argv[2])
common = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-6,
    bos_token_id=0, eos_token_id=1)
scaling = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
    high_freq_factor=4.0, original_max_position_embeddings=8192)
built = {
    "llama": LlamaForCausalLM(LlamaConfig(**common, tie_word_embeddings=False)),
    "llama-tied": LlamaForCausalLM(LlamaConfig(**common, tie_word_embeddings=True)),
    "llama3.1": LlamaForCausalLM(LlamaConfig(**common, rope_parameters=scaling)),
    "qwen2": Qwen2ForCausalLM(Qwen2Config(**common, tie_word_embeddings=True)),
    "qwen3": Qwen3ForCausalLM(Qwen3Config(**common, head_dim=16)),
}
vocabulary = {"<begin>": 0, "<end>": 1} | {f"w{i}": i for i in range(2, 97)}
words = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, bos_token="<begin>", eos_token="<end>", unk_token="<end>")
for name, model in built.items():
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in key else 0.0, 0.2, generator=generator)
        logits = model.eval()(torch.arange(tokens)[None]).logits
    model.save_pretrained(root / name)
    tokenizer.save_pretrained(root / name)
    torch.save(logits, root / f"{name}.pt")
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one Hugging Face directory, and a file of logits, for each model."""
    root = tmp_path_factory.mktemp("huggingface")
    subprocess.run([sys.executable, "-c", MAKE_MODELS, str(root), str(TOKENS)], check=True)
    return root


@pytest.fixture(scope="module")
def converted(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one Megatron directory for each model."""
    root = tmp_path_factory.mktemp("megatron")
    for name in MODELS:
        convert_checkpoint.to_megatron(models / name, root / name)
    return root


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face directory."""
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def assert_bit_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name


def _logits(directories: list[str], flags: list[str]) -> list[torch.Tensor | None]:
    """Megatron's logits of several checkpoints, one after the other on the same ranks."""
    torch.set_num_threads(1)
    logits = []
    for directory in directories:
        logits.append(megatron_logits(Path(directory), torch.arange(TOKENS)[None], flags))
        from megatron.core import parallel_state, rerun_state_machine
        from megatron.training import global_vars

        global_vars.unset_global_variables()
        rerun_state_machine.destroy_rerun_state_machine()
        parallel_state.destroy_model_parallel()
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_equal(models: Path, converted: Path, tmp_path: Path, name: str):
    convert_checkpoint.to_huggingface(converted / name, tmp_path / "back")
    assert_bit_equal(tensors(tmp_path / "back"), tensors(models / name))
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (models / name / "config.json").read_text()
    )
    assert (tmp_path / "back/tokenizer.json").exists()


def assert_megatron_agrees(
    models: Path, converted: Path, names: Sequence[str], ranks: int, *flags: str
) -> None:
    """Megatron's logits on the last rank equal those of transformers."""
    directories = [str(converted / name) for name in names]
    found = run_distributed(ranks, _logits, directories, list(flags))[-1]
    for name, logits in zip(names, found, strict=True):
        expected = torch.load(models / f"{name}.pt")
        assert expected.std() > 0.3
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5, msg=name)


def test_megatron_gives_the_logits_of_transformers(models: Path, converted: Path):
    assert_megatron_agrees(models, converted, MODELS, 1)


def test_logits_are_those_of_transformers_at_tensor_parallel_size_2(models: Path, converted: Path):
    flags = ("--tensor-model-parallel-size", "2")
    assert_megatron_agrees(models, converted, ("llama", "qwen2", "qwen3"), 2, *flags)


def test_logits_are_those_of_transformers_at_pipeline_parallel_size_2(
    models: Path, converted: Path
):
    flags = ("--pipeline-model-parallel-size", "2")
    assert_megatron_agrees(models, converted, ("llama-tied",), 2, *flags)


def _train_and_save(checkpoint: str, save: str, flags: list[str]) -> None:
    """One optimizer step of learning rate 0 from a converted checkpoint, saved as iteration 7."""
    torch.set_num_threads(1)
    # Megatron saves through a process of its own, which a daemon, such as this rank, may not start.
    multiprocessing.current_process()._config["daemon"] = False
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    words = shlex.split(convert_checkpoint.flags_of(Path(checkpoint)))
    words += shlex.split(
        f"--load {checkpoint} --finetune --save {save} --save-interval 1 --ckpt-format torch_dist "
        "--micro-batch-size 1 --lr 0 --train-iters 9 --seq-length 16"
    )
    words += flags
    from megatron_rmt import cpu_platform

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
    initialize._compile_dependencies = lambda: None
    initialize.initialize_megatron()
    model, optimizer, scheduler = setup_model_and_optimizer(ModelType.encoder_or_decoder, build)
    for parameter in model[0].parameters():
        parameter.main_grad.fill_(1.0)
    optimizer.step()
    save_checkpoint(7, model, optimizer, scheduler, 0)


def test_a_training_jobs_checkpoint_with_optimizer_state_converts_back(
    models: Path, converted: Path, tmp_path: Path
):
    run_distributed(
        2,
        _train_and_save,
        str(converted / "llama-tied"),
        str(tmp_path / "run"),
        ["--tensor-model-parallel-size", "2", "--use-distributed-optimizer"],
    )
    saved = convert_checkpoint.MegatronWeights(tmp_path / "run/iter_0000007")
    assert any(key.startswith("optimizer.") for key in saved.stored)
    # The job saved beside the converted checkpoint: its arguments lead to config.json.
    convert_checkpoint.to_huggingface(tmp_path / "run", tmp_path / "back", iteration=7)
    assert_bit_equal(tensors(tmp_path / "back"), tensors(models / "llama-tied"))


def test_command_line_converts_prints_flags_and_verifies(models: Path, tmp_path: Path):
    command = [sys.executable, TOOLS / "convert_checkpoint.py", "to-megatron", "--verify"]
    command += ["--source", models / "qwen3", "--target", tmp_path / "qwen3", "--print-flags"]
    output = subprocess.run(
        list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    ).stdout
    difference = float(output.split("largest difference ")[1].split(",")[0])
    assert difference < 1e-5
    assert "--qk-layernorm" in output
    assert (tmp_path / "qwen3/model_flags.txt").read_text() in output


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


def test_flags_follow_a_moved_checkpoint(converted: Path, tmp_path: Path):
    shutil.copytree(converted / "llama", tmp_path / "moved")
    assert str(tmp_path / "moved/huggingface") in convert_checkpoint.flags_of(tmp_path / "moved")


def test_qkv_rows_are_queries_key_value_of_each_group_in_turn():
    shape = weight_names.read_config(
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
    packed = weight.pack([query, key, value], shape)
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
        rotary_base=10000, rotary_scaling=False,
    )  # fmt: skip
    assert shape.padded_vocabulary == padded


@pytest.fixture
def source(models: Path, tmp_path: Path) -> Path:
    """A copy of a model, to be spoiled."""
    return Path(shutil.copytree(models / "llama", tmp_path / "source"))


def edit_config(source: Path, **changes: object) -> None:
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(config))


def edit_tensors(source: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors; None removes one."""
    edited = tensors(source) | {name.replace("__", "."): value for name, value in changes.items()}
    kept = {name: value for name, value in edited.items() if value is not None}
    save_file(kept, source / "model.safetensors")


def refuse(source: Path, sentence: str) -> None:
    """``to_megatron`` raises one sentence and leaves nothing behind."""
    target = source.parent / "target"
    with pytest.raises(ValueError, match=sentence) as caught:
        convert_checkpoint.to_megatron(source, target)
    assert "\n" not in str(caught.value)
    assert [path.name for path in source.parent.iterdir()] == [source.name]


def test_missing_unexpected_and_misshapen_tensors_are_named(source: Path):
    edit_tensors(source, model__norm__weight=None)
    refuse(source, r"model\.norm\.weight is missing")
    edit_tensors(source, model__norm__weight=torch.ones(31))
    refuse(source, r"model\.norm\.weight has shape \[31\], not \[32\]")
    edit_tensors(source, model__norm__weight=torch.ones(32), model__extra=torch.ones(1))
    refuse(source, r"model\.extra is unexpected")


def test_truncated_file_is_refused(source: Path):
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(content[: len(content) // 2])
    refuse(source, r"model\.safetensors is not a complete safetensors file")


def test_missing_shard_is_named(converted: Path, tmp_path: Path):
    source = tmp_path / "source"
    convert_checkpoint.to_huggingface(converted / "llama", source, shard_bytes=20_000)
    sorted(source.glob("*.safetensors"))[1].unlink()
    refuse(source, r"model-00002-of-\d+\.safetensors is missing")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "mixtral"}, "'mixtral' .* supported families: llama, qwen2, qwen3"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rotary scaling .*'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1.5}}, "rope_theta=1.5"),
        ({"vocab_size": 90}, r"has shape \[100, 32\], not \[90, 32\]"),
    ],
)
def test_configuration_without_megatron_form_is_refused(
    source: Path, change: dict[str, object], sentence: str
):
    edit_config(source, **change)
    refuse(source, sentence)


def test_rotary_scaling_other_than_megatrons_constants_is_refused(models: Path, tmp_path: Path):
    source = Path(shutil.copytree(models / "llama3.1", tmp_path / "source"))
    rope = json.loads((source / "config.json").read_text())["rope_parameters"]
    edit_config(source, rope_parameters=rope | {"factor": 32.0})
    refuse(source, "'factor': 32.0")


def test_pickled_weights_are_refused(source: Path):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refuse(source, "pickled")


def test_tokenizer_with_more_tokens_than_embeddings_is_refused(source: Path):
    edit_config(source, vocab_size=60)
    cut = {name: value[:60] for name, value in tensors(source).items() if len(value) == 100}
    edit_tensors(source, **{name.replace(".", "__"): v.clone() for name, v in cut.items()})
    refuse(source, "has 97 tokens, but .* vocab_size=60")


def test_existing_target_is_kept(models: Path, tmp_path: Path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target/mine").write_text("mine")
    with pytest.raises(ValueError, match="exists"):
        convert_checkpoint.to_megatron(models / "llama", tmp_path / "target")
    assert (tmp_path / "target/mine").read_text() == "mine"


def test_way_back_refuses_what_is_not_there(converted: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="--iteration 3 is not in"):
        convert_checkpoint.to_huggingface(converted / "llama", tmp_path / "back", iteration=3)
    with pytest.raises(ValueError, match=r"layers\.self_attention\.q_layernorm\.weight is missing"):
        convert_checkpoint.to_huggingface(
            converted / "llama", tmp_path / "back", companions=converted / "qwen3/huggingface"
        )
    shutil.copytree(converted / "llama", tmp_path / "cut")
    (tmp_path / "cut/release/metadata.json").unlink()
    with pytest.raises(ValueError, match="not a complete torch_dist checkpoint"):
        convert_checkpoint.to_huggingface(tmp_path / "cut", tmp_path / "back")
    assert not (tmp_path / "back").exists()
