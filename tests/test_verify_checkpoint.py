"""Both forms of a model on one text: SmolLM2's real weights."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny_checkpoints import TOOLS

sys.path.insert(0, str(TOOLS))

import convert_checkpoint
from conversion.verify_checkpoint import compare
from generate_corpus import draw_problems


@pytest.mark.multiprocess
def test_smollm2_gives_the_same_logits_and_perplexity_in_megatron(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text = tmp_path / "text"
    text.write_text("\n\n".join(problem.text for problem in draw_problems(3, 5, "test", set())))
    target = tmp_path / "smollm2"
    words = ["to-megatron", "--source", "smollm2", "--target", target, "--print-flags", "--verify"]
    convert_checkpoint.main(list(map(str, [*words, "--verify-text", text])))
    output = capsys.readouterr().out
    tokens, difference, agreement, ours, theirs = re.search(
        r"logits of (\d+) tokens: largest difference (\S+), largest logit \S+, same argmax (\S+)%, "
        r"perplexity (\S+) in transformers and (\S+) in Megatron",
        output,
    ).groups()
    assert int(tokens) > 50
    # Thirty layers of float32 and logits of about 30: a few units of the seventh digit.
    assert float(difference) < 5e-4
    assert float(agreement) == 100
    assert 1 < float(ours) < 50
    assert float(theirs) == pytest.approx(float(ours), rel=5e-5)
    flags = (target / "model_flags.txt").read_text()
    assert flags in output
    assert "--num-layers 30 --hidden-size 576" in flags
    assert "--untie" not in flags


def test_parity_names_the_largest_difference():
    ids = torch.tensor([[0, 2, 1]])
    ours = torch.zeros(1, 3, 4)
    theirs = ours.clone()
    theirs[0, 1, 3] = 0.5
    parity = compare(ours, theirs, ids)
    assert parity.difference == 0.5
    assert parity.agreement == pytest.approx(2 / 3)
    assert parity.perplexities[0] == pytest.approx(4)
    expected = math.exp((math.log(4) + math.log(3 + math.exp(0.5))) / 2)
    assert parity.perplexities[1] == pytest.approx(expected)
