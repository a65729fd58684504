"""The whole program: RMT inside Megatron's pretrain(), alike in every layout, resumed or not."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tests.distributed import REPOSITORY, run_torchrun
from tests.tiny_checkpoints import TOOLS
from tests.tiny_run import (
    PRETRAIN,
    RMT,
    STEPS,
    Line,
    Run,
    TinyInputs,
    checkpoint_tensors,
    read_metrics,
    run,
)

sys.path.insert(0, str(TOOLS))

import convert_checkpoint

pytestmark = pytest.mark.multiprocess

# Layouts add the same fp32 numbers in another order: 1e-7 relative at first, which Adam, dividing
# by the gradient's own size, and six steps enlarge (largest seen: 5e-7).
TOLERANCE = 1e-5
# Sums of numbers that no weight enters, once positions and tokens are the same.
COUNTED = (
    "chosen easy",
    "chosen medium",
    "chosen hard",
    "match rate",
    "well-formed rate",
    "closed by itself",
    "thought length",
    "length reward",
    "reward",
    "zero-variance groups",
    "truncated",
    "trunk tokens",
    "stem tokens",
    "branch tokens",
    "budget",
)
SELECTED = (
    *("threshold easy", "threshold medium", "threshold hard", "above entropy ceiling"),
    *("replaced", "kept without variance"),
)
COMPUTED = ("entropy", "next-token accuracy", "entropy of chosen", "ntp loss", "grad norm")
PACKED = ["--rmt-max-tokens", "600"]
TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
CP2 = ["--context-parallel-size", "2"]
# Four layers: two chunks of one on each of two stages.
PP2_VP2 = [*PP2, "--num-virtual-stages-per-pipeline-rank", "2"]
SHARDED_OPTIMIZER = ["--use-distributed-optimizer"]
OVERLAP = ["--overlap-param-gather", "--overlap-grad-reduce"]
SEPARATE_DOCUMENTS = ["--reset-attention-mask", "--reset-position-ids", "--eod-mask-loss"]

Start = Callable[..., Run]


@pytest.fixture(scope="session")
def start(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """``start(ranks, flags)``: a run from the converted checkpoint, or from a run's."""

    def start_run(
        ranks: int,
        flags: Sequence[str],
        resume_from: Path | None = None,
        program: Path = PRETRAIN,
    ) -> Run:
        directory = tmp_path_factory.mktemp("run") / "logs"
        return run(directory, ranks, [*inputs.flags(resume_from), *flags], program)

    return start_run


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reference leaves its last checkpoint."""
    return tmp_path_factory.mktemp("uninterrupted")


@pytest.fixture(scope="session")
def reference(start: Start, saved: Path) -> Run:
    """Six steps of one process."""
    return start(1, [*RMT, "--save", str(saved), "--save-interval", str(STEPS)])


def assert_same_curve(lines: Sequence[Line], expected: Sequence[Line]) -> None:
    """The same positions and rollouts in every step, the same losses and rewards."""
    assert len(lines) == len(expected) > 0
    for line, reference_line in zip(lines, expected, strict=True):
        step = f"step {line['iteration']}"
        assert line.keys() == reference_line.keys()
        assert line["iteration"] == reference_line["iteration"]
        assert line["rollout checksum"] == reference_line["rollout checksum"], step
        for names, tolerance in ((COUNTED, 1e-6), (COMPUTED, TOLERANCE)):
            for name in names:
                expected_value = reference_line[name]
                if expected_value is not None:
                    expected_value = pytest.approx(expected_value, rel=tolerance, abs=1e-7)
                assert line[name] == expected_value, (step, name)
        # With the ratio at 1 the policy loss is the mean advantage: 0 but for rounding.
        assert abs(line["rl loss"]) < 1e-6, step
        assert line["largest logprob difference"] < 1e-4, step


def test_the_reference_is_worth_comparing_with(reference: Run):
    """All tiers, several thought lengths, right and wrong answers, a loss that moves."""
    lines = reference.metrics
    assert [line["budget"] for line in lines] == [6, 4, 3, 2, 2, 1]
    for tier in ("easy", "medium", "hard"):
        assert sum(line[f"chosen {tier}"] for line in lines) > 0, tier
    assert all(line["closed by itself"] > 0 for line in lines[:3])
    assert any(0 < line["closed by itself"] < 1 for line in lines)
    assert any(0 < line["match rate"] < 1 for line in lines)
    assert all(line["zero-variance groups"] < 1 for line in lines)
    assert all(
        0 < line["entropy p10"] < line["entropy p50"] < line["entropy p90"] for line in lines
    )
    # 4 samples of 64 tokens, 3 positions each, a stem of 8 tokens or so.
    assert all(line["trunk tokens"] == 4 * 64 for line in lines)
    assert all(line["stem tokens"] % 12 == 0 for line in lines)
    asked = [[line[f"asked {tier}"] for tier in ("easy", "medium", "hard")] for line in lines]
    assert asked[0] == pytest.approx([0.6, 0.3, 0.1])
    assert asked[-1] == pytest.approx([0.1, 0.3, 0.6])
    assert len({line["rollout checksum"] for line in lines}) == STEPS
    assert max(line["ntp loss"] for line in lines) > 1.02 * min(line["ntp loss"] for line in lines)


LAYOUTS = {
    "TP2": (2, TP2),
    "PP2": (2, PP2),
    "TP2 x PP2": (4, TP2 + PP2),
    "PP2 x VP2": (2, PP2_VP2),
    "CP2": (2, CP2),
    "DP2, distributed optimizer": (2, SHARDED_OPTIMIZER),
    "DP2, overlapped communication": (2, SHARDED_OPTIMIZER + OVERLAP),
    "DP2, loss per token": (2, ["--calculate-per-token-loss"]),
    "micro-batches of 2": (1, ["--micro-batch-size", "2"]),
    "packed": (1, PACKED),
    "packed, DP2": (2, PACKED),
    "packed, PP2 x DP2, micro-batches of 2": (
        4,
        [*PACKED, *PP2, "--micro-batch-size", "2", "--global-batch-size", "4"],
    ),
}


@pytest.mark.parametrize(("ranks", "flags"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_trains_like_one_process(
    start: Start, reference: Run, ranks: int, flags: list[str]
):
    assert_same_curve(start(ranks, [*RMT, *flags]).metrics, reference.metrics)


LAYERS = "--num-layers-per-virtual-pipeline-stage"
LAYOUT = "--pipeline-model-parallel-layout"
TOGETHER = "--microbatch-group-size-per-virtual-pipeline-stage"
SHARDED = [*SHARDED_OPTIMIZER, *OVERLAP]
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


@pytest.fixture(scope="session")
def greedy(start: Start) -> list[Line]:
    return start(1, [*RMT, "--rmt-greedy"]).metrics


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(4, TP2 + PP2, id="TP2 x PP2"),
        pytest.param(2, PP2_VP2, id="PP2 x VP2", marks=pytest.mark.slow),
        pytest.param(2, CP2, id="CP2", marks=pytest.mark.slow),
        pytest.param(4, TP2 + CP2, id="TP2 x CP2", marks=pytest.mark.slow),
    ],
)
def test_greedy_rollouts_are_alike_in_every_layout(
    start: Start, greedy: list[Line], reference: Run, ranks: int, flags: list[str]
):
    # Rollouts of a group are equal, so that there is nothing to learn from them.
    assert [line["zero-variance groups"] for line in greedy] == [1.0] * STEPS
    assert greedy[0]["rollout checksum"] != reference.metrics[0]["rollout checksum"]
    assert_same_curve(start(ranks, [*RMT, "--rmt-greedy", *flags]).metrics, greedy)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [PP2_VP2, CP2], ids=["PP2 x VP2", "CP2"])
@pytest.mark.parametrize(
    "options", [[], ["--rmt-reward", "information-gain", "--rmt-baseline-decay", "0.5"]]
)
def test_a_run_resumes_bitwise_in_its_layout_and_in_one_process(
    start: Start, tmp_path: Path, options: list[str], layout: list[str]
):
    flags, first, second = [*RMT, *options], tmp_path / "first", tmp_path / "second"
    saving = ["--save-interval", "2", "--exit-interval", "4", "--save"]
    whole = start(2, [*flags, *layout, *saving, str(first)])
    (first / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = start(2, [*flags, *layout, *saving, str(second)], resume_from=first)
    assert resumed.metrics == whole.metrics[2:]
    ours, expected = (checkpoint_tensors(folder, 4) for folder in (second, first))
    assert ours.keys() == expected.keys()
    assert any(name.startswith("optimizer.state.exp_avg_sq") for name in ours)
    assert any(name.startswith("rmt_baseline.decoder") for name in ours) == bool(options)
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    alone = start(1, [*flags, "--exit-interval", "4"], resume_from=first)
    for line, expected_line in zip(alone.metrics, whole.metrics[2:], strict=True):
        assert line["rollout checksum"] == expected_line["rollout checksum"]
        for name in ("reward", "grad norm", "ntp loss"):
            assert line[name] == pytest.approx(expected_line[name], rel=1e-3, abs=1e-5), name


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


def test_separate_documents_train_alike_in_every_layout(start: Start, reference: Run):
    alone = start(1, [*RMT, *SEPARATE_DOCUMENTS])
    assert alone.metrics[0]["entropy"] != reference.metrics[0]["entropy"]
    flags = [*RMT, *SEPARATE_DOCUMENTS, "--micro-batch-size", "2"]
    assert_same_curve(start(2, flags).metrics, alone.metrics)
    assert_same_curve(start(4, [*flags, *TP2, *PP2]).metrics, alone.metrics)


def test_a_boxed_answer_after_an_instruction_trains_alike_in_every_layout(start: Start):
    flags = [*RMT, "--rmt-template", "rpt", "--rmt-answer-tokens", "4", "--train-iters", "3"]
    flags.remove("--rmt-force-close")
    alone = start(1, flags)
    assert 0 < sum(line["well-formed rate"] for line in alone.metrics) < 3
    assert_same_curve(start(2, [*flags, *TP2]).metrics, alone.metrics)


def test_a_real_torchrun_that_compiles_gives_the_curve_too(
    inputs: TinyInputs, reference: Run, tmp_path: Path
):
    metrics = tmp_path / "metrics.jsonl"
    flags = [*inputs.flags(), *RMT, *TP2, "--rmt-metrics-file", metrics, "--exit-interval", "2"]
    # Outside the tests functions are compiled (``cpu.compiled``).
    env = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "TORCHDYNAMO_DISABLE": "0"}
    run_torchrun(2, [PRETRAIN, *flags], env=env)
    assert_same_curve(read_metrics(metrics), reference.metrics[:2])


@pytest.fixture(scope="session")
def stopped(start: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A run that saved and ended after step 3."""
    directory = tmp_path_factory.mktemp("stopped")
    flags = ["--save", str(directory), "--save-interval", "3", "--exit-interval", "3"]
    return directory, start(1, [*RMT, *flags])


