"""What RMT refuses: on every rank, before a model is built, with one sentence for each problem."""

import fnmatch
import functools
import json
import re
import shlex
import shutil
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.training.arguments import add_megatron_arguments
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import megatron_rmt
from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.cpu import platform as cpu_platform
from megatron_rmt.job import validation
from megatron_rmt.job.settings import (
    GROUP_TITLE,
    add_rmt_arguments,
    readable_help,
    setting_problems,
)
from megatron_rmt.job.validation import (
    check_rmt_arguments,
    interleaving_problem,
    unsupported,
)
from tests.distributed import REPOSITORY, run_distributed

# A model small enough to type; RMT's defaults fit in it.
MODEL = shlex.split(
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 "
    "--max-position-embeddings 4096 --position-embedding-type rope --disable-bias-linear "
    "--attention-dropout 0 --hidden-dropout 0 --train-iters 10 --seq-length 128 "
    "--micro-batch-size 1 --global-batch-size 2 --lr 1e-4 --transformer-impl local "
    "--tokenizer-type HuggingFaceTokenizer --no-gradient-accumulation-fusion"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer of 258 tokens: the bytes, end of document, end of thought."""
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.add_tokens(["</think>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<|end|>")
    fast.save_pretrained(folder)
    return folder


@functools.cache
def _parser() -> ArgumentParser:
    add = getattr(add_megatron_arguments, "megatron_rmt_original", add_megatron_arguments)
    return readable_help(add_rmt_arguments(add(ArgumentParser(allow_abbrev=False))))


def _parse(*flags: str) -> Namespace:
    args = _parser().parse_args([*MODEL, *flags])
    # What Megatron works out before it comes to RMT's checks.
    args.rank, args.world_size = 0, 1
    args.virtual_pipeline_model_parallel_size, args.data_parallel_size = None, 1
    args.kv_channels = args.kv_channels or 16
    return args


def _refusal(args: Namespace) -> str:
    with pytest.raises(ValueError, match=r"^RMT cannot train with these settings: ") as error:
        check_rmt_arguments(args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_defaults_are_accepted(tokenizer: str):
    args = _parse("--rmt", "--tokenizer-model", tokenizer)
    before = dict(vars(args))
    check_rmt_arguments(args)
    assert vars(args) == before, "checking builds the tokenizer of a copy"


def test_without_rmt_nothing_is_checked():
    check_rmt_arguments(_parser().parse_args([]))
    check_rmt_arguments(Namespace())


@pytest.mark.parametrize(
    "flags",
    [
        ["--rmt-group-size", "4"],
        ["--rmt-no-ntp"],
        ["--rmt-entropy-thresholds", "0.1", "0.2", "0.3"],
        ["--rmt-metrics-file", "x"],
        ["--rmt-entropy-top-k", "16"],
    ],
)
def test_flags_of_rmt_without_rmt_are_refused(flags: list[str]):
    with pytest.raises(ValueError, match=f"^{flags[0]} given without --rmt; add --rmt or leave"):
        check_rmt_arguments(_parse(*flags))


def test_all_stray_flags_are_named_at_once():
    with pytest.raises(ValueError, match=r"^--rmt-group-size, --rmt-no-rl given without --rmt"):
        check_rmt_arguments(_parse("--rmt-group-size", "4", "--rmt-no-rl"))


def test_experts_on_several_ranks_need_a_dispatcher_of_unequal_numbers_of_tokens(tokenizer: str):
    flags = ["--rmt", "--tokenizer-model", tokenizer, "--expert-model-parallel-size", "2"]
    flags += [*EXPERTS, "--moe-token-dispatcher-type"]
    refusal = _refusal(_parse(*flags, "allgather"))
    assert "--moe-token-dispatcher-type is allgather;" in refusal
    assert "pass alltoall." in refusal
    check_rmt_arguments(_parse(*flags, "alltoall"))
    check_rmt_arguments(_parse(*flags, "flex"))
    hybrid = ["flex", "--moe-flex-dispatcher-backend", "hybridep"]
    check_rmt_arguments(_parse(*flags, *hybrid, "--moe-hybridep-pad-uneven-dispatch-inputs"))


@pytest.mark.parametrize(
    "flags",
    [
        "--moe-router-load-balancing-type none",
        "--moe-router-load-balancing-type aux_loss global_aux_loss --moe-aux-loss-coeff 0.1 0.1",
        "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.1",
        "--moe-z-loss-coeff 0.1 --calculate-per-token-loss",
        "--moe-router-enable-expert-bias --moe-router-score-function sigmoid",
        "--moe-expert-capacity-factor -1",
    ],
)
def test_experts_of_a_token_alone_are_accepted(tokenizer: str, flags: str):
    check_rmt_arguments(_parse("--rmt", "--tokenizer-model", tokenizer, *EXPERTS, *flags.split()))


def test_local_experts_with_biases_are_not_trained_on_one_rank():
    args = _parse("--rmt", *EXPERTS)
    assert [*unsupported(args)] == []
    args.add_bias_linear = True
    (problem,) = unsupported(args)
    assert "cannot be trained with biases where --expert-model-parallel-size is 1;" in problem
    args.expert_model_parallel_size = 2
    args.moe_token_dispatcher_type = "alltoall"
    assert [*unsupported(args)] == []


def test_flags_of_routers_mean_nothing_without_experts(tokenizer: str):
    jitter = ["--moe-input-jitter-eps", "0.1"]
    check_rmt_arguments(_parse("--rmt", "--tokenizer-model", tokenizer, *jitter))


def test_the_ablation_without_rl_needs_nothing_of_rmt():
    args = _parse("--rmt", "--rmt-no-rl", "--attention-dropout", "0.1", "--rmt-group-size", "1")
    check_rmt_arguments(args)
    assert not Settings.of(args).trains_with_rl


def test_a_sharded_optimizer_that_is_neither_saved_nor_loaded_is_accepted(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("megatron_rmt.job.validation.HAVE_APEX_OR_TE", False)
    flags = ["--rmt", "--tokenizer-model", tokenizer, "--use-distributed-optimizer"]
    load, save = ["--load", str(tmp_path)], ["--save", str(tmp_path)]
    for bad in (load, save):
        assert "--use-distributed-optimizer is on, whose" in _refusal(_parse(*flags, *bad))
    for good in ([], [*load, "--finetune"], [*load, "--no-load-optim"], [*save, "--no-save-optim"]):
        check_rmt_arguments(_parse(*flags, *good))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_that_are_not_finite_are_refused(tokenizer: str, value: str):
    flags = ["--rmt", "--tokenizer-model", tokenizer]
    for flag in ("--lr", "--min-lr", "--weight-decay", "--adam-beta2", "--adam-eps"):
        refusal = _refusal(_parse(*flags, f"{flag}={value}"))
        assert f"{flag} is {value}; pass a finite number." in refusal
    assert "--clip-grad is nan; pass" in _refusal(_parse(*flags, "--clip-grad", "nan"))
    check_rmt_arguments(_parse(*flags, "--clip-grad", "inf"))
    flags += [*EXPERTS, "--moe-router-load-balancing-type", "aux_loss", "global_aux_loss"]
    refusal = _refusal(_parse(*flags, "--moe-aux-loss-coeff", "0.1", value.removeprefix("-")))
    assert f"--moe-aux-loss-coeff is {value.removeprefix('-')}; pass a finite number." in refusal


@pytest.mark.parametrize(
    ("flag", "value", "interval"),
    [
        ("--adam-beta1", "1.0", "[0, 1)"),
        ("--adam-beta2", "1.5", "[0, 1)"),
        ("--adam-eps", "0.0", "(0, inf)"),
        ("--weight-decay", "-0.1", "[0, inf)"),
    ],
)
def test_numbers_that_the_optimizer_cannot_work_with_are_refused(
    tokenizer: str, flag: str, value: str, interval: str
):
    refusal = _refusal(_parse("--rmt", "--tokenizer-model", tokenizer, f"{flag}={value}"))
    assert f"{flag} is {value}; pass a number in {interval}." in refusal


BLOCKWISE = ("--fp8-format", "e4m3", "--fp8-recipe", "blockwise")
TENSORWISE = ("--fp8-format", "e4m3", "--fp8-recipe", "tensorwise")
EXPERTS = ("--num-experts", "4")
TP2 = ("--tensor-model-parallel-size", "2")
# flags -> what the sentence says: the flag, its value, the remedy.
BAD = {
    ("--overlap-param-gather-with-optimizer-step",): "--overlap-param-gather-with-optimizer-step "
    "is True; RMT needs False: rollouts need whole weights.",
    ("--phase-transition-iterations", "4"): "RMT needs it left out: each phase reads other data",
    ("--rampup-batch-size", "2", "2", "8"): "--rampup-batch-size is [2, 2, 8]; RMT needs it "
    "left out: Megatron ignores it since 0.19, and --step-batch-size-schedule is in its place.",
    ("--rmt-positions-per-sample", "0"): "--rmt-positions-per-sample is 0; pass a number in "
    "[1, inf).",
    ("--rmt-positions-per-sample", "129"): "--rmt-positions-per-sample is 129; pass at most "
    "--seq-length (128).",
    (
        "--rmt-initial-budget",
        "0",
        "--rmt-minimum-budget",
        "-1",
    ): "--rmt-initial-budget is 0; pass a "
    "number in [1, inf). --rmt-minimum-budget is -1; pass a number in [1, inf).",
    ("--rmt-minimum-budget", "0"): "--rmt-minimum-budget is 0; pass a number in [1, inf).",
    ("--rmt-minimum-budget", "900"): "--rmt-minimum-budget is 900; pass at most "
    "--rmt-initial-budget (800).",
    ("--rmt-answer-tokens", "0"): "--rmt-answer-tokens is 0; pass a number in [1, inf).",
    ("--rmt-head-chunk-size", "0"): "--rmt-head-chunk-size is 0; pass a number in "
    "[1, inf), or leave it out (4096 on a GPU, 384 on a CPU).",
    (
        "--rmt-group-size",
        "1",
    ): "--rmt-group-size is 1; pass a number in [2, inf): an advantage needs 2 or more rollouts.",
    (
        "--rmt-temperature",
        "0",
    ): "--rmt-temperature is 0.0; pass a number in (0, inf): also with --rmt-greedy.",
    (
        "--rmt-temperature",
        "nan",
    ): "--rmt-temperature is nan; pass a number in (0, inf): also with --rmt-greedy.",
    (
        "--rmt-temperature",
        "inf",
    ): "--rmt-temperature is inf; pass a number in (0, inf): also with --rmt-greedy.",
    ("--rmt-budget-decay", "1.5"): "--rmt-budget-decay is 1.5; pass a number in (0, 1].",
    ("--rmt-budget-decay", "0"): "--rmt-budget-decay is 0.0; pass a number in (0, 1].",
    ("--rmt-length-reward-weight", "2"): "--rmt-length-reward-weight is 2.0; pass a number in "
    "[0, 1].",
    ("--rmt-length-reward-weight", "-0.1"): "--rmt-length-reward-weight is -0.1; pass a number in "
    "[0, 1].",
    ("--rmt-length-reward-maximum", "0"): "--rmt-length-reward-maximum is 0.0; pass a number in "
    "(0, inf).",
    ("--rmt-curriculum-start", "0.8"): "--rmt-curriculum-start is 0.8; pass at most "
    "--rmt-curriculum-end (0.7).",
    ("--rmt-curriculum-start", "-0.1"): "--rmt-curriculum-start is -0.1; pass a number in [0, 1].",
    ("--rmt-curriculum-end", "1.1"): "--rmt-curriculum-end is 1.1; pass a number in [0, 1].",
    ("--rmt-start-probabilities", "1", "1", "0"): "--rmt-start-probabilities is 1.0 1.0 0.0; "
    "pass three numbers whose sum is 1.",
    ("--rmt-start-probabilities", "nan", "0", "1"): "--rmt-start-probabilities is nan 0.0 1.0; "
    "pass numbers in [0, 1].",
    ("--rmt-end-probabilities", "2", "-1", "0"): "--rmt-end-probabilities is 2.0 -1.0 0.0; "
    "pass numbers in [0, 1].",
    ("--rmt-entropy-thresholds", "1", "1", "2"): "--rmt-entropy-thresholds is 1.0 1.0 2.0; "
    "pass three ascending numbers.",
    ("--rmt-entropy-thresholds", "-1", "1", "2"): "--rmt-entropy-thresholds is -1.0 1.0 2.0; "
    "pass numbers in [0, inf].",
    ("--rmt-threshold-quantiles", "0.5", "0.5", "0.9"): "--rmt-threshold-quantiles is 0.5 0.5 0.9; "
    "pass three ascending numbers.",
    ("--rmt-threshold-quantiles", "0.5", "0.7", "1"): "--rmt-threshold-quantiles is 0.5 0.7 1.0; "
    "pass numbers in [0, 1), or leave it out (thresholds in nats).",
    (
        "--rmt-threshold-quantiles",
        *("0.5", "0.7", "0.9"),
        "--rmt-entropy-thresholds",
        *("1", "2", "3"),
    ): "--rmt-threshold-quantiles is 0.5 0.7 0.9 and --rmt-entropy-thresholds is 1.0 2.0 3.0; pass "
    "one of them.",
    ("--rmt-reserve-positions", "4"): "--rmt-reserve-positions is 4, which --rmt-select tiers does "
    "not use; pass --rmt-select gain-variance, or leave it out.",
    (
        "--rmt-reserve-positions",
        "-1",
    ): "--rmt-reserve-positions is -1; pass a number in [0, inf), "
    "or leave it out (as many as --rmt-positions-per-sample).",
    ("--rmt-entropy-ceiling", "0.5"): "--rmt-entropy-ceiling is 0.5; pass more than the first of "
    "--rmt-entropy-thresholds (0.5), else no position is ever chosen.",
    ("--rmt-entropy-ceiling", "0"): "--rmt-entropy-ceiling is 0.0; pass a number in (0, inf), or "
    "leave it out (none).",
    (
        "--rmt-entropy-top-k",
        "1",
    ): "--rmt-entropy-top-k is 1; pass a number in [2, inf), or leave it "
    "out (the whole vocabulary).",
    ("--rmt-ntp-coefficient", "-1"): "--rmt-ntp-coefficient is -1.0; pass a number in [0, inf).",
    ("--rmt-ntp-coefficient", "inf"): "--rmt-ntp-coefficient is inf; pass a number in [0, inf).",
    ("--rmt-warmup-iters", "-1"): "--rmt-warmup-iters is -1; pass a number in [0, inf).",
    ("--rmt-log-samples-interval", "-1"): "--rmt-log-samples-interval is -1; pass a number in "
    "[0, inf).",
    ("--rmt-warmup-iters", "11"): "--rmt-warmup-iters is 11; pass at most --train-iters (10).",
    ("--rmt-metrics-file", "."): "--rmt-metrics-file is ., a folder; pass a file in it.",
    ("--attention-dropout", "0.1"): "--attention-dropout is 0.1; RMT needs 0.0:",
    ("--hidden-dropout", "0.1"): "--hidden-dropout is 0.1; RMT needs 0.0:",
    ("--context-parallel-size", "2", *EXPERTS): "--context-parallel-size is 2; RMT needs 1 with "
    "--num-experts: what the routers",
    ("--context-parallel-size", "2", "--eval-iters", "1", "--transformer-impl", "local"): "--eval"
    "-iters is 1; with --context-parallel-size 2 and --transformer-impl local pass 0: Megatron's",
    ("--context-parallel-size", "2", "--multi-latent-attention"): "--context-parallel-size is 2; "
    "RMT needs 1 with --multi-latent-attention:",
    ("--fp8-format", "e4m3", "--multi-latent-attention"): "--fp8-format is e4m3; RMT needs it left "
    "out with --multi-latent-attention:",
    ("--cache-mla-latents", "--multi-latent-attention"): "--cache-mla-latents is True; RMT needs",
    ("--position-embedding-type", "yarn", "--multi-latent-attention"): "--position-embedding-type "
    "is yarn; with --multi-latent-attention, whose layers",
    ("--mtp-num-layers", "1", "--pipeline-model-parallel-size", "2"): "--mtp-num-layers is 1; RMT "
    "needs it left out with --pipeline-model-parallel-size 2 and tied embeddings, of which",
    ("--mtp-num-layers", "1", "--context-parallel-size", "2"): "--mtp-num-layers is 1; RMT needs "
    "it left out with --context-parallel-size 2:",
    (
        "--mtp-num-layers",
        "1",
        "--sequence-parallel",
        *TP2,
        *EXPERTS,
    ): "--mtp-num-layers is 1; RMT needs it left out with --num-experts where rows are padded",
    (
        "--window-attn-skip-freq",
        "[1,0]*2",
        "--window-size",
        "128,0",
    ): "--window-attn-skip-freq is [1, 0, 1, 0]; pass a number above 0, or a list of 2",
    ("--window-attn-skip-freq", "0", "--window-size", "128,0"): "--window-attn-skip-freq is 0;",
    ("--window-size", "(-1,0)"): "--window-size is -1,0; RMT needs N,0:",
    ("--window-size", "128"): "--window-size is 128; RMT needs N,0:",
    ("--window-size", "128,1"): "--window-size is 128,1; RMT needs N,0:",
    ("--experimental-attention-variant", "dsa"): "--experimental-attention-variant is dsa; RMT",
    ("--qk-clip",): "--qk-clip is True; RMT needs False:",
    ("--log-max-attention-logit",): "--log-max-attention-logit is True; RMT needs False:",
    ("--cuda-graph-impl", "local"): "--cuda-graph-impl is local; RMT needs none:",
    ("--overlap-moe-expert-parallel-comm",): "--overlap-moe-expert-parallel-comm is True; RMT",
    ("--tp-comm-overlap",): "--tp-comm-overlap is True; RMT needs False: its buffers hold one",
    ("--fine-grained-activation-offloading",): "--fine-grained-activation-offloading is True; RMT",
    ("--cpu-offloading-num-layers", "1"): "--cpu-offloading-num-layers is 1; RMT needs 0: it plans",
    ("--moe-paged-stash",): "--moe-paged-stash is True; RMT needs False: it plans by the passes",
    ("--defer-embedding-wgrad-compute",): "--defer-embedding-wgrad-compute is True; RMT needs",
    (
        "--moe-input-jitter-eps",
        "0.1",
        *EXPERTS,
    ): "--moe-input-jitter-eps is 0.1; RMT needs it left out: it draws noise, in the update other",
    ("--moe-router-force-load-balancing", *EXPERTS): "--moe-router-force-load-balancing is True; "
    "RMT needs it left out: it draws noise,",
    (
        "--moe-router-force-biased",
        "-0.5",
        *EXPERTS,
    ): "--moe-router-force-biased is -0.5; RMT needs it left out: it draws noise,",
    (
        "--moe-expert-capacity-factor",
        "1.5",
        *EXPERTS,
    ): "--moe-expert-capacity-factor is 1.5; RMT needs it left out: which tokens are dropped",
    (
        "--moe-expert-rank-capacity-factor",
        "2",
        *EXPERTS,
    ): "--moe-expert-rank-capacity-factor is 2.0; RMT needs it left out: which tokens are",
    ("--moe-enable-routing-replay", *EXPERTS): "--moe-enable-routing-replay is True; RMT needs it",
    (
        "--moe-router-load-balancing-type",
        "sinkhorn",
        *EXPERTS,
    ): "--moe-router-load-balancing-type is sinkhorn; it balances the tokens of a pass,",
    (
        "--moe-router-load-balancing-type",
        "aux_loss",
        "quantile_balancing",
        *EXPERTS,
    ): "--moe-router-load-balancing-type is quantile_balancing; it takes no padding,",
    (
        "--moe-flex-dispatcher-backend",
        "hybridep",
        "--moe-token-dispatcher-type",
        "flex",
        "--expert-model-parallel-size",
        "2",
        *EXPERTS,
    ): "--moe-flex-dispatcher-backend is hybridep; with --expert-model-parallel-size 2 ranks",
    ("--rmt-top-k", "0"): "--rmt-top-k is 0; pass a number in [1, inf), or leave it out (all).",
    ("--rmt-top-p", "1.5"): "--rmt-top-p is 1.5; pass a number in (0, 1], or leave it out (all).",
    (
        "--rmt-logprob-tolerance",
        "0",
    ): "--rmt-logprob-tolerance is 0.0; pass a number in (0, inf], or "
    "leave it out (1e-3 in fp32, 0.2 in half precision): inf never stops.",
    (
        "--rmt-rollout-kv-gib",
        "-1",
    ): "--rmt-rollout-kv-gib is -1.0; pass a number in (0, inf), or leave it out (no bound).",
    (
        "--rmt-max-tokens",
        "0",
    ): "--rmt-max-tokens is 0; pass a number in [1, inf), or leave it out (as read).",
    ("--perform-rl-step",): "--perform-rl-step is True; RMT needs False:",
    ("--sft",): "--sft is True; RMT needs False:",
    ("--dataloader-inter-document-masking",): "--dataloader-inter-document-masking is True; RMT",
    (
        "--hybrid-layer-pattern",
        "M*EG",
    ): "--hybrid-layer-pattern is M*EG; RMT trains stacks of M (Mamba), * (attention) and - (MLP) "
    "on one pipeline stage, and has nothing for E G.",
    ("--use-torch-fsdp2",): "--use-torch-fsdp2 is True; RMT needs False:",
    ("--use-megatron-fsdp",): "--use-megatron-fsdp is True; RMT needs False:",
    ("--hybrid-context-parallel",): "--hybrid-context-parallel is True; RMT needs False: it deals",
    ("--logits-save-dir", "x"): "--logits-save-dir is x; RMT needs it left out: it listens to",
    ("--logits-load-dir", "x"): "--logits-load-dir is x; RMT needs it left out: it listens to",
    ("--te-precision-config-file", "x"): "--te-precision-config-file is x; RMT needs it left out:",
    ("--reuse-grad-buf-for-mxfp8-param-ag",): "--reuse-grad-buf-for-mxfp8-param-ag is True; RMT",
    ("--freeze-all-layers",): "--freeze-all-layers is True; RMT needs False: nothing would learn.",
    ("--inprocess-restart",): "--inprocess-restart is True; RMT needs False: what RMT knows",
    ("--fake-process-group",): "--fake-process-group is True; RMT needs False: ranks compare",
    ("--tensor-parallel-num-weight-shards", "4"): "--tensor-parallel-num-weight-shards is 4; RMT",
    ("--expert-tensor-parallel-num-weight-shards", "4"): "--expert-tensor-parallel-num-weight-shar"
    "ds is 4; RMT needs it left out: rollouts need whole weights.",
    ("--position-embedding-type", "mrope"): "--position-embedding-type is mrope; RMT supports",
    ("--transformer-impl", "inference_optimized"): "--transformer-impl is inference_optimized; RMT",
    ("--fp8-format", "e4m3"): "--fp8-recipe is delayed; rollouts would leak into its scaling "
    "history, pass blockwise or tensorwise.",
    ("--fp8-format", "hybrid", "--fp8-recipe", "mxfp8"): "--fp8-recipe is mxfp8; it needs a "
    "Blackwell GPU, pass blockwise or tensorwise.",
    ("--fp8-format", "e4m3", "--fp8-recipe", "custom"): "--fp8-recipe is custom; ",
    TENSORWISE: "--transformer-impl is local; FP8 needs transformer_engine:",
    BLOCKWISE: "--hidden-size makes a linear layer 64 wide; --fp8-recipe blockwise needs a "
    "multiple of 128.",
    ("--fp4-format", "e2m1"): "--fp4-format is e2m1; it needs a Blackwell GPU:",
    ("--use-distributed-optimizer", "--load", "run"): "--use-distributed-optimizer is on, whose "
    "saved state Megatron cannot load again with PyTorch's optimizers; leave it out,",
    ("--wandb-project", "rmt"): "--wandb-project is rmt and --wandb-exp-name is not set; name",
    ("--wandb-project", "rmt", "--wandb-exp-name", "x"): "--wandb-project is rmt and there is no "
    "folder for its files; pass --wandb-save-dir or --save.",
    (
        "--wandb-project",
        "rmt",
        "--wandb-exp-name",
        "x",
        "--wandb-save-dir",
        "run",
    ): "--wandb-project "
    "is rmt and --tensorboard-dir is not set; Megatron sends its metrics to wandb only beside "
    "TensorBoard: pass --tensorboard-dir.",
}


@pytest.mark.parametrize("flags", BAD, ids=" ".join)
def test_what_cannot_work_is_refused_with_flag_value_and_remedy(flags: tuple[str, ...]):
    assert BAD[flags] in _refusal(_parse("--rmt", *flags))


@pytest.mark.parametrize(
    ("micro_batches", "together", "multiple"),
    [
        # 4 pipeline stages; Megatron's schedule takes 4 of what 2 samples on 2 ranks make.
        (4, None, None),
        (8, None, None),
        (2, None, 16),
        (7, None, 16),
        (6, 6, None),
        (10, 6, None),
        (8, 6, 24),
    ],
)
def test_micro_batches_must_be_enough_for_virtual_pipeline_stages(
    micro_batches: int, together: int | None, multiple: int | None
):
    args = _parse("--rmt", "--pipeline-model-parallel-size", "4", "--micro-batch-size", "2")
    args.virtual_pipeline_model_parallel_size, args.data_parallel_size = 2, 2
    args.microbatch_group_size_per_vp_stage = together
    args.global_batch_size = 4 * micro_batches
    problem = interleaving_problem(args)
    if multiple is None:
        assert problem is None
        return
    assert f"--global-batch-size is {4 * micro_batches}, which is {micro_batches} micro" in problem
    assert problem.endswith(f"pass a multiple of {multiple}.")
    assert problem in _refusal(args)
    args.global_batch_size = 4 * together if together else 16
    assert interleaving_problem(args) is None
    args.eval_iters, args.eval_micro_batch_size, args.eval_global_batch_size = 2, 1, 2
    assert interleaving_problem(args).startswith("--eval-global-batch-size is 2, which is 1 micro")
    args.eval_iters = 0
    assert interleaving_problem(args) is None
    args.microbatch_group_size_per_vp_stage = 3
    too_few = "--microbatch-group-size-per-virtual-pipeline-stage is 3; 4 pipeline stages need 4"
    assert interleaving_problem(args).startswith(too_few)
    # Only they ask for it.
    args.virtual_pipeline_model_parallel_size = None
    assert interleaving_problem(args) is None


def test_a_softmax_that_forgets_windows_is_refused():
    problems = [*unsupported(_parse("--rmt", "--window-size", "128,0"))]
    sentence = "128,0, which the fused softmax of --transformer-impl local does not know; pass"
    assert [sentence in problem for problem in problems] == [True]


@pytest.mark.parametrize("skip", [[], ["2"], ["[1,0]"]])
@pytest.mark.parametrize("fused", [False, True], ids=["local", "engine"])
def test_windows_over_what_is_behind_a_token_are_accepted(skip: list[str], fused: bool):
    flags = (
        ["--transformer-impl", "transformer_engine"] if fused else ["--no-masked-softmax-fusion"]
    )
    flags += ["--window-size", "16,0", *(["--window-attn-skip-freq", *skip] if skip else [])]
    assert [*unsupported(_parse("--rmt", *flags))] == []


@pytest.mark.parametrize(
    ("growth", "length", "sentence"),
    [
        # Thresholds in tokens: 4 samples of 128.
        ("0:2 512:4", {"train_samples": 12}, None),
        ("0:2 512:4", {"train_samples": 13}, "13, but the steps take 16; pass 16, or 12, so"),
        ("0:2 512:4", {"train_iters": 4}, "those of 4 steps of 2 sample(s); pass --train-samples"),
        ("0:4 512:2", {"train_samples": 12}, "whose steps have 4 then 2 samples; pass numbers"),
        ("0:2 512:5", {"train_samples": 14}, "multiples of --micro-batch-size times data-parallel"),
        ("0:2 512", {"train_samples": 12}, 'is 0:2 512: Invalid schedule entry "512"'),
        ("512:2", {"train_samples": 12}, "is 512:2: first schedule entry must have threshold 0"),
    ],
)
def test_a_batch_grows_by_whole_micro_batches_in_a_run_counted_in_samples(
    growth: str, length: dict[str, int], sentence: str | None
):
    args = _parse("--rmt", "--step-batch-size-schedule", growth)
    args.data_parallel_size, args.global_batch_size = 2, 2
    vars(args).update({"train_iters": None} | length)
    problems = [problem for problem in unsupported(args) if "--step-batch" in problem]
    assert len(problems) == (sentence is not None)
    assert all(sentence in problem for problem in problems)


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        ("Et|t|t|tL", None),
        # A chunk of a stage may be empty.
        ("Et|t|t|||||tL", None),
        ("Ett||tt|L", "is Ett||tt|L, which leaves nothing to pipeline stage 1; give each a layer"),
        ("Et|t|t|||||tmmL", None),
        (
            "Et|t|t|tm|||mL",
            "is Et|t|t|tm|||mL; put the layers of multi-token prediction (m) beside",
        ),
        ("Et|t|t|||||xL", "is Et|t|t|||||xL: Invalid layer character: x"),
    ],
)
def test_a_layout_gives_every_stage_something_and_the_last_all_predictions(
    layout: str, sentence: str | None
):
    args = _parse("--rmt", "--pipeline-model-parallel-size", "4")
    args.pipeline_model_parallel_layout = layout
    problems = [problem for problem in unsupported(args) if "-layout" in problem]
    assert len(problems) == (sentence is not None)
    assert all(sentence in problem for problem in problems)


def test_the_schedules_need_a_number_of_steps():
    args = _parse("--rmt")
    args.train_iters = None
    assert "--train-iters is not set; RMT's schedules need it, or --train-samples." in (
        _refusal(args)
    )
    args.train_samples = 20
    assert [*setting_problems(args)] == []


@pytest.mark.parametrize(
    ("layers", "whose"), [("local", "layers have"), ("transformer_engine", "head has")]
)
def test_apex_is_never_needed(layers: str, whose: str):
    args = _parse("--rmt")
    args.gradient_accumulation_fusion, args.transformer_impl = True, layers
    refusal = _refusal(args)
    assert f"--transformer-impl is {layers}, whose {whose} the fused weight gradient" in refusal
    assert "pass --no-gradient-accumulation-fusion (RMT never needs apex)" in refusal


@pytest.mark.parametrize("flag", ["--use-te-activation-func", "--use-transformer-engine-op-fuser"])
def test_local_layers_have_nothing_of_transformer_engine(flag: str):
    assert f"{flag} is on and --transformer-impl is local, whose" in _refusal(_parse("--rmt", flag))
    args = _parse("--rmt", flag)
    args.transformer_impl = "transformer_engine"
    assert not any(flag in problem for problem in validation._missing(args))


def test_ucc_wants_more_than_one_connection(monkeypatch: pytest.MonkeyPatch):
    args = _parse("--rmt", "--pipeline-model-parallel-comm-backend", "ucc")
    for connections, problems in (("1", 1), ("8", 0)):
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", connections)
        assert sum("is ucc, for which" in one for one in validation._missing(args)) == problems


def test_latent_attention_that_only_a_gpu_has_is_refused(monkeypatch: pytest.MonkeyPatch):
    args = _parse("--rmt", "--multi-latent-attention", "--transformer-impl", "local")
    assert "is local, whose attention" not in _refusal(args)
    # Without what stands in for it on a CPU.
    original = DotProductAttention.__init__.__wrapped__
    monkeypatch.setattr(DotProductAttention, "__init__", original)
    args.apply_rope_fusion = True
    found = _refusal(args)
    assert "--transformer-impl is local, whose attention Megatron cannot build with" in found
    assert "--rope-type is yarn and rotation is fused" in found
    assert "pass --no-rope-fusion: tokens" in found


def test_all_problems_are_reported_at_once():
    last = {flags[0]: flags for flags in BAD if flags not in (BLOCKWISE, TENSORWISE)}
    refusal = _refusal(_parse("--rmt", *(word for flags in last.values() for word in flags)))
    assert "--rmt-minimum-budget is 900" in refusal
    for flag in last:
        if flag != "--fp8-format":
            assert f"{flag} is " in refusal, flag


# Beside a hybrid stack.
BAD_FOR_HYBRIDS = {
    ("--pipeline-model-parallel-size", "2"): "--pipeline-model-parallel-size is 2; RMT needs 1 ",
    ("--context-parallel-size", "2"): "--context-parallel-size is 2; RMT needs 1 ",
    ("--sequence-parallel",): "--sequence-parallel is True; RMT needs False ",
    ("--reset-attention-mask",): "--reset-attention-mask is True; RMT needs False ",
    ("--mamba-training-ssm-states-dtype", "bf16"): "--mamba-training-ssm-states-dtype is bf16; RMT "
    "needs it left out ",
    ("--mtp-num-layers", "1"): "--mtp-num-layers is 1; RMT needs it left out ",
    ("--multi-latent-attention", "--no-rope-fusion"): "--multi-latent-attention is True; RMT needs "
    "False ",
    ("--disable-mamba-mem-eff-path",): "--disable-mamba-mem-eff-path is given; RMT needs it left "
    "out ",
}


@pytest.mark.parametrize("flags", BAD_FOR_HYBRIDS)
def test_what_a_hybrid_stack_cannot_be_combined_with_is_refused(flags, tokenizer: str):
    hybrid = ["--rmt", "--tokenizer-model", tokenizer, "--hybrid-layer-pattern", "M*M-"]
    check_rmt_arguments(_parse(*hybrid))
    refusal = _refusal(_parse(*hybrid, *flags))
    assert f"{BAD_FOR_HYBRIDS[flags]}with --hybrid-layer-pattern: " in refusal
    alone = ["--rmt", "--tokenizer-model", tokenizer, "--eval-iters", "0"]
    check_rmt_arguments(_parse(*alone, *flags))


def test_state_space_layers_on_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch, tokenizer: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    hybrid = ["--rmt", "--tokenizer-model", tokenizer, "--hybrid-layer-pattern", "M*M-"]
    assert "--hybrid-layer-pattern is M*M-; RMT trains state-space layers on a CPU only: " in (
        _refusal(_parse(*hybrid))
    )


def test_every_flag_that_a_refusal_names_exists():
    known = {name for action in _parser()._actions for name in action.option_strings}
    for flags in [*BAD, *(("--hybrid-layer-pattern", "M*", *own) for own in BAD_FOR_HYBRIDS)]:
        args = _parse("--rmt", *flags)
        args.train_iters, args.virtual_pipeline_model_parallel_size = None, 2
        args.pipeline_model_parallel_size, args.global_batch_size = 2, 1
        named = set(re.findall(r"--[a-z0-9-]+", _refusal(args)))
        assert named <= known, flags


def _documented() -> list[tuple[str, list[str], str]]:
    """(line, flags, state) of each row of the tables of docs/megatron-flags.md."""
    text = (REPOSITORY / "docs" / "megatron-flags.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [(row[0], re.findall(r"`(--[a-z0-9*-]+)`", row[0]), row[1]) for row in rows]


def test_the_page_of_megatrons_flags_knows_its_groups_and_names_flags_that_exist():
    text = (REPOSITORY / "docs" / "megatron-flags.md").read_text(encoding="utf-8").lower()
    groups = [group.title for group in _parser()._action_groups if group._group_actions]
    groups.remove("options")
    groups.remove(GROUP_TITLE)
    assert [title for title in groups if title.lower() not in text] == []
    known = {name for action in _parser()._actions for name in action.option_strings}
    named = [flag for _, flags, _ in _documented() for flag in flags]
    assert len(named) > 150
    assert [flag for flag in named if not fnmatch.filter(known, flag)] == []


def test_what_the_page_of_megatrons_flags_calls_refused_is_and_nothing_else():
    tried = {word for flags in BAD for word in flags if word.startswith("--")}
    # By Megatron, by the parser of --rmt-config, for want of --train-iters; what Megatron makes
    # another flag of.
    tried |= {"--delay-wgrad-compute", "--ep-overlap-early-attn-memory-release"}
    tried |= {"--fp8-output-proj", "--yaml-cfg"}
    tried |= {"--enable-cuda-graph", "--external-cuda-graph"}
    tried |= {word for flags in BAD_FOR_HYBRIDS for word in flags if word.startswith("--")}
    refused = {flag for _, flags, state in _documented() if "refused" in state for flag in flags}
    assert refused <= tried | {"--moe-token-dispatcher-type"}
    documented = {flag for _, flags, _ in _documented() for flag in flags}
    refused_by_rmt = {flags[0] for flags in BAD if not flags[0].startswith(("--rmt", "--wandb"))}
    assert refused_by_rmt <= documented
    works = {flag for _, flags, state in _documented() if state != "refused" for flag in flags}
    both = {"--use-distributed-optimizer", "--moe-router-load-balancing-type"}
    both |= {"--fp8-format", "--fp8-recipe", "--position-embedding-type", "--transformer-impl"}
    both |= {"--moe-flex-dispatcher-backend", "--expert-model-parallel-size"}
    both |= {"--window-size", "--window-attn-skip-freq", "--context-parallel-size"}
    both |= {"--mtp-num-layers", "--hybrid-layer-pattern"}
    assert refused_by_rmt & works <= both | {"--attention-dropout", "--hidden-dropout"}


@pytest.mark.parametrize("recipe", [BLOCKWISE, TENSORWISE], ids=["blockwise", "tensorwise"])
def test_recipes_of_a_hopper_gpu_are_accepted(monkeypatch, tokenizer: str, recipe: tuple[str, ...]):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    flags = "--hidden-size 1024 --ffn-hidden-size 2048 --num-attention-heads 8 --kv-channels 128"
    flags += " --group-query-attention --num-query-groups 2 --tensor-model-parallel-size 2"
    flags += f" --transformer-impl transformer_engine --rmt --tokenizer-model {tokenizer}"
    check_rmt_arguments(_parse(*recipe, *flags.split()))


@pytest.mark.parametrize(
    ("recipe", "change", "sentence"),
    [
        (BLOCKWISE, "--ffn-hidden-size 2176", "makes a linear layer 1088 wide on each of 2 tensor"),
        (BLOCKWISE, "--num-query-groups 1", "--num-query-groups * --kv-channels makes a linear"),
        (TENSORWISE, "--ffn-hidden-size 2064", "makes a linear layer 1032 wide on each of 2"),
        (TENSORWISE, "--hidden-size 1000", "--hidden-size makes a linear layer 1000 wide;"),
        (BLOCKWISE, "--num-experts 4 --moe-ffn-hidden-size 96", "--moe-ffn-hidden-size makes a"),
    ],
)
def test_widths_that_fp8_cannot_divide_are_refused(
    monkeypatch, recipe: tuple[str, ...], change: str, sentence: str
):
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    flags = "--hidden-size 1024 --ffn-hidden-size 2048 --num-attention-heads 8 --kv-channels 64"
    flags += " --group-query-attention --num-query-groups 2 --tensor-model-parallel-size 2"
    flags += f" --transformer-impl transformer_engine --rmt {change}"
    refusal = _refusal(_parse(*recipe, *flags.split()))
    assert sentence in refusal
    assert f"needs a multiple of {128 if recipe is BLOCKWISE else 16}." in refusal
    assert refusal.count("; --fp8-recipe") == 1


@pytest.mark.parametrize("version", ["12.8", None])
def test_blockwise_needs_a_recent_cuda(monkeypatch, version: str | None):
    monkeypatch.setattr(torch.version, "cuda", version)
    sentence = (
        f"--fp8-recipe is blockwise, which needs CUDA 12.9, and this PyTorch has CUDA {version}"
    )
    assert sentence in _refusal(_parse("--rmt", *BLOCKWISE))


def test_a_prompt_that_does_not_fit_the_model_is_refused(tokenizer: str):
    args = _parse("--rmt", "--tokenizer-model", tokenizer, "--max-position-embeddings", "1024")
    refusal = _refusal(args)
    assert "--max-position-embeddings is 1024 but a sample of 128 tokens" in refusal
    assert "lower --rmt-initial-budget or --seq-length" in refusal


def _write_data(prefix: Path, largest: int) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    builder.add_document(torch.tensor([1, largest, 2]), [3])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


# What is wrong with the files of a run -> what is said of it.
FILES = {
    "no tokenizer": "--tokenizer-type HuggingFaceTokenizer --tokenizer-model ./nowhere cannot be",
    "no text": "--tokenizer-type NullTokenizer --tokenizer-model None does not suit RMT, which",
    "lower case": "does not suit RMT, which reads answers as text: the tokenizer (class Tokeniz",
    "no end": "no token that ends a text, which --data-path, --reset-position-ids cannot do witho",
    "no template": "--rmt-template is no-such-template; template 'no-such-template' is neither",
    "bad template": "must be one object with exactly the fields",
    "long template": "xxx... cannot be read: File name too long",
    "chat template": "is rpt; the chat template of tokenizer {0} cannot be rendered, it says Undef",
    "small model": "--tokenizer-model has 258 tokens but the model only 128 rows of embedding",
    "other data": "holds token 1000 but --tokenizer-model has 258 tokens; tokenize the corpus with",
    "no data": "but there is no nowhere/train.idx; pass the prefix of a .bin and .idx file.",
    "half the data": "half.bin is missing; tokenize the corpus again.",
    "other blend": "--rmt-skip-sources is web; web is no corpus of the training blend, which has ",
}


@pytest.fixture(scope="module")
def files(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Flags of each case of ``FILES``."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "bad.json").write_text(json.dumps({"head": ""}))
    (folder / "half.idx").touch()
    own = ["--tokenizer-model", tokenizer]
    lower, endless = (shutil.copytree(tokenizer, folder / name) for name in ("lower", "endless"))
    description = json.loads((lower / "tokenizer.json").read_text())
    description["normalizer"] = {"type": "Lowercase"}
    (lower / "tokenizer.json").write_text(json.dumps(description))
    settings = json.loads((endless / "tokenizer_config.json").read_text()) | {"eos_token": None}
    (endless / "tokenizer_config.json").write_text(json.dumps(settings))
    data = ["--data-path", _write_data(folder / "data", 1)]
    return {
        "no tokenizer": ["--tokenizer-model", "./nowhere"],
        "no text": ["--tokenizer-type", "NullTokenizer", "--vocab-size", "258"],
        "lower case": ["--tokenizer-model", str(lower)],
        "no end": ["--tokenizer-model", str(endless), "--reset-position-ids", *data],
        "no template": [*own, "--rmt-template", "no-such-template"],
        "bad template": [*own, "--rmt-template", str(folder / "bad.json")],
        "long template": [*own, "--rmt-template", "x" * 5000],
        "chat template": [*own, "--chat-template", "{{ no_such_thing() }}"],
        "small model": [*own, "--padded-vocab-size", "128"],
        "other data": [*own, "--data-path", _write_data(folder / "other", 1000)],
        "no data": [*own, "--data-path", "0.5", "nowhere/train"],
        "half the data": [*own, "--data-path", str(folder / "half")],
        "other blend": [*own, *data, "--rmt-skip-sources", "web"],
    }


@pytest.mark.parametrize("case", FILES)
def test_files_that_do_not_go_together_are_refused(
    files: dict[str, list[str]], tokenizer: str, case: str
):
    assert FILES[case].format(tokenizer) in _refusal(_parse("--rmt", *files[case]))


def test_a_chat_template_that_is_not_asked_for_may_be_broken(files: dict[str, list[str]]):
    check_rmt_arguments(_parse("--rmt", "--rmt-no-chat", *files["chat template"]))


def test_data_of_the_right_vocabulary_is_accepted(tokenizer: str, tmp_path: Path):
    data = _write_data(tmp_path / "train", 257)
    check_rmt_arguments(_parse("--rmt", "--tokenizer-model", tokenizer, "--data-path", "1", data))
    # A job of one's own may give --data-path another meaning.
    check_rmt_arguments(
        _parse("--rmt", "--tokenizer-model", tokenizer, "--data-path", str(tmp_path))
    )


def _end_of_each(configurations: list[list[str]]) -> list[tuple[str, float]]:
    """On each rank: with what message, after how many seconds, Megatron's own parsing ends."""
    from megatron.training.arguments import parse_and_validate_args

    megatron_rmt.patch()
    ends = []
    for flags in configurations:
        sys.argv = ["pretrain.py", *cpu_platform.add_required_flags([*MODEL, "--rmt", *flags])]
        began = time.perf_counter()
        try:
            parse_and_validate_args()
            message = "nothing was refused"
        except (SystemExit, AssertionError, ValueError, NotImplementedError) as error:
            message = " ".join(str(error).split())
        ends.append((message, time.perf_counter() - began))
    return ends


@pytest.mark.multiprocess
def test_wrong_configurations_end_alike_on_two_ranks(files: dict[str, list[str]], tokenizer: str):
    """Through Megatron's own parser and checks, which refuse some of them before RMT does."""
    expected = {
        **{flags: BAD[flags] for flags in BAD},
        **{tuple(files[k]): FILES[k].format(tokenizer) for k in FILES},
    }
    assert len(expected) >= 60
    first, second = run_distributed(2, _end_of_each, [list(flags) for flags in expected])
    by_megatron = 0
    for flags, (message, seconds), (other, _) in zip(expected, first, second, strict=True):
        assert message == other != "nothing was refused", flags
        assert seconds < 20
        assert len(message) > 10
        if not message.startswith("RMT cannot train"):
            by_megatron += 1
        else:
            assert expected[flags] in message, flags
    assert by_megatron <= 17
