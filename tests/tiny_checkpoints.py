"""Tiny random Hugging Face models of every family that ``tools/convert_checkpoint.py`` knows.

They are made in a process of its own, where the CPU does not stand in for CUDA.
"""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.distributed import REPOSITORY

TOOLS = REPOSITORY / "tools"
TOKENS = 48
# A text of 100 tokens.
WORDS = " ".join(f"w{2 + index % 90}" for index in range(100))
DENSE = (
    "llama",
    "smollm2",
    "llama3.1",
    "llama3.2",
    "mistral",
    "qwen2",
    "r1-distill-qwen",
    "r1-distill-llama",
    "qwen3",
    "phi3",
    "smollm3",
)
UNEVEN = ("glm-4.5", "glm-4.5-air")  # the first layer has no experts
EXPERTS = ("mixtral", "qwen3-moe", "qwen3-moe-unnormalised", "gpt-oss", *UNEVEN)
MODELS = (*DENSE, *EXPERTS)

MAKE_MODELS = """
import sys
from pathlib import Path
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

root, tokens = Path(sys.argv[1]), int(sys.argv[2])
common = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-6,
    bos_token_id=0, eos_token_id=1, tie_word_embeddings=False)
scaled = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
    high_freq_factor=4.0, original_max_position_embeddings=8192)
yarn = dict(rope_type="yarn", rope_theta=150000.0, factor=4.0, truncate=False,
    original_max_position_embeddings=16)
wide = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16)
shared = dict(num_hidden_layers=4, n_routed_experts=4, n_shared_experts=2, head_dim=16,
    num_experts_per_tok=2, moe_intermediate_size=24, first_k_dense_replace=1, attention_bias=True,
    routed_scaling_factor=1.5, norm_topk_prob=True, num_nextn_predict_layers=0, pad_token_id=1)
kinds = {
    "llama": ("llama", {}),
    "smollm2": ("llama", dict(tie_word_embeddings=True, num_attention_heads=6,
        num_key_value_heads=3, hidden_size=48)),
    "llama3.1": ("llama", dict(rope_parameters=scaled)),
    "llama3.2": ("llama", dict(rope_parameters=scaled | dict(factor=32.0), head_dim=16,
        tie_word_embeddings=True)),
    "mistral": ("mistral", dict(sliding_window=16, head_dim=12)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True, use_sliding_window=True, sliding_window=9,
        layer_types=["full_attention", "sliding_attention"])),
    "r1-distill-qwen": ("qwen2", dict(num_key_value_heads=1)),
    "r1-distill-llama": ("llama", dict(rope_parameters=scaled, head_dim=16)),
    "qwen3": ("qwen3", dict(head_dim=16)),
    "phi3": ("phi3", dict(pad_token_id=1)),
    "smollm3": ("smollm3", dict(num_hidden_layers=4, tie_word_embeddings=True, pad_token_id=1)),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "gpt-oss": ("gpt_oss", dict(num_local_experts=4, num_experts_per_tok=2, head_dim=16,
        sliding_window=9, pad_token_id=1, rope_parameters=yarn)),
    "glm-4.5": ("glm4_moe", shared | dict(use_qk_norm=True)),
    "glm-4.5-air": ("glm4_moe", shared),
    "qwen3-moe": ("qwen3_moe", dict(norm_topk_prob=True, **wide)),
    "qwen3-moe-unnormalised": ("qwen3_moe", dict(norm_topk_prob=False, **wide)),
}
# Bytes, by the rules that transformers has for Qwen2 as well.
pieces = ["<begin>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
bpe = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, []))
bpe.normalizer = normalizers.NFC()
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=bpe, bos_token="<begin>", eos_token="<end>", unk_token="<end>")
for name, (family, changes) in kinds.items():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **common | changes))
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in key else 0.0, 0.2, generator=generator)
        for key, bias in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                bias.normal_(0.0, 0.2, generator=generator)
        logits = model.eval()(torch.arange(tokens)[None]).logits
    model.save_pretrained(root / name)
    tokenizer.save_pretrained(root / name)
    torch.save(logits, root / f"{name}.pt")
"""


def make_models(root: Path) -> Path:
    """Write one Hugging Face directory, and a file ``NAME.pt`` of logits, for each of MODELS."""
    subprocess.run([sys.executable, "-c", MAKE_MODELS, str(root), str(TOKENS)], check=True)
    return root


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face directory."""
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def assert_bit_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name