@pytest.mark.faults
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    start: Start, reference: Run, saved: Path, stopped: tuple[Path, Run], tmp_path: Path
):
    directory, first_half = stopped
    assert first_half.metrics == reference.metrics[:3]
    flags = ["--save", str(tmp_path / "second"), "--save-interval", str(STEPS)]
    second_half = start(1, [*RMT, *flags], resume_from=directory)
    assert second_half.metrics == reference.metrics[3:]

    ours = checkpoint_tensors(tmp_path / "second", STEPS)
    expected = checkpoint_tensors(saved, STEPS)
    assert ours.keys() == expected.keys()
    assert any(name.startswith("optimizer.state.exp_avg_sq") for name in ours)
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name
    before = checkpoint_tensors(directory, 3)
    weight = "decoder.layers.mlp.linear_fc1.weight"
    assert not torch.equal(before[weight], expected[weight])


def test_a_run_resumed_in_another_layout_goes_on_alike(
    start: Start, reference: Run, stopped: tuple[Path, Run]
):
    second_half = start(2, [*RMT, *TP2], resume_from=stopped[0])
    assert_same_curve(second_half.metrics, reference.metrics[3:])


def without_the_patch(path: Path) -> Path:
    """examples/pretrain_rmt.py without anything of this package."""
    program = PRETRAIN.read_text(encoding="utf-8")
    replacements = {
        "import megatron_rmt\n\nmegatron_rmt.patch()\n": (
            # The wheel's helpers are compiled already, and it holds no Makefile.
            "from megatron.core.datasets import utils\n\nutils.compile_helpers = lambda: None\n"
        ),
        "from megatron_rmt.job import console\n\nconsole.leave_out_library_warnings()\n": "",
        "    console.a_line_for_each_step()\n": "",
    }
    for ours, instead in replacements.items():
        assert program.count(ours) == 1
        program = program.replace(ours, instead)
    modules = "{'megatron_rmt.job.patches', 'megatron_rmt.job.console'}"
    check = f"\nimport sys\nassert not {modules} & sys.modules.keys()\n"
    path.write_text(program + check, encoding="utf-8")
    return path


