"""The planner against what runs count and take: tokens, operations, weights, memory."""

import dataclasses
import json
import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megatron_rmt.algorithm.schedules import schedule_of_step
from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.rollout.responses import written
from megatron_rmt.rollout.trunk import UserBatch, build_trunk
from megatron_rmt.update.packing import TreeSize, deal_out, tree_size
from megatron_rmt.update.tree import ChosenPosition, ReasonedSample
from tests.distributed import REPOSITORY
from tests.tiny_model import PADDED_VOCAB, VOCAB, build_model
from tests.tiny_run import RMT, TRAINING, Run, TinyInputs, run

sys.path.insert(0, str(REPOSITORY / "tools"))

import plan
from planning.memory import (
    RankMemory,
    cache_of_step,
    in_flight,
    micro_batch,
    model_parameters,
    parameters,
)
from planning.work import Lengths, Pass, SampleWork, Tokens, documents_in_samples, sample_work

RECIPES = REPOSITORY / "examples/recipes"
# A sample of 12 tokens with documents of 5, 4 and 3, prompt heads of 2 and stems of 3.
DOCUMENTS, HEAD, STEM = (5, 4, 3), [90, 91], 3


@pytest.mark.parametrize("separate", [True, False])
def test_tokens_and_pairs_are_the_mean_over_all_positions(separate: bool):
    text = torch.cat([torch.cat([torch.ones(n - 1), torch.zeros(1)]) for n in DOCUMENTS])
    text = text.long()[None]
    (sample,) = build_trunk(
        UserBatch(text, torch.arange(12)[None], torch.ones_like(text), torch.ones(1, 12)),
        [0],
        preamble=HEAD,
        end_of_document=0,
        separate_documents=separate,
    )
    rows = (sample.columns >= 0).nonzero()[:, 0].tolist()
    group = [written([7] * 6)] * 2
    positions = [ChosenPosition(row, 1, [7] * STEM, group) for row in rows]
    sizes = [tree_size(ReasonedSample(sample, [own])) for own in positions]
    args = Namespace(seq_length=12, rmt_positions_per_sample=1, rmt_group_size=2, positions_drawn=1)
    documents = documents_in_samples(DOCUMENTS if separate else [12], 12)
    work = sample_work(args, documents, Lengths(len(HEAD), STEM, 6))

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    assert work.update.tokens == work.tokens.tree == mean([size.tokens for size in sizes])
    assert work.update.pairs == pytest.approx(mean([size.pairs for size in sizes]))
    assert work.update.predictions == mean([size.predictions for size in sizes])
    assert work.tokens.trunk == len(sample)
    seen = [row + 1 - sample.document_of(row)[0] for row in rows]
    alone = [n + STEM + 5 for n in seen]
    document = sum((limit - first) * (limit - first + 1) / 2 for first, limit in sample.documents)
    assert work.naive_update.tokens == pytest.approx(mean(alone) * 2 + len(sample))
    pairs = mean([n * (n + 1) / 2 for n in alone]) * 2 + document
    assert work.naive_update.pairs == pytest.approx(pairs)
    assert work.naive_rollout.pairs == pytest.approx(pairs - document)


@pytest.mark.parametrize("use_all", [False, True])
@pytest.mark.parametrize("max_tokens", [50, 100, 250, 450, 10_000])
def test_micro_batches_are_packed_as_in_a_run(max_tokens: int, use_all: bool):
    own, tokens = 12, 100
    dealt = deal_out(
        [TreeSize(tokens, 0, 0)] * own,
        [1] * own,
        ranks=1,
        micro_batches=6,
        max_tokens=max_tokens,
        use_all=use_all,
    )
    args = Namespace(
        rmt_max_tokens=max_tokens,
        global_batch_size=own,
        data_parallel_size=1,
        micro_batch_size=2,
        micro_batches=6,
        pipeline_model_parallel_size=2 if use_all else 1,
    )
    like = Pass(tokens, 0, 7)
    naive = Tokens(80, 10, 10, 0, 0)
    work = SampleWork(naive, like, like, like, like, like, like, span=0)
    planned = micro_batch(args, work)
    assert planned.rows == tokens * max(len(part) for part in dealt[0])
    assert planned.trunk_rows == 2 * 80


