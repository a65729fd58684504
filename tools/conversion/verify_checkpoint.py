"""Compare the two forms of a model on a text, each run by a process of its own."""

import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

VERIFY_TEXT = (
    "The area of a circle of radius r is pi times r squared. If the radius is doubled, the area "
    "grows by a factor of four: 4 - 1 = 3 times as much was added."
)


@dataclass(frozen=True)
class Parity:
    """How two models agree on a text.

    Attributes:
        tokens: Length of the text.
        difference: Largest difference of two logits.
        scale: Largest logit.
        agreement: Share of positions with the same most probable token.
        perplexities: Of transformers and of Megatron.
    """

    tokens: int
    difference: float
    scale: float
    agreement: float
    perplexities: tuple[float, float]

    def __str__(self) -> str:
        ours, theirs = self.perplexities
        return (
            f"logits of {self.tokens} tokens: largest difference {self.difference:.3g}, "
            f"largest logit {self.scale:.3g}, same argmax {self.agreement:.1%}, "
            f"perplexity {ours:.6g} in transformers and {theirs:.6g} in Megatron"
        )


def verify(
    huggingface: Path, megatron: Path, companions: Path, text: str, iteration: int | None = None
) -> Parity:
    """Run both forms in float32, Megatron through its own command line and ``load_checkpoint``.

    Where ``--dtype`` rounded the weights, the rounding is part of the difference.

    Args:
        huggingface: Hugging Face directory.
        megatron: Megatron checkpoint directory.
        companions: Directory with config.json and tokenizer.
        text: Compared on.
        iteration: Of the Megatron checkpoint; None: the last one.

    Raises:
        ValueError: One of the two could not be run; its own message is on stderr.
    """
    script = Path(__file__).with_name("checkpoint_logits.py")
    with tempfile.TemporaryDirectory(prefix="verify-") as directory:
        words = Path(directory) / "text"
        words.write_text(text, encoding="utf-8")
        found: list[torch.Tensor] = []
        ids = Path(directory) / "ids.pt"
        for side, model in (("huggingface", huggingface), ("megatron", megatron)):
            output = Path(directory) / f"{side}.pt"
            command = [sys.executable, script, side, model, "--text-file", words]
            command += ["--output", output, "--ids-output", ids, "--companions", companions]
            if iteration is not None and side == "megatron":
                command += ["--ckpt-step", iteration]
            environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
            process = subprocess.run(
                list(map(str, command)), stdout=subprocess.DEVNULL, env=environment
            )
            if process.returncode != 0:
                raise ValueError(f"--verify could not run {model} in {side}, see above.")
            found.append(torch.load(output, weights_only=True))
        return compare(*found, torch.load(ids, weights_only=True))


def compare(ours: torch.Tensor, theirs: torch.Tensor, ids: torch.Tensor) -> Parity:
    """Parity of two sets of logits ``[1, tokens, vocabulary]`` for token ids ``[1, tokens]``."""
    return Parity(
        tokens=ids.shape[1],
        difference=(ours - theirs).abs().max().item(),
        scale=ours.abs().max().item(),
        agreement=(ours.argmax(-1) == theirs.argmax(-1)).double().mean().item(),
        perplexities=(perplexity(ours, ids), perplexity(theirs, ids)),
    )


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """exp of the mean negative log-probability of each token after the first, in float64."""
    if ids.shape[1] < 2:
        return math.nan
    logprobs = logits[0, :-1].double().log_softmax(-1)
    return math.exp(-logprobs.gather(-1, ids[0, 1:, None]).mean().item())
