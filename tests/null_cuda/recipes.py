"""The recipes for H100, as one rank of them runs on the null device, and what the planner says.

Layers are Megatron's local ones unless others are given, documents are random, and the budget stays
what it is at first; all else is the recipe's: model, layout, sample length, positions, group,
optimizer, recompute. Its tokenizer has as many tokens as Qwen's.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from examples.recipe import recipe_flags
from tests.null_cuda.device import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tools"))

import plan
from planning.memory import RankMemory, rank_memory
from planning.settings import model_words

FOLDER = REPOSITORY / "examples/recipes"
# Ranks of each recipe, as its comment says.
RANKS = {"qwen3-1.7b": 1, "qwen3-14b": 16, "r1-distill-qwen-14b": 16, "qwen3-30b-a3b": 16}
# Pipeline stages, where there is more than one.
STAGES = {"qwen3-30b-a3b": 2}
TOKENS = 151_669
LOCAL = (
    "--transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion "
    "--no-persist-layer-norm --no-rope-fusion"
)
# Transformer Engine's, as the recipes have them; in FP8 with copies of the weights, or kept in it.
ENGINE = "--transformer-impl transformer_engine"
FP8 = f"{ENGINE} --fp8-format e4m3 --fp8-recipe blockwise"
LAYERS = {"local": LOCAL, "engine": ENGINE, "fp8": FP8, "fp8-kept": f"{FP8} --fp8-param-gather"}
STEPS = (
    "--mock-data --train-iters 2 --rmt-no-budget-decay --rmt-no-chat --num-workers 0 "
    "--disable-gloo-process-groups --rmt-log-samples-interval 0"
)
# What names files, and documents that do not see each other: how many there are is not known.
DROPPED = (
    "--pretrained-checkpoint",
    "--load",
    "--save",
    "--save-interval",
    "--data-path",
    "--reset-position-ids",
    "--reset-attention-mask",
)


def write_tokenizer(folder: Path, tokens: int = TOKENS) -> None:
    """A byte-level tokenizer of English, most of whose ``tokens`` never come up."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pages = [
        path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "docs").glob("*.md"))
    ]
    bpe.train_from_iterator(pages, trainer)
    description = json.loads(bpe.to_str())
    vocabulary = description["model"]["vocab"]
    for token in range(len(vocabulary), tokens):
        vocabulary[f"never{token}"] = token
    bpe = tokenizers.Tokenizer.from_str(json.dumps(description))
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>").save_pretrained(folder)


def given_flags(tokenizer: Path, *changes: str, layers: str = LOCAL) -> list[str]:
    """What is given beside a recipe. layers: flags that choose them."""
    words = [*layers.split(), *STEPS.split(), "--tokenizer-type", "HuggingFaceTokenizer"]
    return [*words, "--tokenizer-model", str(tokenizer), *changes]


def run_flags(recipe: str, given: Sequence[str], folder: Path) -> list[str]:
    """The flags of a run of ``recipe``. folder: where an empty file may lie."""
    path = FOLDER / f"{recipe}.args"
    (folder / "model_flags.txt").touch()
    environment = {"CHECKPOINT": str(folder), "DATA": "none"}
    return [*model_words(None, None, path), *_kept(recipe_flags(path, given, environment)), *given]


def _kept(words: Sequence[str]) -> Iterator[str]:
    dropping = False
    for word in words:
        if word.startswith("--"):
            dropping = word in DROPPED
        if not dropping:
            yield word


@dataclass(frozen=True)
class Planned:
    """Of one rank: its memory, and the tokens of each response that it was planned with."""

    memory: RankMemory
    response: int


def planned(recipe: str, given: Sequence[str], stage: int, at_bound: bool = False) -> Planned:
    """What tools/plan.py says of a rank of pipeline ``stage`` in the first step. at_bound: every
    thought is as long as it may be.

    Raises:
        ValueError: it cannot be planned.
    """
    words = ["--recipe", str(FOLDER / f"{recipe}.args"), "--world-size", str(RANKS[recipe])]
    request, _ = plan.read_request([*words, *given])
    made = plan.make_plan(request)
    step = plan.step_at(request, made.args, made.documents, made.first.schedule, at_bound)
    memory = rank_memory(step.args, step.work, step.tokens.allocated, stage)
    return Planned(memory, round(step.tokens.lengths.response))