def test_documents_are_cut_where_samples_end():
    cut = documents_in_samples([7], 12)
    # 7 5 | 2 7 3 | 4 7 1 | 6 6 | 1 7 4 | 3 7 2 | 5 7 and again.
    assert cut.pieces == pytest.approx(18 / 7, rel=0.02)
    assert documents_in_samples([12], 12).pieces == 1
    assert documents_in_samples([12], 12).seen == 6.5


SHAPES = {
    "llama": {},
    "tied": {"tied": True},
    "biases and LayerNorm": {
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "gated_linear_unit": False,
        "activation_func": torch.nn.functional.gelu,
    },
    "Qwen2": {"add_qkv_bias": True},
    "Qwen3": {"qk_layernorm": True, "kv_channels": 16},
    "experts": {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24},
    "positions": {"position_embedding": "learned_absolute"},
}


@pytest.mark.usefixtures("single_process_megatron")
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_weights_are_those_of_the_model(changes: dict[str, object]):
    model = build_model(torch.float32, **changes)
    config = model.config
    args = Namespace(
        **vars(config)
        | {
            "query_width": config.num_attention_heads * config.kv_channels,
            "key_width": config.num_query_groups * config.kv_channels,
            "layers_per_stage": config.num_layers,
            "padded_vocab_size": PADDED_VOCAB,
            "true_vocab_size": VOCAB,
            "expert_tensor_parallel_size": 1,
            "position_embedding_type": model.position_embedding_type,
            "max_position_embeddings": model.max_sequence_length,
            "untie_embeddings_and_output_weights": not model.share_embeddings_and_output_weights,
        }
    )
    planned = parameters(args, stage=0)
    assert planned.total == sum(p.numel() for p in model.parameters())
    of_experts = [p for name, p in model.named_parameters() if ".experts." in name]
    assert planned.experts == sum(p.numel() for p in of_experts)
    tables = 1 if model.share_embeddings_and_output_weights else 2
    padding = tables * (PADDED_VOCAB - VOCAB) * config.hidden_size
    assert model_parameters(args) == planned.total - padding


# Recipe, ranks, and the weights that the model's authors state.
PUBLISHED = {
    "qwen3-1.7b": (1, 1_720_574_976),
    "qwen3-14b": (16, 14_768_307_200),
    "r1-distill-qwen-14b": (16, 14_770_033_664),
    "qwen3-30b-a3b": (16, 30_532_122_624),
}


def request(words: Sequence[object]) -> plan.Request:
    return plan.read_request([str(word) for word in words])[0]


def stated(recipe: str) -> list[float]:
    """What the comments of a recipe say of it: GiB at most, seconds first, on average, last."""
    comments = (RECIPES / f"{recipe}.args").read_text(encoding="utf-8").replace("\n# ", " ")
    return [float(n) for n in re.search(ESTIMATE, comments).groups()]


ESTIMATE = (
    r"\(estimates, unverified on GPU\): at most (\d+) GiB a rank; (\d+) s for the first step, "
    r"(\d+) s on average, (\d+) s for the last\."
)


