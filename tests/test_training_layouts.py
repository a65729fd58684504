"""Whole runs in the layouts of large jobs, and of other models, against one process."""

from pathlib import Path

import pytest

from tests.tiny_run import RMT, Run
from tests.training_curves import (
    CP2,
    PACKED,
    PP2,
    PP2_VP2,
    SHARDED,
    TIERED,
    TP2,
    Start,
    assert_same_curve,
)

pytestmark = pytest.mark.multiprocess

LAYERS = "--num-layers-per-virtual-pipeline-stage"
LAYOUT = "--pipeline-model-parallel-layout"
TOGETHER = "--microbatch-group-size-per-virtual-pipeline-stage"
INTERLEAVED = {
    "TP2 x PP2 x VP2": (4, [*TP2, *PP2_VP2]),
    "layers of a chunk": (2, [*PP2, LAYERS, "1"]),
    "uneven": (2, [*PP2, LAYOUT, "Ett|t||tL"]),
    "embedding and loss in chunks of their own": (2, [*PP2, LAYOUT, "E|tt|tt|L"]),
    "micro-batches in groups of four": (2, [*PP2_VP2, TOGETHER, "4"]),
    "DP2, packed": (4, [*PP2_VP2, *PACKED]),
    "DP2, overlapped communication": (4, [*PP2_VP2, *SHARDED]),
    "overlapped at both ends": (2, [*PP2_VP2, "--overlap-p2p-communication-warmup-flush"]),
    "loss per token": (2, [*PP2_VP2, "--calculate-per-token-loss"]),
    "waves": (2, [*PP2_VP2, "--rmt-rollout-kv-gib", "5e-4"]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "flags"), INTERLEAVED.values(), ids=INTERLEAVED)
def test_virtual_pipeline_stages_train_like_one_process(
    start: Start, reference: Run, ranks: int, flags: list[str]
):
    assert_same_curve(start(ranks, [*RMT, *flags]).metrics, reference.metrics)


RECOMPUTE = ["--recompute-granularity", "full", "--recompute-method", "uniform"]
RECOMPUTE += ["--recompute-num-layers", "1"]
SHARING = {
    "TP2 x CP2": (4, [*TP2, *CP2]),
    "CP2 x DP2, distributed optimizer": (4, [*CP2, *SHARDED]),
    "CP2 x DP2, packed": (4, [*CP2, *PACKED]),
    "CP2 x PP2": (4, [*CP2, *PP2]),
    "CP2 x PP2 x VP2": (4, [*CP2, *PP2_VP2]),
    "loss per token": (2, [*CP2, "--calculate-per-token-loss"]),
    "micro-batches of 2": (2, [*CP2, "--micro-batch-size", "2"]),
    "waves": (2, [*CP2, "--rmt-rollout-kv-gib", "5e-4"]),
    "dense masks": (2, [*CP2, "--rmt-attention", "sdpa"]),
    "full recompute": (2, [*CP2, *RECOMPUTE]),
    "CP4": (4, ["--context-parallel-size", "4"]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "flags"), SHARING.values(), ids=SHARING)
def test_context_parallel_ranks_train_like_one_process(
    start: Start, reference: Run, ranks: int, flags: list[str]
):
    assert_same_curve(start(ranks, [*RMT, *flags]).metrics, reference.metrics)


WINDOWS = ["--window-size", "9,0", "--window-attn-skip-freq", "2"]
ATTENTION = {
    "windows": WINDOWS,
    "off by one": ["--softmax-type", "off-by-one"],
    # With the seed of the other runs one draw of TP 2 falls between two tokens, by rounding.
    "windows and sinks": [*WINDOWS, "--softmax-type", "learnable", "--rmt-seed", "11"],
}


@pytest.mark.slow
@pytest.mark.parametrize("layers", ATTENTION.values(), ids=ATTENTION)
@pytest.mark.parametrize("greedy", [[], ["--rmt-greedy"]], ids=["sampled", "greedy"])
def test_layers_that_attend_otherwise_train_alike_in_every_layout(
    start: Start, reference: Run, tmp_path: Path, layers: list[str], greedy: list[str]
):
    flags = [*RMT, *greedy, *layers]
    # The converted checkpoint has no sinks, and random ones are others on two ranks.
    saving = ["--save", str(tmp_path), "--save-interval", "1"]
    first = start(1, [*flags, *saving, "--exit-interval", "1", "--dist-ckpt-strictness", "log_all"])
    assert first.metrics[0]["entropy"] != reference.metrics[0]["entropy"]
    alone = start(1, [*flags, *saving], resume_from=tmp_path)
    latest = tmp_path / "latest_checkpointed_iteration.txt"
    latest.write_text("1")
    for layout in (TP2, PP2):
        curve = start(2, [*flags, *layout], resume_from=tmp_path).metrics
        assert_same_curve(curve, alone.metrics)
    latest.write_text("3")
    assert start(1, flags, resume_from=tmp_path).metrics == alone.metrics[2:]


MIXTURE = ["--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "48"]
MIXTURE += ["--moe-router-load-balancing-type", "none", "--moe-token-dispatcher-type", "alltoall"]


BALANCED = ["--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "0.1"]
BALANCED += ["--moe-z-loss-coeff", "0.01", "--calculate-per-token-loss"]
BIASED = ["--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"]
BIASED += ["--moe-router-bias-update-rate", "0.05"]


# The first layer has no experts, the others also have one for all tokens; half of a head is turned.
SHARED = ["--moe-layer-freq", "[0]+[1]*3", "--moe-shared-expert-intermediate-size", "48"]
SHARED += ["--moe-router-topk-scaling-factor", "1.5", "--moe-router-dtype", "fp32"]
SHARED += ["--rotary-percent", "0.5"]


EP2 = ["--expert-model-parallel-size", "2"]


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        pytest.param([], EP2, id="EP2"),
        pytest.param([*BALANCED, *BIASED], PP2, id="PP2, balanced and biased"),
        pytest.param(TIERED[-4:], EP2, id="EP2, tiers", marks=pytest.mark.slow),
        pytest.param(
            [*BALANCED, *BIASED], PP2_VP2, id="PP2 x VP2, balanced", marks=pytest.mark.slow
        ),
        pytest.param([], [*EP2, *PP2_VP2], id="EP2 x PP2 x VP2", marks=pytest.mark.slow),
        pytest.param([*BIASED, *SHARED], EP2, id="EP2, as GLM-4.5", marks=pytest.mark.slow),
    ],
)
def test_experts_on_two_ranks_train_like_one_process(
    start: Start, tmp_path: Path, options: list[str], layout: list[str]
):
    """The ranks of experts, which are also data-parallel, have rollouts of different lengths;
    those of a pipeline pad their trees, which no router counts."""
    flags = [*RMT, *MIXTURE, *options]
    first = ["--finetune", "--save", str(tmp_path), "--save-interval", "1", "--exit-interval", "1"]
    no_checkpoint = ["--load", str(tmp_path / "none")]
    start(1, [*flags, *first, *no_checkpoint])
    # The optimizer of one process does not hold what two would load.
    resumed = [*flags, "--exit-interval", "3", "--no-load-optim", "--no-load-rng"]
    alone = start(1, resumed, resume_from=tmp_path)
    assert [line["iteration"] for line in alone.metrics] == [2, 3]
    ranks = 4 if layout[: len(EP2)] == EP2 != layout else 2
    lines = start(ranks, [*resumed, *layout], resume_from=tmp_path).metrics
    assert_same_curve(lines, alone.metrics)
