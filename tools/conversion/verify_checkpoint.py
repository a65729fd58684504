"""Compare the two forms of a model on a text, each run by a process of its own."""

import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from conversion.huggingface_weights import HuggingFaceWeights
from conversion.megatron_weights import MegatronWeights, iteration_directory

VERIFY_TEXT = (
    "The area of a circle of radius r is pi times r squared. If the radius is doubled, the area "
    "grows by a factor of four: 4 - 1 = 3 times as much was added."
)


@dataclass(frozen=True)
class Bound:
    """How far apart two forms of one model may be.

    Attributes:
        difference: Largest difference of two logits, as a share of the largest logit.
        agreement: Least share of positions with the same most probable token.
    """

    difference: float
    agreement: float


# Both forms compute in float32: thirty layers differ by some 2e-5 of the largest logit.
SAME_WEIGHTS = Bound(difference=1e-3, agreement=0.99)
# One form's weights are rounded to bfloat16 or float16, and the other's are not.
ROUNDED_WEIGHTS = Bound(difference=0.05, agreement=0.9)


@dataclass(frozen=True)
class Parity:
    """How two models agree on a text.

    Attributes:
        tokens: Length of the text.
        difference: Largest difference of two logits.
        scale: Largest logit.
        agreement: Share of positions with the same most probable token.
        perplexities: Of transformers and of Megatron.
        bound: What is expected of them.
    """

    tokens: int
    difference: float
    scale: float
    agreement: float
    perplexities: tuple[float, float]
    bound: Bound = SAME_WEIGHTS

    def __str__(self) -> str:
        ours, theirs = self.perplexities
        return (
            f"logits of {self.tokens} tokens: largest difference {self.difference:.3g}, "
            f"largest logit {self.scale:.3g}, same argmax {self.agreement:.1%}, "
            f"perplexity {ours:.6g} in transformers and {theirs:.6g} in Megatron"
        )

    def check(self) -> None:
        """Check that the models are within the bound.

        Raises:
            ValueError: They are not, or a logit is not finite.
        """
        largest = self.bound.difference * self.scale
        if not (self.difference <= largest and self.agreement >= self.bound.agreement):
            raise ValueError(
                f"--verify: the two forms compute different things; a difference of at most "
                f"{largest:.3g} ({self.bound.difference:.1%} of the largest logit) and the same "
                f"argmax at {self.bound.agreement:.0%} of the tokens were expected. Do not use "
                "what was written."
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
                command += ["--iteration", iteration]
            # On GPUs, Transformer Engine would else multiply float32 with ten bits of mantissa.
            environment = {**os.environ, "PYTHONWARNINGS": "ignore", "NVIDIA_TF32_OVERRIDE": "0"}
            process = subprocess.run(
                list(map(str, command)), stdout=subprocess.DEVNULL, env=environment
            )
            if process.returncode != 0:
                raise ValueError(f"--verify could not run {model} in {side}, see above.")
            found.append(torch.load(output, weights_only=True))
        bound = SAME_WEIGHTS if _same_dtypes(huggingface, megatron, iteration) else ROUNDED_WEIGHTS
        return compare(*found, torch.load(ids, weights_only=True), bound)


def _same_dtypes(huggingface: Path, megatron: Path, iteration: int | None) -> bool:
    """Whether both forms store their weights alike, so that none of them was rounded."""
    weights = MegatronWeights(iteration_directory(megatron, iteration))
    stored = {str(weights.dtype()).removeprefix("torch.")}
    return stored == set(HuggingFaceWeights(huggingface).dtypes.values())


def compare(
    ours: torch.Tensor, theirs: torch.Tensor, ids: torch.Tensor, bound: Bound = SAME_WEIGHTS
) -> Parity:
    """Parity of two sets of logits ``[1, tokens, vocabulary]`` for token ids ``[1, tokens]``."""
    return Parity(
        tokens=ids.shape[1],
        difference=(ours - theirs).abs().max().item(),
        scale=ours.abs().max().item(),
        agreement=(ours.argmax(-1) == theirs.argmax(-1)).double().mean().item(),
        perplexities=(perplexity(ours, ids), perplexity(theirs, ids)),
        bound=bound,
    )


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """exp of the mean negative log-probability of each token after the first, in float64."""
    if ids.shape[1] < 2:
        return math.nan
    logprobs = logits[0, :-1].double().log_softmax(-1)
    return math.exp(-logprobs.gather(-1, ids[0, 1:, None]).mean().item())
