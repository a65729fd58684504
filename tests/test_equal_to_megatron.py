"""RMT without a position is plain Megatron: the same losses and gradients, by Megatron's own flags.

No token is above 50 nats, so nothing is rolled out, and every token is trained on by next-token
loss: through RMT's trunk pass, trees, tree attention, head and loss, and through none of them. Both
programs start from the same random model, whose vocabulary has no padding (it would be no class for
RMT).
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.tiny_run import RMT, Run, TinyInputs, run

pytestmark = pytest.mark.multiprocess

STEPS = 3
WITHOUT_A_POSITION = [*RMT, "--rmt-entropy-thresholds", "50", "51", "52"]
WITHOUT_A_POSITION += ["--rmt-ntp-coefficient", "1"]

TP2 = "--tensor-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
PER_TOKEN = "--calculate-per-token-loss"
WINDOWS = "--window-size 9,0 --window-attn-skip-freq 2"
# Flags of the tiny model that have no opposite, left out for its other forms.
LLAMA_MLP = "--swiglu --disable-bias-linear"

KEY_GROUPS = "--group-query-attention"
LATENTS = "--multi-latent-attention --kv-lora-rank 24 --qk-head-dim 12 --qk-pos-emb-head-dim 8 "
LATENTS += "--v-head-dim 10 --no-rope-fusion"

# Name -> (ranks, flags, flags of the tiny model that are left out).
DENSE: dict[str, tuple[int, str, str]] = {
    "llama": (1, "", ""),
    "gpt2": (
        1,
        "--normalization LayerNorm --position-embedding-type learned_absolute",
        LLAMA_MLP,
    ),
    "rotary percent": (1, "--rotary-percent 0.5", ""),
    "rotary interleaved": (1, "--rotary-interleaved", ""),
    "rotary interpolation": (1, "--rotary-seq-len-interpolation-factor 2", ""),
    "rotary scaling": (1, "--use-rope-scaling --rope-scaling-factor 8", ""),
    "YaRN": (
        1,
        "--position-embedding-type yarn --rotary-scaling-factor 4 "
        "--yarn-original-max-position-embeddings 32",
        "",
    ),
    "windows": (1, WINDOWS, ""),
    "windows and sinks": (1, f"{WINDOWS} --softmax-type learnable", ""),
    "off by one, TP2": (2, f"{TP2} --softmax-type off-by-one", ""),
    "no rotary in every second layer": (1, "--no-rope-freq 2", ""),
    "no positions": (1, "--position-embedding-type none", ""),
    "learned positions": (1, "--position-embedding-type learned_absolute", ""),
    "query and key norms": (1, "--qk-layernorm", ""),
    "squared ReLU": (1, "--squared-relu", "--swiglu"),
    "GELU and biases, TP2": (2, TP2, LLAMA_MLP),
    "quick GEGLU": (1, "--quick-geglu", "--swiglu"),
    "one key head, TP2": (2, f"{TP2} --num-query-groups 1", ""),
    "gated attention": (1, "--attention-output-gate", ""),
    "muP": (1, "--use-mup --mup-base-hidden-size 32 --mup-embedding-mult 2", ""),
    "residual behind the norm": (1, "--apply-residual-connection-post-layernorm", ""),
    "fp16": (1, "--fp16 --apply-query-key-layer-scaling --initial-loss-scale 1024", ""),
    "multi-token prediction": (1, "--mtp-num-layers 1", ""),
    "two tokens further, documents apart, untied, PP2": (
        2,
        f"{PP2} --mtp-num-layers 2 --mtp-loss-scaling-factor 0.7 --reset-attention-mask "
        "--reset-position-ids --untie-embeddings-and-output-weights",
        "",
    ),
    "latents": (1, f"{LATENTS} --q-lora-rank 16 --qk-layernorm", KEY_GROUPS),
    "latents, YaRN, separate documents": (
        1,
        f"{LATENTS} --rope-type yarn --rotary-scaling-factor 4 --mscale 0.7 --mscale-all-dim 1 "
        "--reset-attention-mask",
        KEY_GROUPS,
    ),
    "untied": (1, "--untie-embeddings-and-output-weights", ""),
    "separate documents": (1, "--reset-attention-mask --reset-position-ids", ""),
    "separate masks": (1, "--reset-attention-mask", ""),
    "positions anew": (1, "--reset-position-ids", ""),
    "masked ends, per token": (1, f"--eod-mask-loss {PER_TOKEN}", ""),
    "per token, DP2": (2, PER_TOKEN, ""),
    "per token, PP2": (2, f"{PP2} {PER_TOKEN}", ""),
    "two samples a micro-batch": (1, "--micro-batch-size 2", ""),
    "full recompute": (
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "",
    ),
    "core attention recompute": (1, "--recompute-granularity selective", ""),
}
STACK = "--mamba-state-dim 16 --mamba-head-dim 16 --mamba-num-groups 2 --mamba-num-heads 8 "
STACK += "--hybrid-layer-pattern"
HYBRID: dict[str, tuple[int, str, str]] = {
    "hybrid": (1, f"{STACK} M*M-", ""),
    "hybrid, no positions, TP2": (2, f"{STACK} *-MM --position-embedding-type none {TP2}", ""),
    "Mamba alone, two samples a micro-batch": (1, f"{STACK} MM --micro-batch-size 2", ""),
    "hybrid, full recompute, untied": (
        1,
        f"{STACK} M*M- --untie-embeddings-and-output-weights --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1",
        "",
    ),
}
EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48 "
EXPERTS += "--moe-token-dispatcher-type alltoall --moe-router-load-balancing-type"
NONE, EP2 = f"{EXPERTS} none", "--expert-model-parallel-size 2"
BIAS = "--moe-router-score-function sigmoid --moe-router-enable-expert-bias "
BIAS += "--moe-router-bias-update-rate 0.05"
LOSSES = {
    "balance": f"{EXPERTS} aux_loss --moe-aux-loss-coeff 0.1",
    "balance of sequences": f"{EXPERTS} seq_aux_loss --moe-aux-loss-coeff 0.1",
    "balance of the batch": f"{EXPERTS} global_aux_loss --moe-aux-loss-coeff 0.1",
    "several balances": f"{EXPERTS} aux_loss global_aux_loss --moe-aux-loss-coeff 0.1 0.05",
    "z loss": f"{NONE} --moe-z-loss-coeff 0.1",
}
MIXTURE: dict[str, tuple[int, str, str]] = {
    "experts": (1, NONE, ""),
    **{name: (1, flags, "") for name, flags in LOSSES.items()},
    **{f"{name}, per token": (1, f"{flags} {PER_TOKEN}", "") for name, flags in LOSSES.items()},
    **{
        f"{name}, per token, DP2 EP2": (2, f"{LOSSES[name]} {PER_TOKEN} {EP2}", "")
        for name in ("balance", "balance of the batch", "z loss")
    },
    "z loss, per token, PP2": (2, f"{LOSSES['z loss']} {PER_TOKEN} {PP2}", ""),
    "balance, two samples a micro-batch": (1, f"{LOSSES['balance']} --micro-batch-size 2", ""),
    "expert bias": (1, f"{NONE} {BIAS}", ""),
    "expert bias, DP2 EP2": (2, f"{NONE} {BIAS} {EP2}", ""),
    "expert bias, PP2": (2, f"{NONE} {BIAS} {PP2}", ""),
    "groups of experts": (1, f"{NONE} --moe-router-num-groups 2 --moe-router-group-topk 1", ""),
    "softmax first, fp32": (1, f"{NONE} --moe-router-pre-softmax --moe-router-dtype fp32", ""),
    "shared experts, every second layer": (
        1,
        f"{NONE} --moe-shared-expert-intermediate-size 32 --moe-layer-freq 2",
        "",
    ),
    "recompute of experts": (
        1,
        f"{LOSSES['balance']} --recompute-granularity selective --recompute-modules moe",
        "",
    ),
    "DeepSeek-V3's kind": (
        1,
        f"{LATENTS} --q-lora-rank 16 --qk-layernorm {LOSSES['balance of sequences']} {BIAS} "
        "--moe-layer-freq ([0]+[1]*3) --moe-shared-expert-intermediate-size 32 --mtp-num-layers 1",
        KEY_GROUPS,
    ),
    "EP2": (2, f"{NONE} {EP2}", ""),
    "allgather, DP2": (2, f"{NONE} --moe-token-dispatcher-type allgather", ""),
}
CASES = DENSE | HYBRID | MIXTURE
# The others are slow.
QUICK = ("llama", "hybrid", "separate documents", "several balances, per token", "expert bias, PP2")


@pytest.fixture(scope="session")
def tokenizer(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny one with a token more, 384 that two ranks can share."""
    folder = tmp_path_factory.mktemp("even") / "tokenizer"
    shutil.copytree(inputs.checkpoint / "huggingface", folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    last = content["added_tokens"][-1]
    assert last["id"] == 382
    content["added_tokens"].append(last | {"id": 383, "content": "<unused>"})
    file.write_text(json.dumps(content), encoding="utf-8")
    return folder


def _printed(finished: Run) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    columns = (finished.printed(name) for name in ("lm loss", "grad norm"))
    return [tuple(map(float, row)) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize(
    "case",
    [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_without_a_position_every_step_is_megatrons(
    inputs: TinyInputs, tokenizer: Path, tmp_path: Path, case: str
):
    ranks, flags, left_out = CASES[case]
    own = [word for word in inputs.flags() if word not in left_out.split()]
    own += shlex.split(
        f"--load {tmp_path / 'none'} --tokenizer-model {tokenizer} --vocab-size 384 "
        f"--train-iters {STEPS} {flags}"
    )
    megatron = run(tmp_path / "plain", ranks, own)
    plain = _printed(megatron)
    finished = run(tmp_path / "rmt", ranks, [*own, *WITHOUT_A_POSITION])
    assert all(line["branch tokens"] == 0 for line in finished.metrics)
    assert len(plain) == STEPS
    for (loss, norm), (expected_loss, expected_norm) in zip(_printed(finished), plain, strict=True):
        assert loss == pytest.approx(expected_loss, rel=0, abs=5e-5 if "--fp16" in flags else 2e-5)
        # Three digits are printed.
        assert norm == pytest.approx(expected_norm, rel=0, abs=1.01e-3)
    further = sorted(set(re.findall(r"mtp_\d loss", megatron.log)))
    assert bool(further) is ("--mtp-num-layers" in flags)
    for name in further:
        losses, expected = ([*map(float, of.printed(name))] for of in (finished, megatron))
        assert losses == pytest.approx(expected, rel=0, abs=2e-5)
