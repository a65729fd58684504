"""A small byte-level tokenizer, trained on pieces of responses."""

import random

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# Pieces of responses, right and wrong, as a model may write them.
PIECES = [
    "Let us see. The sum is 42",
    " so the text goes on with é",
    "</think>",
    "</thi",
    "<</think>",
    "nk>",
    "<",
    "</",
    "\\boxed{",
    "\\boxed{the}",
    "\\boxed{}",
    "\\boxed{ the}",
    "\\boxed{\\frac{1}{2}}",
    "\\boxed{" + "{" * 7 + "x" + "}" * 8,
    "\\boxed{" + "{" * 8 + "x" + "}" * 9,
    "\\bo",
    "\\\\boxed{a}",
    "{",
    "}",
    "}}",
    "\n",
    " the",
]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges cross the markers' ends (no splitting before training)."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    generator = random.Random(0)
    lines = ["".join(generator.choices(PIECES, k=6)) for _ in range(300)]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
