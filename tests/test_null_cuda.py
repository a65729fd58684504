"""The training program on a CUDA device that counts and does not compute (``tests.null_cuda``)."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.null_cuda import device
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
    "--tokenizer-type HuggingFaceTokenizer"
)
RMT = (
    "--rmt --rmt-template inline --rmt-initial-budget 6 --rmt-positions-per-sample 4 "
    "--rmt-group-size 4 --rmt-answer-tokens 1 --rmt-force-close --rmt-attention sdpa"
)


@pytest.fixture(scope="session")
def null_device(pytestconfig: pytest.Config) -> Path:
    """The folder of the built device."""
    lacking = device.lacking()
    if lacking and os.environ.get("CI"):
        pytest.fail(lacking)
    if lacking:
        pytest.skip(lacking)
    return device.build(pytestconfig.cache.mkdir("null_cuda"))


@pytest.fixture(scope="session")
def phases(null_device: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Those of two steps on one rank, see ``rehearsal.Phase``."""
    root = tmp_path_factory.mktemp("null_cuda")
    build_tokenizer().save_pretrained(root / "tokenizer")
    flags = [*f"{MODEL} {TRAINING} {RMT}".split(), "--tokenizer-model", str(root / "tokenizer")]
    options = ["--report", str(root / "report.json")]
    device.run(null_device, "tests.null_cuda.rehearsal", [*options, "--", *flags])
    return json.loads((root / "report.json").read_text(encoding="utf-8"))["phases"]


def test_two_steps_run_to_their_end(phases: dict[str, list[Any]]):
    assert len(phases["step"]) == 2
    assert len(phases["update"]) == 2
    assert all(step["events"]["gemm"] > 0 for step in phases["step"])


def test_no_collective_is_given_host_memory(phases: dict[str, list[Any]]):
    for step in phases["step"]:
        assert step["events"]["collective"] > 0
        assert "collective of host memory" not in step["events"]


def test_a_decode_step_is_one_launch_and_one_wait(phases: dict[str, list[Any]]):
    # The first pass of each number of rows is recorded, or read at once as nothing came before it.
    passes = [own["events"] for own in phases["decode"]]
    replayed = [events for events in passes if events == {"graph launch": 1}]
    assert 2 * len(replayed) >= len(passes)
    for events in passes:
        assert "pageable copy to host" not in events
    taken = [own["events"] for own in phases["take tokens"]]
    assert all(events.get("wait", 0) <= 1 for events in taken)
    assert {"pinned copy to host": 1, "wait": 1} in taken


def test_a_token_takes_few_launches_beside_its_layers_and_the_attention_of_a_layer_four(
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
    for what, launches in {"numbers": 2, "write": 40, "attention": 4}.items():
        assert found[what]["launch"] <= launches
        assert found[what].keys() <= {"launch", "copy on device"}
