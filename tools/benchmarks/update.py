"""One update of RMT (embedding, layers, head; forward and backward) against how others lay it out.

The model is Megatron's GPTModel in the shape of SmolLM2-135M with random weights; every case runs
the project's own forward step, head and attention kernels on it, and gives the same loss and the
same gradients. Only the layout of the rollouts differs:

tree                        each document once, stems shared by a group (this project)
prefix shared per position  each position's prefix and stem once for its group of rollouts
naive packed                each rollout with its whole prefix, sequences of their own end to end
naive padded                the same, each padded to the longest

Only rows that predict something reach the head, also in the baselines. The FLOP ratio is that of
the products a layout asks for: linear layers by tokens, attention by visible pairs, head by
predictions.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megatron_rmt.cpu import platform as cpu_platform

if not torch.cuda.is_available():
    cpu_platform.install()

import numpy as np
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from benchmarks.measurement import Report, interleaved, median, peak_memory
from benchmarks.random_model import random_model
from megatron_rmt.algorithm.losses import Predictions, response_weights
from megatron_rmt.model.tree_attention import check_backend
from megatron_rmt.probe import document_sample
from megatron_rmt.rollout.responses import Rollout
from megatron_rmt.rollout.trunk import NO_LABEL
from megatron_rmt.update.forward_step import LossSettings, Update, make_forward_step
from megatron_rmt.update.packing import TreeSize, tree_size
from megatron_rmt.update.tree import ChosenPosition, ReasonedSample, grow_tree

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
LAYERS, VOCABULARY = 30, 49152
HIDDEN, FFN, HEADS, KV_HEADS, WIDTH = 576, 1536, 9, 3, 64
TEMPERATURE, NTP_COEFFICIENT = 0.8, 0.1
MEBIBYTE = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``benchmark.py update``."""
    sizes = {
        "--trunk-tokens": (512, "tokens S of the document"),
        "--positions": (16, "chosen positions K, evenly spaced"),
        "--group": (8, "rollouts G per position"),
        "--branch-tokens": (32, "tokens R of a rollout after its prefix, stem included"),
        "--stem-tokens": (8, "of those, tokens of the stem, which a group shares"),
        "--layers": (LAYERS, "layers; the vocabulary shrinks with them, to keep the head's share"),
        "--one-in": (
            1,
            "time one in N of the naive rollouts, evenly spread, and scale by FLOPs",
        ),
        "--shared-one-in": (1, "the same for the positions of 'prefix shared per position'"),
    }
    for name, (default, meaning) in sizes.items():
        parser.add_argument(name, type=int, default=default, help=f"{meaning} (default {default})")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="default fp32")
    parser.add_argument(
        "--backend",
        choices=["auto", "sdpa", "lse", "flex"],
        default="auto",
        help="attention of all cases, as --rmt-attention (default auto)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=None,
        help="most tokens of a micro-batch of the baselines (default: those of the tree)",
    )


@dataclass(frozen=True)
class Problem:
    """One document and its rollouts. rows: the chosen trunk rows. responses: ``[positions, group,
    tokens]`` int64. advantages: ``[positions, group]``."""

    document: Tensor
    rows: tuple[int, ...]
    stem: Tensor
    responses: Tensor
    advantages: Tensor
    vocab_size: int

    @property
    def group(self) -> int:
        """Rollouts per position."""
        return self.responses.shape[1]

    @property
    def ntp_predictions(self) -> int:
        """Rows of the document whose next token is learnt by teacher forcing."""
        return len(self.document) - len({*self.rows, len(self.document) - 1})

    def prefix(self, position: int) -> Tensor:
        """What a position sees of the document."""
        return self.document[: self.rows[position] + 1]

    def position(self, position: int) -> ChosenPosition:
        """A position with its group of rollouts."""
        count = self.responses.shape[2]
        drawn, log_probs = np.ones(count, dtype=bool), np.zeros(count, dtype=np.float32)
        return ChosenPosition(
            row=self.rows[position],
            budget=count,
            stem=self.stem.tolist(),
            rollouts=[
                Rollout(tokens.numpy(), drawn, log_probs) for tokens in self.responses[position]
            ],
        )


