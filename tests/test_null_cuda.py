"""The training program on a CUDA device that counts and does not compute (``tests.null_cuda``)."""

import functools
import importlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.null_cuda import answers, device, recipes
from tests.null_cuda.count import is_replayed, largest_step, operations, peaks
from tests.null_cuda.recipes import ENGINE, FP8, LOCAL
from tests.tiny_tokenizer import build_tokenizer

pytestmark = pytest.mark.null_cuda

# Two layers with heads of 128, as the models of the recipes have.
MODEL = (
    "--num-layers 2 --hidden-size 512 --ffn-hidden-size 512 --num-attention-heads 4 "
    "--group-query-attention --num-query-groups 2 --kv-channels 128 --bf16 "
    "--max-position-embeddings 1024 --position-embedding-type rope --normalization RMSNorm "
    "--swiglu --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 "
    "--hidden-dropout 0"
)
TRAINING = (
    "--mock-data --split 100,0,0 --micro-batch-size 1 --global-batch-size 4 --seq-length 256 "
    "--train-iters 2 --lr 1e-6 --lr-decay-style constant --clip-grad 0.2 --eval-iters 0 "
    "--eval-interval 1000 --log-interval 1 --disable-gloo-process-groups "
    "--tokenizer-type HuggingFaceTokenizer --num-workers 0"
)
RMT = (
    "--rmt --rmt-template inline --rmt-initial-budget 6 --rmt-positions-per-sample 4 "
    "--rmt-group-size 4 --rmt-answer-tokens 1 --rmt-force-close --rmt-attention sdpa"
)

# Of a decode step without a graph, drawing and writing included.
TOKEN_OPERATIONS, LAYER_OPERATIONS = 71, 13
# Of the four linear layers: to quantize what they read, by blocks 1 launch each.
QUANTIZING_OPERATIONS = {"blockwise": 4, "tensorwise": 14}
# Graphs that two steps compile, whatever the sizes of their trees.
COMPILED = {"four layers, 16 samples": 16, "flex": 20}


@pytest.fixture(scope="session")
def null_device(pytestconfig: pytest.Config) -> Path:
    """The folder of the built device."""
    lacking = device.lacking()
    if lacking and os.environ.get("CI"):
        pytest.fail(lacking)
    if lacking:
        pytest.skip(lacking)
    return device.build(pytestconfig.cache.mkdir("null_cuda"))


Report = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """One rank of a run. options: of the rehearsal. flags: they replace those above. layers: whose,
    by flags, see ``recipes.LAYERS``."""

    options: str = ""
    flags: str = ""
    layers: str = LOCAL


EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 256 "
    "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01"
)
KEPT = (
    "--fp8-param-gather --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
)
TENSORWISE = f"{ENGINE} --fp8-format hybrid --fp8-recipe tensorwise"
LARGER = "--num-layers 4 --global-batch-size 16"
TWO_BY_TWO = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"
LAYOUTS = {
    "one rank": Layout(),
    "four layers, 16 samples": Layout(flags=LARGER),
    "experts": Layout("--world-size 2", EXPERTS),
    "information gain": Layout(flags="--rmt-reward information-gain"),
    "first of TP 2 x PP 2": Layout("--world-size 4 --rank 0", TWO_BY_TWO),
    "last of TP 2 x PP 2": Layout("--world-size 4 --rank 3", TWO_BY_TWO),
    "DP 2, overlapped": Layout(
        "--world-size 2",
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "packing": Layout("--world-size 2", "--rmt-max-tokens 1000"),
    "flex": Layout("--longest 14", "--rmt-attention flex --global-batch-size 20"),
    "engine": Layout(layers=ENGINE),
    "engine, four layers, 16 samples": Layout(flags=LARGER, layers=ENGINE),
    "engine, first of TP 2 x PP 2": Layout("--world-size 4 --rank 0", TWO_BY_TWO, ENGINE),
    "engine, last of TP 2 x PP 2": Layout("--world-size 4 --rank 3", TWO_BY_TWO, ENGINE),
    "engine, experts": Layout("--world-size 2", f"{EXPERTS} --moe-grouped-gemm", ENGINE),
    "blockwise": Layout(layers=FP8),
    "blockwise, four layers, 16 samples": Layout(flags=LARGER, layers=FP8),
    "blockwise, first of TP 2 x PP 2": Layout("--world-size 4 --rank 0", TWO_BY_TWO, FP8),
    "blockwise, last of TP 2 x PP 2": Layout("--world-size 4 --rank 3", TWO_BY_TWO, FP8),
    "blockwise, experts": Layout("--world-size 2", f"{EXPERTS} --moe-grouped-gemm", FP8),
    "blockwise, kept, DP 2": Layout("--world-size 2", KEPT, FP8),
    "tensorwise": Layout(layers=TENSORWISE),
    "tensorwise, four layers, 16 samples": Layout(flags=LARGER, layers=TENSORWISE),
}
QUICK = ("one rank", "four layers, 16 samples")


@pytest.fixture(scope="session")
def rehearse(
    null_device: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Report]:
    """The report of two steps as one rank of a layout, see ``rehearsal``; each runs once."""

    @functools.cache
    def run(name: str) -> Report:
        root, layout = tmp_path_factory.mktemp("null_cuda"), LAYOUTS[name]
        build_tokenizer().save_pretrained(root / "tokenizer")
        if layout.layers != LOCAL and (lacking := device.engine_lacking()):
            pytest.skip(lacking)
        flags = f"{MODEL} {layout.layers} {TRAINING} {RMT} {layout.flags}"
        flags += f" --tokenizer-model {root / 'tokenizer'}"
        options = f"--report {root / 'report.json'} {layout.options} --"
        device.run(null_device, "tests.null_cuda.rehearsal", [*options.split(), *flags.split()])
        return json.loads((root / "report.json").read_text(encoding="utf-8"))

    return run


@pytest.fixture(
    params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYOUTS]
)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


