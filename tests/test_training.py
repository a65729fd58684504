"""The whole program: RMT inside Megatron's pretrain(), alike in every layout."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed import run_torchrun
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
)
from tests.training_curves import (
    CP2,
    OVERLAP,
    PACKED,
    PP2,
    PP2_VP2,
    SHARDED_OPTIMIZER,
    TP2,
    Start,
    assert_same_curve,
)

sys.path.insert(0, str(TOOLS))

import convert_checkpoint

pytestmark = pytest.mark.multiprocess

SEPARATE_DOCUMENTS = ["--reset-attention-mask", "--reset-position-ids", "--eod-mask-loss"]


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


def test_rollouts_in_waves_train_alike(start: Start, reference: Run):
    """The bound holds the trunk and two positions at the longest thoughts."""
    lines = start(1, [*RMT, "--rmt-rollout-kv-gib", "5e-4", "--exit-interval", "2"])
    printed = re.search(r"RMT: keys and values .* (\d+) wave\(s\) of (\d+) positions", lines.log)
    assert int(printed[1]) > 1, printed[0]
    assert_same_curve(lines.metrics, reference.metrics[:2])


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