def test_without_rl_every_printed_digit_is_that_of_plain_pretraining(start: Start, tmp_path: Path):
    three_steps = ["--train-iters", "3"]
    program = without_the_patch(tmp_path / "pretrain.py")
    plain = start(1, three_steps, program=program)
    patched = start(1, three_steps)
    no_rl = start(1, [*RMT, "--rmt-no-rl", *three_steps])
    for name in ("lm loss", "grad norm", "learning rate"):
        digits = plain.printed(name)
        assert len(set(digits)) == 3, name
        assert patched.printed(name) == digits
        assert no_rl.printed(name) == digits
    assert "rmt" not in plain.log


def test_without_budget_decay_and_length_reward(start: Start, reference: Run):
    """Ablations of the paper: a constant budget; match as the only reward."""
    flags = ["--rmt-no-budget-decay", "--rmt-no-length-reward", "--exit-interval", "3"]
    lines = start(1, [*RMT, *flags]).metrics
    assert [line["budget"] for line in lines] == [6, 6, 6]
    assert [line["reward"] for line in lines] == [line["match rate"] for line in lines]
    first = reference.metrics[0]
    assert lines[0]["rollout checksum"] == first["rollout checksum"]
    assert first["reward"] == pytest.approx(
        0.8 * first["match rate"] + 0.2 * first["length reward"]
    )


def test_without_curriculum_all_tiers_are_drawn_from(start: Start):
    hard_only = ["--rmt-start-probabilities", "0", "0", "1", "--exit-interval", "2"]
    curriculum = start(1, [*RMT, *hard_only]).metrics
    assert [line["chosen hard"] for line in curriculum] == [1, 1]
    uniform = start(1, [*RMT, *hard_only, "--rmt-no-curriculum"]).metrics
    assert sum(line["chosen easy"] + line["chosen medium"] for line in uniform) > 0


SELECTING = [
    *(*RMT, "--exit-interval", "3", "--rmt-entropy-ceiling", "3.3"),
    *("--rmt-threshold-quantiles", "0.2", "0.5", "0.6"),
    *("--rmt-select", "gain-variance", "--rmt-reserve-positions", "4"),
]


@pytest.fixture(scope="session")
def selecting(start: Start) -> list[Line]:
    return start(1, SELECTING).metrics


