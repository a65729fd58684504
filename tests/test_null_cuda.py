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
from tests.tiny_tokenizer import build_tokenizer

pytestmark = pytest.mark.null_cuda

# Two layers with heads of 128, as the models of the recipes have.
MODEL = (
    "--num-layers 2 --hidden-size 512 --ffn-hidden-size 512 --num-attention-heads 4 "
    "--group-query-attention --num-query-groups 2 --kv-channels 128 --bf16 "
    "--max-position-embeddings 1024 --position-embedding-type rope --normalization RMSNorm "
    "--swiglu --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 "
    "--hidden-dropout 0 --transformer-impl local --no-gradient-accumulation-fusion "
    "--no-masked-softmax-fusion --no-persist-layer-norm --no-rope-fusion"
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
    """One rank of a run. options: of the rehearsal. flags: they replace those above."""

    options: str = ""
    flags: str = ""


EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 256 "
    "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01"
)
TWO_BY_TWO = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"
LAYOUTS = {
    "one rank": Layout(),
    "four layers, 16 samples": Layout(flags="--num-layers 4 --global-batch-size 16"),
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
        flags = f"{MODEL} {TRAINING} {RMT} --tokenizer-model {root / 'tokenizer'} {layout.flags}"
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
    assert "collective of host memory" not in {n for n, count in report["events"].items() if count}


def test_a_decode_step_waits_for_the_device_once_at_most_and_copies_nothing_pageable_back(
    layout: str, rehearse: Callable[[str], Report]
):
    if layout == "experts":
        pytest.skip("experts ask for the number of tokens of each in every layer")
    phases = rehearse(layout)["phases"]
    for pass_, taken in zip(phases["decode"], phases["take tokens"], strict=False):
        assert pass_["events"].get("wait", 0) + taken["events"].get("wait", 0) <= 1
        assert "pageable copy to host" not in pass_["events"]
        assert "pageable copy to device" not in pass_["events"]


def test_a_decode_step_is_one_launch_and_one_wait(rehearse: Callable[[str], Report]):
    phases = rehearse("one rank")["phases"]
    # The first pass of each number of rows is recorded, or read at once as nothing came before it.
    passes = [own["events"] for own in phases["decode"]]
    assert 2 * sum(map(is_replayed, passes)) >= len(passes)
    assert {"pinned copy to host": 1, "wait": 1} in [own["events"] for own in phases["take tokens"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "messages"), [("first of TP 2 x PP 2", 1), ("last of TP 2 x PP 2", 2)]
)
def test_a_decode_step_of_a_pipeline_stage_is_one_launch_and_its_messages(
    name: str, messages: int, rehearse: Callable[[str], Report]
):
    """Hidden states to or from the other stage; the last one also tells the tokens that it drew."""
    passes = [own["events"] for own in rehearse(name)["phases"]["decode"]]
    # Each of the two batches records its second pass.
    assert 2 * passes.count({"graph launch": 1, "collective": messages}) >= len(passes)


def test_operations_of_a_decode_step_grow_with_the_layers_only(
    rehearse: Callable[[str], Report],
):
    found = {}
    for name, layers, samples in (("one rank", 2, 4), ("four layers, 16 samples", 4, 16)):
        step = largest_step(rehearse(name)["phases"])
        assert step["known"]["samples"] == samples
        found[layers] = operations(step["events"])
        assert found[layers] <= TOKEN_OPERATIONS + LAYER_OPERATIONS * layers, found
    # Stated as they are, not as more.
    assert found[4] - found[2] == 2 * LAYER_OPERATIONS


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("four layers, 16 samples", 10), pytest.param("flex", 20, marks=pytest.mark.slow)],
)
def test_trees_and_passes_of_other_sizes_compile_nothing_anew(
    name: str, sizes: int, rehearse: Callable[[str], Report]
):
    report = rehearse(name)
    assert len({own["known"]["rows"] for own in report["phases"]["loss"]}) >= sizes
    assert report["compiled"] <= COMPILED[name]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("recipe", recipes.RANKS)
def test_the_planners_memory_of_a_recipe_is_what_the_allocator_gives_out(
    recipe: str, stage: int, null_device: Path, tmp_path: Path
):
    if stage >= recipes.STAGES.get(recipe, 1):
        pytest.skip("this recipe has one pipeline stage")
    recipes.write_tokenizer(tmp_path / "tokenizer")
    given = recipes.given_flags(tmp_path / "tokenizer")
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
