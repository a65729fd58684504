"""Whole runs of converted models whose layers differ, alike where ranks share their experts."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_checkpoints import TOOLS
from tests.tiny_run import RMT, TRAINING, TinyInputs, run

sys.path.insert(0, str(TOOLS))

import convert_checkpoint

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

EP2 = ["--expert-model-parallel-size", "2", "--moe-token-dispatcher-type", "alltoall"]


@pytest.mark.parametrize("name", ["deepseek-v3-yarn", "deepseek-v3", "glm-4.5"])
def test_a_converted_model_trains_alike_at_expert_parallel_size_2(
    inputs: TinyInputs, tiny_checkpoints: Path, tmp_path: Path, name: str
):
    source, checkpoint, data = tiny_checkpoints / name, tmp_path / "megatron", tmp_path / "tokens"
    convert_checkpoint.to_megatron(source, checkpoint)
    words = ["--input", inputs.data.parents[1] / "corpus/train.jsonl", "--output-prefix", data]
    command = [sys.executable, TOOLS / "preprocess_data.py", *words, "--tokenizer", source]
    subprocess.run(command, check=True)
    flags = shlex.split(convert_checkpoint.flags_of(checkpoint))
    flags += [*TRAINING, *RMT, "--load", str(checkpoint), "--finetune", "--data-path", str(data)]
    flags += ["--max-position-embeddings", "1024", "--exit-interval", "2"]
    alone = run(tmp_path / "alone", 1, flags).metrics
    shared = run(tmp_path / "shared", 2, [*flags, *EP2]).metrics
    assert len(alone) == 2
    for line, other in zip(shared, alone, strict=True):
        assert line["rollout checksum"] == other["rollout checksum"]
        for value in ("entropy", "ntp loss", "grad norm"):
            assert line[value] == pytest.approx(other[value], rel=1e-5), value