def test_a_selecting_run_follows_the_entropies_and_replaces_what_teaches_nothing(
    selecting: list[Line], reference: Run
):
    for line in selecting:
        ends = [line[f"threshold {tier}"] for tier in ("easy", "medium", "hard")]
        # Entropies are counted in bins of 0.01 nats, of which percentiles name the middle.
        assert line["entropy p10"] < ends[0] < ends[1] < ends[2] < line["entropy p90"]
        assert ends[1] == pytest.approx(line["entropy p50"] - 0.005)
        assert 0 < line["above entropy ceiling"] < 0.4
        assert ends[0] < line["entropy of chosen"] < 3.3
        # Where nothing matches no group differs, and none can take another's place.
        assert (line["kept without variance"] < 1) == (line["match rate"] > 0)
        assert line["match rate"] > 0 or line["replaced"] == 0
        # The reserve is rolled out and not trained.
        assert line["stem tokens"] == reference.metrics[line["iteration"] - 1]["stem tokens"]
    assert any(0 < line["replaced"] < 1 for line in selecting)
    assert len({line["threshold hard"] for line in selecting}) > 1


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(2, [*SHARDED_OPTIMIZER, *PACKED], id="DP2, packed"),
        pytest.param(2, TP2, id="TP2", marks=pytest.mark.slow),
        pytest.param(2, PP2, id="PP2", marks=pytest.mark.slow),
        pytest.param(2, CP2, id="CP2", marks=pytest.mark.slow),
    ],
)
def test_a_selecting_run_trains_alike_in_every_layout(
    start: Start, selecting: list[Line], ranks: int, flags: list[str]
):
    lines = start(ranks, [*SELECTING, *flags]).metrics
    assert_same_curve(lines, selecting)
    for line, expected in zip(lines, selecting, strict=True):
        for name in SELECTED:
            assert line[name] == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.slow
def test_a_selecting_run_resumes_bitwise(start: Start, selecting: list[Line], tmp_path: Path):
    saving = ["--save", str(tmp_path), "--save-interval", "1"]
    start(1, [*SELECTING, *saving, "--exit-interval", "1"])
    resumed = start(1, [*SELECTING, "--exit-interval", "3"], resume_from=tmp_path)
    assert resumed.metrics == selecting[1:]


TIERED = [*RMT, "--exit-interval", "3", "--rmt-tier-budgets", "0.5", "1", "2"]


@pytest.fixture(scope="session")
def tiered(start: Start) -> list[Line]:
    return start(1, TIERED).metrics


def test_harder_positions_are_asked_for_longer_thoughts(tiered: list[Line], reference: Run):
    budgets = [(3, 6, 12), (2, 4, 8), (1, 3, 6)]
    for line, plain, asked in zip(tiered, reference.metrics, budgets, strict=False):
        shares = [line[f"chosen {tier}"] for tier in ("easy", "medium", "hard")]
        assert all(share < 1 for share in shares)
        mean = sum(share * own for share, own in zip(shares, asked, strict=True))
        assert line["budget"] == pytest.approx(mean, rel=1e-6)
        # What the rollouts drew under each stem is what the update sees under it.
        assert line["largest logprob difference"] < 1e-4
        assert line["trunk tokens"] == plain["trunk tokens"]
    # The weights, so the positions, are still those of the run without.
    assert [tiered[0][f"chosen {tier}"] for tier in ("easy", "medium", "hard")] == [
        reference.metrics[0][f"chosen {tier}"] for tier in ("easy", "medium", "hard")
    ]


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(2, [*SHARDED_OPTIMIZER, *PACKED], id="DP2, packed"),
        pytest.param(4, [*TP2, *PP2], id="TP2 x PP2", marks=pytest.mark.slow),
        pytest.param(2, TP2, id="TP2", marks=pytest.mark.slow),
        pytest.param(2, PP2, id="PP2", marks=pytest.mark.slow),
    ],
)
def test_budgets_of_tiers_train_alike_in_every_layout(
    start: Start, tiered: list[Line], ranks: int, flags: list[str]
):
    assert_same_curve(start(ranks, [*TIERED, *flags]).metrics, tiered)


@pytest.mark.slow
def test_a_run_with_budgets_of_tiers_resumes_bitwise(
    start: Start, tiered: list[Line], tmp_path: Path
):
    saving = ["--save", str(tmp_path), "--save-interval", "1"]
    start(1, [*TIERED, *saving, "--exit-interval", "1"])
    assert start(1, TIERED, resume_from=tmp_path).metrics == tiered[1:]


def test_without_ntp_only_the_policy_loss_trains(start: Start, reference: Run):
    lines = start(1, [*RMT, "--rmt-no-ntp", "--exit-interval", "2"]).metrics
    first, first_hybrid = lines[0], reference.metrics[0]
    assert first["rollout checksum"] == first_hybrid["rollout checksum"]
    assert first["ntp loss"] == first_hybrid["ntp loss"], "still reported"
    assert 0 < first["grad norm"] != pytest.approx(first_hybrid["grad norm"], rel=1e-3)