def make_problem(
    trunk_tokens: int,
    positions: int,
    group: int,
    branch_tokens: int,
    stem_tokens: int,
    vocab_size: int,
) -> Problem:
    """Random tokens and advantages; positions in the middles of equal parts of the document."""
    generator = torch.Generator().manual_seed(0)

    def tokens(*shape: int) -> Tensor:
        return torch.randint(vocab_size, shape, generator=generator)

    return Problem(
        document=tokens(trunk_tokens),
        rows=tuple((2 * k + 1) * trunk_tokens // (2 * positions) - 1 for k in range(positions)),
        stem=tokens(stem_tokens),
        responses=tokens(positions, group, branch_tokens - stem_tokens),
        advantages=torch.randn(positions, group, generator=generator),
        vocab_size=vocab_size,
    )


@dataclass(frozen=True)
class Layout:
    """One micro-batch. rollouts: the numbers of those in it, in order. as_sequences: each sample is
    a rollout with its whole prefix, and predicts its response alone."""

    problem: Problem
    reasoned: list[ReasonedSample]
    rollouts: list[int]
    as_sequences: bool = False

    @functools.cached_property
    def sizes(self) -> list[TreeSize]:
        """Of each sample's tree."""
        return [tree_size(of) for of in self.reasoned]

    @property
    def size(self) -> int:
        """Packed tokens."""
        return sum(size.tokens for size in self.sizes)

    def update(self, attention: str, device: torch.device) -> Update:
        """The micro-batch, made anew, with the weights of the loss of the whole problem."""
        problem, length = self.problem, self.problem.responses.shape[2]
        tree = grow_tree(
            self.reasoned,
            longest_position=len(problem.document) + len(problem.stem) + length,
            device=device,
            attention=attention,
        )
        if self.as_sequences:
            log_probs = torch.zeros(len(self.rollouts) * length, device=device)
            tree = dataclasses.replace(
                tree,
                trunk_predictions=0,
                ntp_mask=tree.ntp_mask[:0],
                rollouts=torch.arange(len(self.rollouts), device=device).repeat_interleave(length),
                drawn=torch.ones_like(log_probs, dtype=torch.bool),
                drawn_log_probs=log_probs,
            )
        policy = response_weights(
            problem.advantages.flatten()[self.rollouts].to(device),
            tree.rollouts,
            tree.drawn,
            positions=problem.advantages.numel(),
        )
        ntp = tree.ntp_mask / problem.ntp_predictions
        weights = Predictions.of(ntp, policy, torch.zeros_like(policy), tree.drawn_log_probs)
        return Update(tree, weights, {})


def tree_layouts(problem: Problem) -> list[Layout]:
    """One micro-batch: the document, and stem and branches of every position."""
    trunk = document_sample(problem.document)
    positions = [problem.position(position) for position in range(len(problem.rows))]
    rollouts = range(problem.advantages.numel())
    return [Layout(problem, [ReasonedSample(trunk, positions)], [*rollouts])]


def trunk_layouts(problem: Problem) -> list[Layout]:
    """The document alone, which every baseline needs once for its NTP loss."""
    labels = problem.document[1:].clone()
    labels[list(problem.rows)] = NO_LABEL
    return [Layout(problem, [ReasonedSample(document_sample(problem.document, labels))], [])]


def packed_layouts(problem: Problem, rollouts: Sequence[int], most: int) -> list[Layout]:
    """Each of ``rollouts`` a sequence of its own, in micro-batches of at most ``most`` tokens."""
    return _packed((_sequence(problem, rollout) for rollout in rollouts), most)


def padded_layouts(problem: Problem, rollouts: Sequence[int], most: int) -> list[Layout]:
    """As ``packed_layouts``, each sequence padded to the longest of the problem."""
    longest = problem.rows[-1] + len(problem.stem) + problem.responses.shape[2]
    return _packed((_sequence(problem, rollout, longest) for rollout in rollouts), most)


def _sequence(problem: Problem, rollout: int, length: int = 0) -> Layout:
    """A rollout with its whole prefix, padded to ``length``."""
    position, index = divmod(rollout, problem.group)
    response = problem.responses[position, index]
    before = torch.cat([problem.prefix(position), problem.stem])
    tokens = torch.cat([before, response[:-1]])
    tokens = F.pad(tokens, (0, max(0, length - len(tokens))))
    sample = document_sample(tokens, response, first=len(before) - 1)
    return Layout(problem, [ReasonedSample(sample)], [rollout], as_sequences=True)


def shared_layouts(problem: Problem, positions: Sequence[int], most: int) -> list[Layout]:
    """Each of ``positions`` with a copy of its prefix, which its group shares."""
    return _packed((_shared(problem, position) for position in positions), most)


def _shared(problem: Problem, position: int) -> Layout:
    row, group = problem.rows[position], problem.group
    sample = document_sample(problem.prefix(position), problem.document[[row + 1]], first=row)
    rollouts = range(position * group, (position + 1) * group)
    return Layout(problem, [ReasonedSample(sample, [problem.position(position)])], [*rollouts])


def _packed(items: Iterable[Layout], most: int) -> list[Layout]:
    """``items`` in order, in micro-batches of at most ``most`` tokens."""
    layouts: list[Layout] = []
    for item in items:
        if not layouts or layouts[-1].size + item.size > most:
            layouts.append(item)
            continue
        last = layouts[-1]
        layouts[-1] = dataclasses.replace(
            last, reasoned=last.reasoned + item.reasoned, rollouts=last.rollouts + item.rollouts
        )
    return layouts


def evenly(count: int, one_in: int) -> list[int]:
    """One in ``one_in`` of ``range(count)``, from the middles of equal parts."""
    parts = -(-count // one_in)
    return [(2 * part + 1) * count // (2 * parts) for part in range(parts)]


def flops(layouts: Sequence[Layout], layers: int) -> float:
    """Multiplications and additions of forward and backward, as flash attention and the one-pass
    head do them: 6 per weight and token, 14 per visible pair and channel, 6 per prediction, channel
    and token of the vocabulary."""
    projections = HIDDEN * (2 * HEADS + 2 * KV_HEADS) * WIDTH + 3 * HIDDEN * FFN
    total = 0.0
    for layout in layouts:
        for size in layout.sizes:
            total += 6 * layers * projections * size.tokens
            total += 14 * layers * HEADS * WIDTH * size.pairs
            total += 6 * HIDDEN * layout.problem.vocab_size * size.predictions
    return total


def build_model(layers: int, vocab_size: int, dtype: torch.dtype, longest: int) -> GPTModel:
    """SmolLM2-135M's shape with random weights and tree attention."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo" if cpu_platform.is_installed() else "nccl",
            store=torch.distributed.HashStore(),
            rank=0,
            world_size=1,
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    torch.manual_seed(1)
    model = random_model(
        layers=layers,
        hidden=HIDDEN,
        ffn=FFN,
        heads=HEADS,
        kv_heads=KV_HEADS,
        width=WIDTH,
        vocab_size=vocab_size,
        longest=longest,
        dtype=dtype,
        device=torch.device("cpu" if cpu_platform.is_installed() else "cuda"),
    )
    return model.train()


def run_update(model: GPTModel, problem: Problem, updates: Sequence[Update]) -> Tensor:
    """Forward and backward of all micro-batches; gradients are added up. Returns the loss."""
    settings = LossSettings(
        ntp_coefficient=NTP_COEFFICIENT,
        temperature=TEMPERATURE,
        vocab_size=problem.vocab_size,
        chunk_size=384,
        ntp_tokens=float(problem.ntp_predictions),
        scale=1.0,
    )
    forward_step = make_forward_step(settings)
    iterator: Iterator[Update] = iter(updates)
    total = torch.zeros((), device=updates[0].tree.tokens.device)
    for _ in updates:
        output, loss_function = forward_step(iterator, model)
        loss = loss_function(output)[0]
        loss.backward()
        total += loss.detach()
    return total


def run(flags: argparse.Namespace) -> Report:
    """Time the four layouts.

    Raises:
        ValueError: sizes that make no sense.
    """
    _check(flags)
    vocab_size = -(-VOCABULARY * flags.layers // LAYERS // 64) * 64
    problem = make_problem(
        flags.trunk_tokens,
        flags.positions,
        flags.group,
        flags.branch_tokens,
        flags.stem_tokens,
        vocab_size,
    )
    model = build_model(
        flags.layers, vocab_size, DTYPES[flags.dtype], flags.trunk_tokens + flags.branch_tokens
    )
    device = next(model.parameters()).device
    check_backend(flags.backend, device)

    tree, document = tree_layouts(problem), trunk_layouts(problem)
    most = flags.max_tokens or tree[0].size
    rollouts, positions = problem.advantages.numel(), flags.positions
    # Whole layouts, and those that are timed in their place.
    cases = {"tree": (tree, tree), "document alone": (document, document)}
    baselines = {
        "prefix shared per position": (shared_layouts, positions, flags.shared_one_in),
        "naive packed": (packed_layouts, rollouts, flags.one_in),
        "naive padded": (padded_layouts, rollouts, flags.one_in),
    }
    for name, (lay_out, count, one_in) in baselines.items():
        some = evenly(count, one_in)
        cases[name] = lay_out(problem, range(count), most), lay_out(problem, some, most)

    def timed(layouts: Sequence[Layout]) -> Callable[[], object]:
        def update() -> Tensor:
            model.zero_grad()
            # Made anew: what a backend prepares for a micro-batch belongs to its time.
            updates = [layout.update(flags.backend, device) for layout in layouts]
            return run_update(model, problem, updates)

        return update

    runs = {name: timed(measured) for name, (_, measured) in cases.items()}
    memory = {}
    for name, case in runs.items():
        case()
        memory[name] = peak_memory(case, device.type)[0] / MEBIBYTE
    times = interleaved(runs, flags.repeats, warm_ups=0)

    work = {name: flops(whole, flags.layers) for name, (whole, _) in cases.items()}
    seconds = {
        name: median(times[name]) * work[name] / flops(measured, flags.layers)
        for name, (_, measured) in cases.items()
    }
    for name in baselines:
        work[name] += work["document alone"]
        seconds[name] += seconds["document alone"]
    table = []
    for name in ["tree", *baselines]:
        ratio, of_flops = seconds[name] / seconds["tree"], work[name] / work["tree"]
        whole = cases[name][0] + (cases["document alone"][0] if name in baselines else [])
        table.append(
            [
                name,
                f"{sum(layout.size for layout in whole)}",
                f"{len(whole)}",
                f"{seconds[name]:.2f}",
                f"{work[name] / seconds[name] / 1e9:.0f}",
                f"{ratio:.2f}",
                f"{of_flops:.2f}",
                f"{ratio / of_flops:.2f}",
                f"{memory[name]:.0f}",
            ]
        )
    return Report(
        title=f"One update: S={flags.trunk_tokens}, K={flags.positions}, G={flags.group}, "
        f"R={flags.branch_tokens} (stem {flags.stem_tokens}), {flags.layers} layers, "
        f"vocabulary {vocab_size}, {flags.dtype}, attention {flags.backend}",
        columns=[
            "layout",
            "tokens",
            "micro-batches",
            "seconds",
            "GFLOP/s",
            "of tree",
            "FLOPs of tree",
            "of FLOP ratio",
            "peak MB",
        ],
        rows=table,
        notes=_notes(flags, rollouts),
        data={
            "seconds": times,
            "flops": work,
            "peak_mebibytes": memory,
            "flags": {name: str(value) for name, value in vars(flags).items()},
        },
    )


def _check(flags: argparse.Namespace) -> None:
    least_one = ("trunk_tokens", "positions", "group", "stem_tokens", "layers", "one_in")
    for name in (*least_one, "shared_one_in"):
        if getattr(flags, name) < 1:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} is {getattr(flags, name)}; pass 1 or more.")
    if flags.branch_tokens <= flags.stem_tokens:
        raise ValueError(
            f"--branch-tokens is {flags.branch_tokens}; pass more than --stem-tokens "
            f"({flags.stem_tokens}), which it includes."
        )
    if 2 * flags.positions > flags.trunk_tokens:
        raise ValueError(
            f"--positions is {flags.positions}; pass at most half of --trunk-tokens "
            f"({flags.trunk_tokens})."
        )


def _notes(flags: argparse.Namespace, rollouts: int) -> list[str]:
    timed = len(evenly(rollouts, flags.one_in))
    positions = len(evenly(flags.positions, flags.shared_one_in))
    notes = [
        "'of tree': seconds over the tree's; 'FLOPs of tree': what the arithmetic alone would "
        "give; 'of FLOP ratio': the first over the second.",
        f"Naive cases: {timed} of {rollouts} rollouts timed; prefix shared: {positions} of "
        f"{flags.positions} positions; both scaled by FLOPs, and the document's own pass for the "
        "NTP loss, timed apart, added.",
        "Peak: most bytes of a micro-batch beyond the weights; the baselines' micro-batches hold "
        "at most as many tokens as the tree.",
    ]
    if flags.layers != LAYERS:
        notes.append(
            f"{flags.layers} of {LAYERS} layers with a vocabulary of {flags.layers}/{LAYERS}: the "
            "head keeps its share."
        )
    return notes
