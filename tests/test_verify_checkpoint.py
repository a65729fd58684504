"""Both forms of a model on one text, and how far apart they may be."""

import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny_checkpoints import TOOLS, WORDS, tensors

sys.path.insert(0, str(TOOLS))

import convert_checkpoint
from conversion.verify_checkpoint import ROUNDED_WEIGHTS, Parity, compare, verify
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


def parity_of(difference: float, agreement: float = 1.0) -> Parity:
    return Parity(10, difference, 20.0, agreement, (5.0, 5.0))


@pytest.mark.parametrize(
    "parity",
    [parity_of(0.021), parity_of(math.nan), parity_of(math.inf), parity_of(0.0, 0.98)],
)
@pytest.mark.parametrize("direction", ["to-megatron", "to-huggingface"])
def test_forms_that_differ_end_the_command_after_the_figures(
    tiny_checkpoints: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    direction: str,
    parity: Parity,
):
    monkeypatch.setattr(convert_checkpoint, "verify", lambda *_: parity)
    source = tiny_checkpoints / "llama"
    if direction == "to-huggingface":
        convert_checkpoint.to_megatron(source, tmp_path / "source")
        source = tmp_path / "source"
    words = [direction, "--source", str(source), "--target", str(tmp_path / "target"), "--verify"]
    sentence = (
        r"a difference of at most 0\.02 \(0\.1% of the largest logit\) and the same argmax at"
    )
    with pytest.raises(SystemExit, match=sentence):
        convert_checkpoint.main(words)
    assert str(parity) in capsys.readouterr().out


def test_forms_within_the_bound_pass():
    parity_of(0.019, 0.995).check()
    parity_of(0.0).check()
    Parity(10, 0.9, 20.0, 0.95, (5.0, 5.0), ROUNDED_WEIGHTS).check()
    with pytest.raises(ValueError, match=r"at most 1 \(5\.0% of"):
        Parity(10, 1.1, 20.0, 0.95, (5.0, 5.0), ROUNDED_WEIGHTS).check()


@pytest.mark.multiprocess
def test_another_model_is_beyond_the_bound(tiny_checkpoints: Path, tmp_path: Path):
    other = Path(shutil.copytree(tiny_checkpoints / "llama", tmp_path / "other"))
    name = "model.layers.1.self_attn.q_proj.weight"
    found = tensors(other)
    # Two heads of four change places.
    found[name] = found[name].view(2, 2, 8, 32).flip(0).reshape(32, 32).contiguous()
    save_file(found, other / "model.safetensors", metadata={"format": "pt"})
    target = tmp_path / "megatron"
    convert_checkpoint.to_megatron(other, target)
    parity = verify(tiny_checkpoints / "llama", target, target / "huggingface", WORDS)
    with pytest.raises(ValueError, match="the two forms compute different things"):
        parity.check()


@pytest.mark.multiprocess
def test_weights_that_were_rounded_have_a_bound_of_their_own(
    tiny_checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["to-megatron", "--source", tiny_checkpoints / "llama", "--dtype", "bfloat16"]
    (tmp_path / "text").write_text(WORDS)
    words += ["--target", tmp_path / "target", "--verify", "--verify-text", tmp_path / "text"]
    convert_checkpoint.main(list(map(str, words)))
    output = capsys.readouterr().out
    difference, scale = map(
        float, re.search(r"difference (\S+), largest logit (\S+),", output).groups()
    )
    assert 1e-3 * scale < difference < 0.05 * scale