@pytest.fixture(autouse=True)
def no_checkpoint(monkeypatch: pytest.MonkeyPatch):
    for name in ("CHECKPOINT", "DATA"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipe_has_the_published_size_fits_its_devices_and_says_how(recipe: str):
    ranks, weights = PUBLISHED[recipe]
    planned = plan.make_plan(
        request(["--recipe", RECIPES / f"{recipe}.args", "--world-size", ranks])
    )
    assert model_parameters(planned.args) == weights
    assert planned.memory.peak <= planned.memory_at_bound.peak < 79 * 2**30
    assert planned.first.schedule.budget == 800
    assert planned.last.schedule.budget == 160
    first, last = (plan.numbers(step)["seconds, total"] for step in (planned.first, planned.last))
    mean = planned.mean["seconds, total"]
    assert 0 < last < mean < first
    assert stated(recipe) == [
        round(planned.memory_at_bound.peak / 2**30),
        round(first),
        round(mean),
        round(last),
    ]


def measure(
    flags: Sequence[str], directory: Path, counts_flops: bool
) -> tuple[Run, list[dict[str, int]]]:
    """A real run, and what each of its steps took."""
    target, program = directory / "measured.jsonl", directory / "program.py"
    program.write_text(
        "from pathlib import Path\n\nfrom tests.measured_run import main\n\n"
        f"main(Path({str(target)!r}), {counts_flops})\n"
    )
    finished = run(directory / "logs", 1, flags, program)
    return finished, [json.loads(line) for line in target.read_text().splitlines()]


def planned_step(flags: Sequence[str], line: dict[str, float]) -> plan.Step:
    """The step that a run did, given how long its thoughts were on average."""
    asked = request(["--hardware", "cpu", "--thought-length", line["thought length"], *flags])
    args = asked.settings()
    documents, _ = plan.corpus_documents(args, None)
    iteration = int(line["iteration"]) - 1
    schedule = schedule_of_step(Settings.of(args), iteration, args.train_iters)
    return plan.step_at(asked, args, documents, schedule)


def test_a_reserve_is_rolled_out_and_not_trained():
    recipe = ["--recipe", RECIPES / "qwen3-14b.args", "--world-size", 16]
    plain, with_reserve = (
        plan.make_plan(request([*recipe, *more])).last
        for more in ([], ["--rmt-select", "gain-variance"])
    )
    assert with_reserve.work.update == plain.work.update
    assert with_reserve.work.tokens.tree == plain.work.tokens.tree
    assert with_reserve.work.decode.tokens == 2 * plain.work.decode.tokens
    # Twice the positions reach a little further into the document.
    assert 2 < with_reserve.flops.rollout / plain.flops.rollout < 2.5
    of_step = [
        cache_of_step(own.args, own.work, own.tokens.allocated) for own in (plain, with_reserve)
    ]
    assert of_step[1].positions == 2 * of_step[0].positions


def test_a_warm_up_from_the_text_spreads_its_responses_and_rolls_nothing_out():
    recipe = ["--recipe", RECIPES / "qwen3-14b.args", "--world-size", 16]
    warm_up = ["--rmt-warmup-iters", 5, "--rmt-warmup-thought", "text"]
    drawn, written = (
        plan.make_plan(request([*recipe, *flags])) for flags in (warm_up[:2], warm_up)
    )
    first = plan.numbers(written.first)
    assert first["stem tokens"] == 8 * plan.numbers(drawn.first)["stem tokens"]
    assert first["branch tokens"] == plan.numbers(drawn.first)["branch tokens"]
    for name in ("tokens of the rollouts", "FLOPs, rollout", "seconds, rollout", "decode passes"):
        assert first[name] == 0 < plan.numbers(drawn.first)[name]
    assert plan.numbers(written.last) == plan.numbers(drawn.last)
    assert written.memory_at_bound.peak >= drawn.memory_at_bound.peak


@pytest.mark.multiprocess
def test_tokens_and_operations_are_those_of_a_run(inputs: TinyInputs, tmp_path: Path):
    flags = [*inputs.flags(), *RMT]
    finished, measured = measure(flags, tmp_path, counts_flops=True)
    steps = [planned_step(flags, line) for line in finished.metrics]
    for line, step in zip(finished.metrics, steps, strict=True):
        assert step.schedule.budget == line["budget"]
        tokens = plan.numbers(step)
        for name in ("trunk tokens", "stem tokens", "branch tokens"):
            assert tokens[name] == pytest.approx(line[name], rel=0.02), (name, line["iteration"])
    planned = {"trunk": 0.0, "rollout": 0.0, "update": 0.0}
    for step in steps:
        planned["trunk"] += step.flops.trunk
        planned["rollout"] += step.flops.rollout
        planned["update"] += step.flops.update
    counted = {name: sum(line[f"{name} flops"] for line in measured) for name in planned}
    assert planned["trunk"] == pytest.approx(counted["trunk"], rel=1e-6)
    assert planned["update"] == pytest.approx(counted["update"], rel=0.02)
    assert sum(planned.values()) == pytest.approx(sum(counted.values()), rel=0.02)
    # Few rollouts that have ended stay in the batch.
    assert planned["rollout"] == pytest.approx(counted["rollout"], rel=0.01)

    # What the planner assumes by itself is not what these thoughts were: the check can fail.
    first = steps[0]
    assumed = dict(finished.metrics[0]) | {"thought length": first.schedule.budget}
    wrong = plan.numbers(planned_step(flags, assumed))["branch tokens"]
    assert wrong != pytest.approx(finished.metrics[0]["branch tokens"], rel=0.1)

    printed = re.search(r"number of parameters on .*: (\d+)", finished.log)
    assert parameters(first.args, stage=0).total == int(printed[1])
    keys_and_values = cache_of_step(first.args, first.work, first.tokens.allocated)
    assert f"at most: {keys_and_values.describe()};" in finished.log


# SmolLM2's width with fewer layers and two thirds of its vocabulary.
LAYERS, VOCABULARY = 4, 32768
SMOLLM2 = (
    f"--num-layers {LAYERS} --hidden-size 576 --ffn-hidden-size 1536 --num-attention-heads 9 "
    "--group-query-attention --num-query-groups 3 --kv-channels 64 --max-position-embeddings 8192 "
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    f"--attention-dropout 0.0 --hidden-dropout 0.0 --vocab-size {VOCABULARY} --padded-vocab-size "
    f"{VOCABULARY} --bf16 --train-iters 2 --seq-length 512 --global-batch-size 1 "
    "--rmt-positions-per-sample 8 --rmt-initial-budget 24 --rmt-no-budget-decay"
).split()


def widen(tokenizer: Path, target: Path) -> None:
    """A copy of the tokenizer with unused tokens, up to the whole vocabulary."""
    shutil.copytree(tokenizer, target)
    path = target / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    used = 1 + max(*vocabulary.values(), *(token["id"] for token in content["added_tokens"]))
    vocabulary |= {f"unused{index}": index for index in range(used, VOCABULARY)}
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.multiprocess
def test_memory_is_that_of_a_run(inputs: TinyInputs, tmp_path: Path):
    """Resident memory above that before the model was built, in the second of two steps: in the
    first the optimizer has no state yet."""
    widen(inputs.huggingface, tmp_path / "tokenizer")
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer"]
    tokenizer += ["--tokenizer-model", str(tmp_path / "tokenizer")]
    flags = [*TRAINING, "--data-path", str(inputs.data), *RMT, *SMOLLM2, *tokenizer]
    finished, measured = measure(flags, tmp_path, counts_flops=False)
    length = finished.metrics[1]["thought length"]
    words = ["--hardware", "cpu", "--thought-length", length, *flags]
    memory = plan.make_plan(request(words)).memory
    assert memory.update_peak == pytest.approx(measured[1]["update bytes"], rel=0.15)
    assert memory.rollout_peak == pytest.approx(measured[1]["rollout bytes"], rel=0.15)
    # Activations made again would be another run: the check can fail.
    other = [*words, "--recompute-granularity", "full", "--recompute-method", "uniform"]
    again = plan.make_plan(request([*other, "--recompute-num-layers", "1"])).memory
    assert again.update_peak != pytest.approx(measured[1]["update bytes"], rel=0.15)


def test_seconds_follow_the_hardware():
    """Arithmetic at the stated efficiency, and no rollout sooner than its weights can be read."""
    words = ["--recipe", RECIPES / "qwen3-1.7b.args", "--efficiency", 0.5]
    planned = plan.make_plan(request(words))
    seconds, flops = planned.first.seconds, planned.first.flops
    assert seconds.update == pytest.approx((flops.update + flops.recompute) / (0.5 * 989e12))
    assert seconds.trunk == pytest.approx(flops.trunk / (0.5 * 989e12))
    weights = parameters(planned.args, stage=0).total * 2
    assert seconds.rollout > seconds.passes * weights / 3350e9
    # Of the 64 positions 17 fit at a time. No row is free for long, unlike in four waves.
    tokens = planned.first.tokens
    assert 64 / 17 * tokens.lengths.response < seconds.passes < 0.7 * 4 * (tokens.longest - 1)
    slower = plan.make_plan(request([*words, "--bandwidth-efficiency", 0.1])).first.seconds
    assert slower.rollout > 2 * seconds.rollout
    assert slower.update == seconds.update


def words_of(text: str) -> list[str]:
    return ["--recipe", str(RECIPES / "qwen3-14b.args"), *text.split()]


def test_where_memory_is_fast_rollouts_take_what_their_launches_take(monkeypatch):
    fast = dataclasses.replace(plan.HARDWARE["h100"], tflops=1e9, bandwidth=1e9)
    monkeypatch.setitem(plan.HARDWARE, "h100", fast)
    for flags, layers, launches, recorded in (
        ("", 40, 14, True),
        ("--rmt-no-decode-graph", 40, 14, False),
        ("--pipeline-model-parallel-size 2", 20, 14, True),
        ("--fp8-format e4m3 --fp8-recipe blockwise", 40, 18, True),
        ("--fp8-format e4m3 --fp8-recipe tensorwise", 40, 28, True),
    ):
        planned = plan.make_plan(request(words_of(f"--world-size 16 {flags}")))
        seconds = planned.first.seconds
        # Two all-reduces a layer over 4 ranks.
        each = (layers * launches + 71) * (1.5e-6 if recorded else 5e-6) + layers * 2 * 15e-6
        each += 0 if recorded else layers * 6 * 65e-6
        assert seconds.rollout / seconds.passes == pytest.approx(each, rel=1e-3), flags


@pytest.mark.parametrize(
    "flags",
    [
        "--num-virtual-stages-per-pipeline-rank 4",
        "--num-layers-per-virtual-pipeline-stage 5",
        "--pipeline-model-parallel-layout Et*5|(t*5|)*6t*5L",
    ],
)
def test_virtual_pipeline_stages_wait_less(flags: str):
    stages = "--world-size 16 --pipeline-model-parallel-size 2"
    plain, virtual = (plan.make_plan(request(words_of(f"{stages} {own}"))) for own in ("", flags))
    count = plain.args.micro_batches
    seconds, interleaved = plain.first.seconds, virtual.first.seconds
    shorter = (count + 1 / 4) / (count + 1)
    assert interleaved.update == pytest.approx(shorter * seconds.update)
    assert (interleaved.trunk, interleaved.rollout) == (seconds.trunk, seconds.rollout)
    # Chunks of micro-batches that a stage has gone through before the first of them goes back.
    assert [in_flight(plain.args, stage) for stage in (0, 1)] == [2, 1]
    assert [in_flight(virtual.args, stage) for stage in (0, 1)] == [9 / 4, 7 / 4]


def test_weights_that_are_not_kept_in_fp8_have_copies():
    def memory(flags: str) -> RankMemory:
        return plan.make_plan(request(words_of(f"--world-size 16 {flags}"))).memory

    wide = memory("")
    copied, kept = (
        memory(f"--fp8-format e4m3 --fp8-recipe blockwise {flags}")
        for flags in ("", "--fp8-param-gather")
    )
    # Of the layers: embedding and head stay in bf16.
    linear = wide.weights / 2 - 2 * 151936 / 4 * 5120
    assert copied.decoding - wide.decoding == pytest.approx(linear)
    assert copied.activations - wide.activations == pytest.approx(2 * linear)
    assert kept.decoding == wide.decoding
    assert kept.activations == wide.activations
    # A byte and its transpose take what bf16 does.
    assert kept.weights == pytest.approx(wide.weights)


def test_what_does_not_fit_comes_with_flags_that_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = words_of("--world-size 16 --memory-gib 30")
    monkeypatch.setattr(sys, "argv", ["plan.py", *words])
    plan.main()
    printed = capsys.readouterr().out
    assert "Does not fit into 30 GiB" in printed
    assert "estimate" in printed
    assert "unverified on GPU" in printed
    together = re.search(r"together (.*): ([\d.]+) GiB, fits", printed)
    applied = plan.make_plan(request([*words, *together[1].split()]))
    assert applied.memory_at_bound.peak / 2**30 == pytest.approx(float(together[2]), abs=0.1)
    assert applied.memory_at_bound.peak < 30 * 2**30


def test_json_holds_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = words_of(f"--world-size 16 --json {tmp_path}/plan.json")
    monkeypatch.setattr(sys, "argv", ["plan.py", *words])
    plan.main()
    written = json.loads((tmp_path / "plan.json").read_text())
    made = plan.make_plan(request(words))
    assert written["estimates"] is True
    assert written["first step"] == plan.numbers(made.first)
    assert written["mean of the run"] == made.mean
    peak = written["memory of a rank in GiB"]["every thought at its bound"]["peak"]
    assert peak == made.memory_at_bound.peak / 2**30
    assert f"{peak:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--world-size 6", "--world-size is 6, not a multiple of"),
        ("--world-size 16 --no-such-flag 1", "unknown: --no-such-flag 1"),
        ("--world-size 16 --seq-length many", "argument --seq-length: invalid int value: 'many'"),
        ("--world-size 16 --model nowhere", "--model is nowhere, but nowhere cannot be read"),
        ("--world-size 16 --efficiency 2", "--efficiency is 2.0; pass a share above 0"),
        ("--world-size 16 --seq-length 65536", "--max-position-embeddings is 40960 but"),
        ("--world-size 16 --rmt-rollout-kv-gib 0.5", "--rmt-rollout-kv-gib is 0.5, but"),
        ("--world-size 16 --rmt-template none", "template 'none' is neither a file nor one of"),
        ("--world-size 16 --rmt-group-size 1", "--rmt-group-size is 1; pass a number in [2, inf)"),
        ("--world-size 16 --rmt-max-tokens 100", "--rmt-max-tokens is 100, but 1 samples of"),
        ("--world-size 16 --global-batch-size 6", "--global-batch-size is 6, not a multiple of"),
        (
            "--world-size 16 --pipeline-model-parallel-size 2 "
            "--num-layers-per-virtual-pipeline-stage 6",
            "--num-layers-per-virtual-pipeline-stage is 6, and does not divide the 20 layers of",
        ),
        (
            "--world-size 16 --pipeline-model-parallel-size 4 --global-batch-size 2 "
            "--num-virtual-stages-per-pipeline-rank 2",
            "--global-batch-size is 2, which is 2 micro-batches for each data-parallel rank;",
        ),
        (
            "--world-size 16 --multi-latent-attention --rope-type rope --no-rope-fusion "
            "--transformer-impl local",
            "--multi-latent-attention is True; a plan does not count it.",
        ),
        (
            "--world-size 16 --mtp-num-layers 1",
            "--mtp-num-layers is 1; a plan does not count it.",
        ),
        (
            "--world-size 16 --context-parallel-size 2",
            "--context-parallel-size is 2; a plan is of 1",
        ),
    ],
)
def test_bad_input_ends_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, words: str, sentence: str
):
    monkeypatch.setattr(sys, "argv", ["plan.py", *words_of(words)])
    with pytest.raises(SystemExit) as ending:
        plan.main()
    assert str(ending.value).startswith("plan.py: ")
    assert sentence in str(ending.value)


def test_a_recipe_without_a_model_says_how_to_name_one():
    with pytest.raises(ValueError, match=r"CHECKPOINT is not set.* --model or --model-flags"):
        request(["--recipe", RECIPES / "smollm2-135m-cpu.args"])