MIXTURE = ["--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "48"]
MIXTURE += ["--moe-router-load-balancing-type", "none", "--moe-token-dispatcher-type", "alltoall"]


BALANCED = ["--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "0.1"]
BALANCED += ["--moe-z-loss-coeff", "0.01", "--calculate-per-token-loss"]
BIASED = ["--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"]
BIASED += ["--moe-router-bias-update-rate", "0.05"]


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


def test_a_warm_up_with_the_texts_own_thoughts_trains_alike_in_every_layout(
    start: Start, reference: Run
):
    flags = [
        *RMT,
        "--rmt-warmup-iters",
        "2",
        "--rmt-warmup-thought",
        "text",
        "--exit-interval",
        "3",
    ]
    lines = start(1, flags).metrics
    first = reference.metrics[0]
    # As many responses as in other steps, each at a position of its own and asking for 6 tokens.
    assert lines[0]["stem tokens"] == first["stem tokens"] * 4
    assert lines[0]["rl loss"] == lines[1]["rl loss"] == 0
    assert "match rate" in lines[2]
    assert [line["warm-up loss"] > 0 for line in lines] == [True, True, False]
    for flags_of_layout, ranks in ((TP2 + PP2, 4), (PACKED, 2)):
        assert_same_curve(start(ranks, [*flags, *flags_of_layout]).metrics, lines)


@pytest.mark.parametrize("options", [[], ["--rmt-no-advantage-std"]])
def test_the_information_gain_trains_alike_in_every_layout(start: Start, options: list[str]):
    flags = [*RMT, "--rmt-reward", "information-gain", *options, "--exit-interval", "2"]
    alone = start(1, flags).metrics
    for line in alone:
        # No answer is drawn, and nothing is said of any.
        assert line["match rate"] is None
        assert line["well-formed rate"] == 1.0
        assert line["information gain"] != 0
        assert line["zero-variance groups"] < 1
    layouts = [(4, TP2 + PP2), (2, [*SHARDED_OPTIMIZER, *PACKED])]
    for ranks, layout in layouts[: 1 if options else None]:
        for line, expected in zip(start(ranks, [*flags, *layout]).metrics, alone, strict=True):
            assert line["rollout checksum"] == expected["rollout checksum"]
            for name in ("information gain", "reward", "grad norm", "ntp loss"):
                assert line[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


def test_segments_of_several_tokens_train_alike_in_every_layout(start: Start):
    flags = [*RMT, "--rmt-target-tokens", "3", "--rmt-answer-tokens", "4", "--rmt-warmup-iters"]
    flags += ["1", "--rmt-warmup-thought", "text", "--exit-interval", "3"]
    lines = start(1, flags).metrics
    # Shares of three tokens, some of them neither nothing nor all.
    assert all(0 < line["match rate"] < 1 for line in lines[1:])
    assert any(abs(3 * 48 * line["match rate"] % 3) > 0.5 for line in lines[1:])
    assert_same_curve(start(4, [*flags, *TP2, *PP2]).metrics, lines)


BASELINE = [*RMT, "--rmt-reward", "information-gain", "--rmt-baseline-decay", "0.5"]


def test_a_run_with_a_moving_average_resumes_bitwise_in_its_layout(start: Start, tmp_path: Path):
    """Also the first step, whose average is the policy, against a run without one."""
    plain = start(1, [*BASELINE[:-2], "--exit-interval", "1"]).metrics
    saving = ["--save", str(tmp_path / "first"), "--save-interval", "2", "--exit-interval", "4"]
    whole = start(1, [*BASELINE, *saving])
    gains = [lines[0]["information gain"] for lines in (whole.metrics, plain)]
    assert gains[0] == pytest.approx(gains[1], rel=1e-6)
    (tmp_path / "first/latest_checkpointed_iteration.txt").write_text("2")
    resuming = ["--exit-interval", "4", "--save", str(tmp_path / "second"), "--save-interval", "4"]
    resumed = start(1, [*BASELINE, *resuming], resume_from=tmp_path / "first")
    assert resumed.metrics == whole.metrics[2:]
    ours, expected = (checkpoint_tensors(tmp_path / run, 4) for run in ("second", "first"))
    averages = [name for name in expected if name.startswith("rmt_baseline.")]
    assert (
        len(averages) == len([name for name in expected if name.startswith("decoder.layers")]) + 2
    )
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    # Another layout goes on from the same average.
    other = start(2, [*BASELINE, *TP2, *resuming[:2]], resume_from=tmp_path / "first")
    for line, reference_line in zip(other.metrics, whole.metrics[2:], strict=True):
        assert line["rollout checksum"] == reference_line["rollout checksum"]
        for name in ("information gain", "reward", "grad norm"):
            assert line[name] == pytest.approx(reference_line[name], rel=1e-3, abs=1e-5), name


@pytest.fixture(scope="session")
def measuring(inputs: TinyInputs) -> list[str]:
    """Flags with which a run measures held-out documents before it and after every third step."""
    data = inputs.data.parents[1] / "corpus/train.jsonl"
    return ["--rmt-eval-interval", "3", "--rmt-eval-data", str(data), "--rmt-eval-documents", "5"]


@pytest.fixture(scope="session")
def measured(start: Start, measuring: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    save = tmp_path_factory.mktemp("measured")
    return start(1, [*RMT, *measuring, "--tensorboard-dir", str(save)])


def test_measuring_held_out_documents_changes_no_digit_of_a_run(measured: Run, reference: Run):
    lines = [
        {name: value for name, value in line.items() if not name.startswith("held-out")}
        for line in measured.metrics
    ]
    assert lines == [{"iteration": 0}, *reference.metrics]
    probed = [line["iteration"] for line in measured.metrics if "held-out thought" in line]
    assert probed == [0, 3, 6]
    assert all(measured.metrics[at]["held-out positions"] == 20 for at in probed)
    assert all(0 < measured.metrics[at]["held-out next token"] < 1 for at in probed)


def test_a_resumed_run_is_measured_where_the_uninterrupted_one_is_and_alike(
    start: Start, measuring: list[str], measured: Run, stopped: tuple[Path, Run]
):
    """It was stopped after step 3, whose measurement is not taken again."""
    resumed = start(1, [*RMT, *measuring], resume_from=stopped[0])
    assert [line["iteration"] for line in resumed.metrics] == [4, 5, 6]
    assert "held-out gain" in resumed.metrics[-1]
    assert resumed.metrics == measured.metrics[4:]


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        pytest.param(TP2, 2),
        pytest.param(PP2, 2, marks=pytest.mark.slow),
        pytest.param(PP2_VP2, 2, marks=pytest.mark.slow),
        pytest.param([*SHARDED_OPTIMIZER, *OVERLAP], 2, marks=pytest.mark.slow),
        pytest.param(CP2, 2, marks=pytest.mark.slow),
    ],
    ids=["tensor", "pipeline", "virtual", "data", "context"],
)
def test_held_out_documents_are_measured_alike_in_every_layout(
    start: Start, measuring: list[str], measured: Run, flags: list[str], ranks: int
):
    found = start(ranks, [*RMT, *measuring, *flags]).metrics
    assert_same_curve(found[1:], measured.metrics[1:])
    for line, expected in zip(found, measured.metrics, strict=True):
        for name in (name for name in expected if name.startswith("held-out")):
            assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def _by_samples(flags: Sequence[str], samples: int) -> list[str]:
    """``flags`` of a run of so many samples instead of so many steps."""
    at = flags.index("--train-iters")
    return [*flags[:at], "--train-samples", str(samples), *flags[at + 2 :]]


def test_a_run_counted_in_samples_is_the_one_counted_in_steps(
    inputs: TinyInputs, reference: Run, tmp_path: Path
):
    flags = _by_samples(inputs.flags(), STEPS * 4)
    lines = run(tmp_path / "logs", 1, [*flags, *RMT, "--exit-interval", "2"]).metrics
    assert lines == reference.metrics[:2]


GROWING = ["--train-samples", "16", "--step-batch-size-schedule", "0:2 256:4"]


def _growing(inputs: TinyInputs, resume_from: Path | None = None) -> list[str]:
    """Flags of a run of 2 + 2 + 4 + 4 + 4 samples."""
    flags = inputs.flags(resume_from)
    for name in ("--train-iters", "--global-batch-size"):
        at = flags.index(name)
        del flags[at : at + 2]
    return [*flags, *GROWING]


@pytest.mark.slow
def test_a_growing_batch_trains_alike_in_every_layout_and_resumes_bitwise(
    inputs: TinyInputs, tmp_path: Path
):
    save = tmp_path / "saved"
    alone = run(
        tmp_path / "alone",
        1,
        [*_growing(inputs), *RMT, "--save", str(save), "--save-interval", "3"],
    )
    assert [line["trunk tokens"] for line in alone.metrics] == [128, 128, 256, 256, 256]
    # Schedules go by steps: 6 * 0.2 ** (t / 5).
    assert [line["budget"] for line in alone.metrics] == [6, 4, 3, 2, 1]
    for name, flags in {"data": [], "pipeline": PP2}.items():
        found = run(tmp_path / name, 2, [*_growing(inputs), *RMT, *flags]).metrics
        assert_same_curve(found, alone.metrics)
    (save / "latest_checkpointed_iteration.txt").write_text("3")
    resumed = run(tmp_path / "resumed", 1, [*_growing(inputs, save), *RMT]).metrics
    assert resumed == alone.metrics[3:]


@pytest.fixture(scope="session")
def blend(inputs: TinyInputs) -> list[str]:
    """Flags of a blend of two corpora, of which one trains on next tokens alone."""
    web = inputs.data.with_name("web")
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{inputs.data}{suffix}", f"{web}{suffix}")
    words = ["--data-path", "0.6", str(inputs.data), "0.4", str(web)]
    return [*words, "--rmt-skip-sources", "web"]


@pytest.fixture(scope="session")
def blended(start: Start, blend: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    save = tmp_path_factory.mktemp("blended")
    return start(1, [*RMT, *blend, "--save", str(save), "--save-interval", "3"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(2, TP2), (2, PP2), (2, PP2_VP2), (2, []), (1, ["--micro-batch-size", "2"]), (2, PACKED)],
    ids=["tensor", "pipeline", "virtual", "data", "micro-batches of 2", "packed"],
)
def test_a_blend_with_a_skipped_corpus_trains_alike_in_every_layout(
    start: Start, blend: list[str], blended: Run, ranks: int, flags: list[str]
):
    assert_same_curve(start(ranks, [*RMT, *blend, *flags]).metrics, blended.metrics)


@pytest.mark.slow
def test_samples_of_a_skipped_corpus_are_neither_asked_nor_rolled_out(
    start: Start, blend: list[str], blended: Run
):
    skipped = [line["skipped samples"] for line in blended.metrics]
    assert sum(skipped) * 4 == pytest.approx(0.4 * STEPS * 4, abs=1)
    every = start(1, [*RMT, *blend[:-2]]).metrics
    for line, share, whole in zip(blended.metrics, skipped, every, strict=True):
        assert line["stem tokens"] == pytest.approx((1 - share) * whole["stem tokens"])
        assert line["trunk tokens"] == whole["trunk tokens"]
    # Nothing is trained before the first step: its text is the same.
    assert blended.metrics[0]["entropy"] == every[0]["entropy"]
    # An instruction stands before the samples that are asked, and before no other.
    boxed = ["--rmt-template", "rpt", "--max-position-embeddings", "2048"]
    asked, told = (start(1, [*RMT, *own, *boxed]).metrics for own in (blend, blend[:-2]))
    head = told[0]["trunk tokens"] / 4 - 64
    assert head > 20
    assert [line["trunk tokens"] for line in asked] == pytest.approx(
        [4 * 64 + 4 * (1 - share) * head for share in skipped]
    )


@pytest.mark.slow
def test_a_job_that_does_not_tell_the_corpora_is_refused(
    start: Start, blend: list[str], tmp_path: Path
):
    """As a data set of the job's own."""
    script = tmp_path / "silent.py"
    script.write_text(
        "import runpy\n"
        "from megatron.core.datasets.blended_dataset import BlendedDataset\n"
        "read = BlendedDataset.__getitem__\n"
        "def silent(self, index):\n"
        "    sample = dict(read(self, index))\n"
        "    del sample['dataset_id']\n"
        "    return sample\n"
        "BlendedDataset.__getitem__ = silent\n"
        f"runpy.run_path({str(PRETRAIN)!r}, run_name='__main__')\n"
    )
    sentence = r"SystemExit: RMT, iteration 1: --rmt-skip-sources is given, but the batches of the"
    with pytest.raises(AssertionError, match=sentence):
        start(2, [*RMT, *blend], program=script)


EVALUATED = ["--eval-iters", "2", "--eval-interval", "3", "--split", "80,10,10"]
THOUGHTS = ["--rmt-eval-samples", "5"]


@pytest.fixture(scope="session")
def evaluated(start: Start) -> Run:
    return start(1, [*RMT, *EVALUATED, *THOUGHTS])


def _of_evaluations(found: Run) -> list[Line]:
    return [
        {name: value for name, value in line.items() if name.startswith(("validation", "test"))}
        for line in found.metrics
    ]


def _losses(found: Run) -> list[str]:
    return re.findall(r" (?:validation|test) loss at .*", found.log)


@pytest.mark.slow
def test_thoughts_on_samples_of_an_evaluation_change_no_digit_of_it_or_of_the_run(
    start: Start, evaluated: Run
):
    without = start(1, [*RMT, *EVALUATED])
    assert len(_losses(without)) == 4
    assert _losses(evaluated) == _losses(without)
    first_of_each = {line["iteration"]: line for line in reversed(evaluated.metrics)}
    trained = [first_of_each[step] for step in range(1, STEPS + 1)]
    assert trained == without.metrics
    # After the third step and the last, on the validation split; and on both at the end.
    measured = [own for own in _of_evaluations(evaluated) if own]
    assert [sorted({name.split()[0] for name in own}) for own in measured] == [
        *[["validation"]] * 3,
        ["test", "validation"],
    ]
    for own in measured:
        assert own["validation positions"] == 20
        for name in ("next token", "thought", "no thought"):
            assert 0 <= own[f"validation {name}"] <= 1
    assert any(0 < own["validation next token"] < 1 for own in measured)
    assert evaluated.log.count(" RMT at iteration ") == 4
    # An amended line holds all of its step's.
    last = [line for line in evaluated.metrics if line["iteration"] == STEPS][-1]
    assert trained[-1].items() <= last.items()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(2, TP2), (2, PP2_VP2), (2, [*SHARDED_OPTIMIZER, *OVERLAP])],
    ids=["tensor", "virtual", "data"],
)
def test_an_evaluation_is_measured_alike_in_every_layout(
    start: Start, evaluated: Run, ranks: int, flags: list[str]
):
    found = start(ranks, [*RMT, *EVALUATED, *THOUGHTS, *flags])
    for own, expected in zip(_of_evaluations(found), _of_evaluations(evaluated), strict=True):
        assert own == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_rollouts_in_waves_train_alike(start: Start, reference: Run):
    """The bound holds the trunk and two positions at the longest thoughts."""
    lines = start(1, [*RMT, "--rmt-rollout-kv-gib", "5e-4", "--exit-interval", "2"])
    printed = re.search(r"RMT: keys and values .* (\d+) wave\(s\) of (\d+) positions", lines.log)
    assert int(printed[1]) > 1, printed[0]
    assert_same_curve(lines.metrics, reference.metrics[:2])


@pytest.mark.faults
def test_a_difference_above_the_tolerance_ends_every_rank_before_the_step(
    start: Start, tmp_path: Path
):
    flags = ["--rmt-logprob-tolerance", "1e-12", "--save", str(tmp_path), "--save-interval", "1"]
    sentence = (
        r"SystemExit: RMT, iteration 1: log-probs .* more than --rmt-logprob-tolerance 1e-12;"
    )
    with pytest.raises(AssertionError, match=sentence):
        start(2, [*RMT, *flags])
    assert not (tmp_path / "latest_checkpointed_iteration.txt").exists()


@pytest.mark.parametrize(
    ("flags", "sentences"),
    [
        (
            ["--rmt-group-size", "1", "--attention-dropout", "0.1"],
            [
                "--rmt-group-size is 1; pass a number in [2, inf): an advantage needs 2 or more",
                "--attention-dropout is 0.1; RMT needs 0.0: generation and update must agree.",
            ],
        ),
        (
            ["--rmt-initial-budget", "600"],
            ["--max-position-embeddings is 1024 but", "lower --rmt-initial-budget"],
        ),
    ],
    ids=["group and dropout", "budget"],
)
def test_bad_settings_end_the_job_with_one_clear_sentence(
    inputs: TinyInputs, flags: list[str], sentences: list[str]
):
    # Unbuffered, so that what comes last in the output was also printed last.
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONUNBUFFERED": "1"}
    with pytest.raises(AssertionError) as failure:
        run_torchrun(2, [PRETRAIN, *inputs.flags(), *RMT, *TP2, *flags], environment, timeout=240)
    output = str(failure.value)
    assert "exit code 1" in output
    for sentence in sentences:
        assert sentence in output


def test_a_rotary_factor_reaches_the_model_or_the_run_ends(start: Start, tmp_path: Path):
    """It does in examples/pretrain_rmt.py, and not where Megatron alone reads the flags."""
    llama32 = [*RMT, "--use-rope-scaling", "--rope-scaling-factor", "32", "--train-iters", "1"]
    assert len(start(1, llama32).metrics) == 1
    program = PRETRAIN.read_text(encoding="utf-8")
    line = "    config.rope_scaling_factor = args.rope_scaling_factor\n"
    assert program.count(line) == 1
    (tmp_path / "pretrain.py").write_text(program.replace(line, ""), encoding="utf-8")
    sentence = "--rope-scaling-factor 32 did not reach the model"
    with pytest.raises(AssertionError, match=sentence) as failure:
        start(1, llama32, program=tmp_path / "pretrain.py")
    assert "ValueError" not in str(failure.value), "the sentence, without a traceback"


EXISTING_JOB = REPOSITORY / "examples/existing_job/pretrain.py"
PREFIX_MASK = "torch.ones(64, 64).triu(1).bool()[None, None] & (torch.arange(64) > 9)"
WRAPPED = """
class Outer(torch.nn.Module):
    def __init__(self, **named):
        super().__init__()
        self.inner, self.config = GPTModel(**named), named["config"]
        self.pg_collection = self.inner.pg_collection

    def set_input_tensor(self, tensor):
        self.inner.set_input_tensor(tensor)


def model_provider("""
# How a job of one's own differs from examples/existing_job, and what is said of it.
JOBS = {
    "no labels": (
        {"        labels=labels,\n": ""},
        "RMT, iteration 1: forward_step_func gives GPTModel.forward no labels; pass labels= on",
    ),
    "prefix mask": (
        {"attention_mask=None": f"attention_mask={PREFIX_MASK}"},
        "RMT, iteration 1: forward_step_func gives GPTModel.forward an attention_mask that is not",
    ),
    "model in a model": (
        {"def model_provider(": WRAPPED, "    return GPTModel(": "    return Outer("},
        "RMT: the model is a Outer; RMT trains a GPTModel or a HybridModel.",
    ),
}


@pytest.mark.parametrize("job", JOBS)
def test_a_job_that_trees_cannot_carry_ends_with_one_sentence(
    start: Start, tmp_path: Path, job: str
):
    changes, sentence = JOBS[job]
    program = EXISTING_JOB.read_text(encoding="utf-8")
    for old, new in changes.items():
        assert program.count(old) == 1
        program = program.replace(old, new)
    program = f"import megatron_rmt\n\nmegatron_rmt.patch()\n{program}"
    (tmp_path / "pretrain.py").write_text(program, encoding="utf-8")
    with pytest.raises(AssertionError) as failure:
        start(1, RMT, program=tmp_path / "pretrain.py")
    said = str(failure.value)
    assert f"SystemExit: {sentence}" in said
    assert "ValueError" not in said
    assert "BatchError" not in said
    # A model of another kind is not even loaded.
    assert ("loaded checkpoint from" in said) == (job != "model in a model")


# A process of its own, where the CPU does not stand in for CUDA.
GENERATE = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model, loading = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
prompt = tokenizer("Solve for x", return_tensors="pt")
ids = model.generate(**prompt, do_sample=False, min_new_tokens=8, max_new_tokens=8)
print(ids.shape[1] - prompt["input_ids"].shape[1])
"""


def test_the_trained_checkpoint_converts_back_and_generates(
    inputs: TinyInputs, reference: Run, saved: Path, tmp_path: Path
):
    convert_checkpoint.to_huggingface(saved, tmp_path / "back")
    trained = checkpoint_tensors(saved, STEPS)["embedding.word_embeddings.weight"]
    embedding = "model.embed_tokens.weight"
    back = convert_checkpoint.HuggingFaceWeights(tmp_path / "back").read(embedding)
    start = convert_checkpoint.HuggingFaceWeights(inputs.huggingface).read(embedding)
    assert torch.equal(back, trained[: len(back)])
    assert back.shape == start.shape
    assert not torch.equal(back, start)
    note = json.loads((tmp_path / "back/provenance.json").read_text())
    assert note["iteration"] == STEPS
    assert note["training"]["samples"] == 4 * STEPS
    assert note["rmt"]["rmt_group_size"] == 4
    command = [sys.executable, "-W", "ignore", "-c", GENERATE, str(tmp_path / "back")]
    assert subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.strip() == b"8"