def test_settings_of_the_tests_process_do_not_reach_the_device(monkeypatch: pytest.MonkeyPatch):
    for name in ("TORCHDYNAMO_DISABLE", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    found = device.environment(Path("folder"))
    assert found["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert not {"TORCHDYNAMO_DISABLE", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES"} & {*found}


@pytest.mark.parametrize("place", answers.ANSWERS)
def test_a_place_that_reads_the_device_is_there(place: str):
    module, _, function = f"megatron_rmt.{place}".rpartition(".")
    try:
        owner = importlib.import_module(module)
    except ModuleNotFoundError:
        module, _, name = module.rpartition(".")
        owner = getattr(importlib.import_module(module), name)
    assert callable(getattr(owner, function))


def test_a_failure_says_why_and_not_what_every_run_says(tmp_path: Path):
    program = tmp_path / "fails.py"
    program.write_text(
        "import sys\n"
        "print('  adam_beta1 ........... 0.9', 'INFO:megatron: > padded vocab', sep='\\n')\n"
        "print('/a/b.py:1: UserWarning: slow', '  warnings.warn(', sep='\\n', file=sys.stderr)\n"
        "raise ValueError('no such device')\n",
        encoding="utf-8",
    )
    arguments = ["-c", f"exec(open({str(program)!r}).read())"]
    with pytest.raises(AssertionError, match="exit code 1") as caught:
        device.run(tmp_path, "timeit", ["-n1", "-r1", arguments[1]])
    assert str(caught.value).endswith("ValueError: no such device")
    for said in ("adam_beta1", "padded vocab", "warn"):
        assert said not in str(caught.value)


def test_two_steps_run_to_their_end_and_collectives_get_memory_of_the_device(
    layout: str, rehearse: Callable[[str], Report]
):
    report = rehearse(layout)
    phases = report["phases"]
    assert len(phases["step"]) == len(phases["update"]) == 2
    for step in phases["step"]:
        assert step["events"]["gemm"] > 0
        assert step["events"]["collective"] > 0
        # Of local layers the last norm is Transformer Engine's where that is installed.
        assert (step["known"]["engine"] > 4) == (LAYOUTS[layout].layers != LOCAL)
    assert "collective of host memory" not in {n for n, count in report["events"].items() if count}


def test_a_decode_step_waits_for_the_device_once_at_most_and_copies_nothing_pageable_back(
    layout: str, rehearse: Callable[[str], Report]
):
    if "experts" in layout:
        pytest.skip("experts ask for the number of tokens of each in every layer")
    phases = rehearse(layout)["phases"]
    for pass_, taken in zip(phases["decode"], phases["take tokens"], strict=False):
        assert pass_["events"].get("wait", 0) + taken["events"].get("wait", 0) <= 1
        assert "pageable copy to host" not in pass_["events"]
        assert "pageable copy to device" not in pass_["events"]


def _slow_but_of_local_layers(*names: str) -> list[Any]:
    slow = pytest.mark.slow
    return [pytest.param(n, marks=() if LAYOUTS[n].layers == LOCAL else slow) for n in names]


@pytest.mark.parametrize(
    "name",
    _slow_but_of_local_layers(
        "one rank", "engine", "blockwise", "blockwise, kept, DP 2", "tensorwise"
    ),
)
def test_a_decode_step_is_one_launch_and_one_wait(name: str, rehearse: Callable[[str], Report]):
    phases = rehearse(name)["phases"]
    # The first pass of each number of rows is recorded, or read at once as nothing came before it.
    passes = [own["events"] for own in phases["decode"]]
    assert 2 * sum(map(is_replayed, passes)) >= len(passes)
    assert {"pinned copy to host": 1, "wait": 1} in [own["events"] for own in phases["take tokens"]]


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["", "engine, ", "blockwise, "])
@pytest.mark.parametrize(("stage", "messages"), [("first", 1), ("last", 2)])
def test_a_decode_step_of_a_pipeline_stage_is_one_launch_and_its_messages(
    layers: str, stage: str, messages: int, rehearse: Callable[[str], Report]
):
    """Hidden states to or from the other stage; the last one also tells the tokens that it drew."""
    phases = rehearse(f"{layers}{stage} of TP 2 x PP 2")["phases"]
    passes = [own["events"] for own in phases["decode"]]
    # Each of the two batches records its second pass.
    assert 2 * passes.count({"graph launch": 1, "collective": messages}) >= len(passes)


@pytest.mark.parametrize(
    "name", _slow_but_of_local_layers("one rank", "engine", "blockwise", "tensorwise")
)
def test_operations_of_a_decode_step_grow_with_the_layers_only(
    name: str, rehearse: Callable[[str], Report]
):
    of_layer, found = LAYER_OPERATIONS + QUANTIZING_OPERATIONS.get(name, 0), {}
    larger = "four layers, 16 samples" if name == "one rank" else f"{name}, four layers, 16 samples"
    for own, layers, samples in ((name, 2, 4), (larger, 4, 16)):
        step = largest_step(rehearse(own)["phases"])
        assert step["known"]["samples"] == samples
        found[layers] = operations(step["events"])
        assert found[layers] <= TOKEN_OPERATIONS + of_layer * layers, found
    # Stated as they are, not as more.
    assert found[4] - found[2] == 2 * of_layer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "launches"),
    [
        ("blockwise", 1),
        ("blockwise, last of TP 2 x PP 2", 1),
        ("tensorwise", 4),
        ("blockwise, kept, DP 2", 0),
    ],
)
def test_rollouts_quantize_the_weights_of_an_update_once(
    name: str, launches: int, rehearse: Callable[[str], Report]
):
    """Each of the linear layers' weights, in the first pass; those that are kept in FP8, never."""
    phases = rehearse(name)["phases"]
    stages = 2 if "PP 2" in name else 1
    step, linear = phases["step"][1]["known"], 4 * 2 // stages
    assert step["quantized"] == (0 if launches else linear)
    # The first step's passes compile as well.
    of_step = phases["trunk"][len(phases["trunk"]) // 2 :]
    first, *others = (own["events"]["launch"] for own in of_step)
    assert {first - other for other in others} == {launches * linear}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("four layers, 16 samples", 10),
        pytest.param("flex", 20, marks=pytest.mark.slow),
        pytest.param("engine, four layers, 16 samples", 10, marks=pytest.mark.slow),
    ],
)
def test_trees_and_passes_of_other_sizes_compile_nothing_anew(
    name: str, sizes: int, rehearse: Callable[[str], Report]
):
    report = rehearse(name)
    assert len({own["known"]["rows"] for own in report["phases"]["loss"]}) >= sizes
    assert report["compiled"] <= COMPILED.get(name, COMPILED["four layers, 16 samples"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "stage", "layers"),
    [
        *((name, i, "local") for name in recipes.RANKS for i in range(recipes.STAGES.get(name, 1))),
        *(("qwen3-14b", 0, name) for name in recipes.LAYERS if name != "local"),
    ],
)
def test_the_planners_memory_of_a_recipe_is_what_the_allocator_gives_out(
    recipe: str, stage: int, layers: str, null_device: Path, tmp_path: Path
):
    if layers != "local" and (lacking := device.engine_lacking()):
        pytest.skip(lacking)
    recipes.write_tokenizer(tmp_path / "tokenizer")
    given = recipes.given_flags(tmp_path / "tokenizer", layers=recipes.LAYERS[layers])
    found = peaks(null_device, recipe, given, stage, at_bound=False, root=tmp_path)
    highest = max(found.values(), key=lambda peak: peak.allocated)
    planned = max(peak.planned for peak in found.values())
    assert planned == pytest.approx(highest.allocated, rel=0.05)


def test_a_token_takes_few_launches_beside_its_layers_and_the_attention_of_a_layer_three(
    null_device: Path,
):
    output = device.run(null_device, "tests.null_cuda.draws", [])
    found = json.loads(output[output.index("{") :].splitlines()[0])
    for ranks, collectives in (("1", 0), ("2", 3)):
        of = found["draws"][ranks]
        own = {kind: of[kind]["kernels"] for kind in of}
        assert own["all"]["launch"] == 4
        assert own["all"].get("collective", 0) == collectives
        assert not {"wait", "pageable copy to host", "memset"} & own["both"].keys()
        assert of["all"]["plain"]["launch"] > 50
        assert of["both"]["plain"]["launch"] > 1000
        assert own["greedy"]["launch"] <= 8
    assert found["draws"]["1"]["both"]["kernels"]["launch"] <= 16
    assert found["draws"]["2"]["both"]["kernels"]["launch"] <= 36
    for what, launches in {"numbers": 2, "write": 40, "attention": 3}.items():
        assert found[what]["launch"] <= launches
        assert found[what].keys() <= {"launch", "copy on device"}
