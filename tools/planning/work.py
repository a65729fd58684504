"""Tokens and floating-point operations of one step of RMT, from its settings alone.

Everything is a mean: chosen positions lie uniformly in their samples, every sample yields all of
them, and all rollouts are equally long. Operations are those that the code asks for, two for each
multiplication with its addition: visible pairs of tokens in the update, but whole blocks of them,
mask and all, while rollouts are decoded. Norms, softmax and other work that is not a matrix product
is left out. Nothing here builds a model or needs a device.
"""

import dataclasses
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rmt.update.packing import TreeCost, tree_cost


@dataclass(frozen=True)
class Documents:
    """The mean sample of the corpus, all in tokens, prompt heads left out.

    pieces: documents, or parts of them, in a sample. triangle: sum over the pieces of
    n * (n + 1) / 2, the pairs of a causal mask. seen, seen_squared: mean number of tokens that a
    position drawn uniformly from a sample sees of its own document, itself included, and the mean
    of its square.
    """

    pieces: float
    triangle: float
    seen: float
    seen_squared: float


def documents_in_samples(lengths: Sequence[int] | np.ndarray, seq_length: int) -> Documents:
    """Documents of ``lengths`` end to end, cut into samples of ``seq_length`` tokens."""
    lengths = np.asarray(lengths, dtype=np.int64)
    # Epochs follow one another; enough of them that the first and the last cut do not matter.
    epochs = -(-64 * seq_length // max(1, int(lengths.sum())))
    ends = np.cumsum(np.resize(lengths, epochs * len(lengths)))
    samples = int(ends[-1]) // seq_length
    cuts = np.unique(np.concatenate([ends, np.arange(1, samples + 1) * seq_length]))
    pieces = np.diff(cuts[cuts <= samples * seq_length], prepend=0).astype(np.float64)
    total = pieces.sum()
    return Documents(
        pieces=len(pieces) / samples,
        triangle=float((pieces * (pieces + 1) / 2).sum() / samples),
        seen=float((pieces * (pieces + 1) / 2).sum() / total),
        seen_squared=float((pieces * (pieces + 1) * (2 * pieces + 1) / 6).sum() / total),
    )


@dataclass(frozen=True)
class Lengths:
    """Tokens of the prompt and of a rollout, means of one step.

    head: before each document. stem: after each chosen position. response: a thought, its end and
    the answer, the last token included.
    """

    head: float
    stem: float
    response: float


@dataclass(frozen=True)
class Tokens:
    """Tokens of one sample in each pass. tree: trunk, stems and branches, what the update reads.
    naive_rollout, naive_update: with each rollout a sequence of its own, and the document once more
    for its next-token loss."""

    trunk: float
    stem: float
    branch: float
    naive_rollout: float
    naive_update: float

    @property
    def tree(self) -> float:
        return self.trunk + self.stem + self.branch


@dataclass(frozen=True)
class Pass:
    """What one pass over one sample multiplies. pairs: (query, key) pairs of tokens, those behind
    a mask included. predictions: rows of the head."""

    tokens: float
    pairs: float
    predictions: float

    def __add__(self, other: "Pass") -> "Pass":
        return Pass(
            self.tokens + other.tokens,
            self.pairs + other.pairs,
            self.predictions + other.predictions,
        )

    def __mul__(self, factor: float) -> "Pass":
        return Pass(self.tokens * factor, self.pairs * factor, self.predictions * factor)


@dataclass(frozen=True)
class SampleWork:
    """The passes over one sample. span: trunk tokens that a decoded row is multiplied with."""

    tokens: Tokens
    trunk: Pass
    stems: Pass
    decode: Pass
    update: Pass
    naive_rollout: Pass
    naive_update: Pass
    span: float


def sample_work(args: Namespace, documents: Documents, lengths: Lengths) -> SampleWork:
    """What a step does with one sample, under ``args`` with ``lengths`` of this step."""
    head, stem, response = lengths.head, lengths.stem, lengths.response
    positions, group = args.rmt_positions_per_sample, args.rmt_group_size
    rollouts = positions * group
    # A reserve is rolled out, and not trained.
    drawn = args.positions_drawn
    # The last token of a response predicts nothing, so it is never read.
    branch = max(0.0, response - 1)
    trunk = args.seq_length + head * documents.pieces
    seen = head + documents.seen
    own = stem * (stem + 1) / 2 + group * (branch * stem + branch * (branch + 1) / 2)
    trunk_pairs = (
        documents.triangle + head * args.seq_length + documents.pieces * head * (head + 1) / 2
    )
    tree = Pass(
        tokens=trunk + positions * stem + rollouts * branch,
        pairs=trunk_pairs + positions * ((stem + group * branch) * seen + own),
        predictions=args.seq_length - positions + rollouts * response,
    )
    span = _span(args, documents, head)
    stems = Pass(drawn * stem, drawn * stem * (span + stem), drawn)
    decoded_tokens = drawn * group * branch
    decode = Pass(
        tokens=decoded_tokens,
        pairs=decoded_tokens * (span + stem + (branch + 1) / 2),
        predictions=decoded_tokens,
    )
    # Of a whole sequence of s + rest tokens, s of them seen: the mean of n * (n + 1) / 2.
    prefix_squared = head**2 + 2 * head * documents.seen + documents.seen_squared

    def triangle(rest: float) -> float:
        return (prefix_squared + 2 * seen * rest + rest**2 + seen + rest) / 2

    prefill = Pass(seen + stem, triangle(stem), 1)
    decoded = Pass(branch, triangle(stem + branch) - triangle(stem), branch)
    sequence = Pass(seen + stem + branch, triangle(stem + branch), response)
    document = Pass(trunk, trunk_pairs, args.seq_length - positions)
    naive_rollout = (prefill + decoded) * (drawn * group)
    naive_update = sequence * rollouts + document
    return SampleWork(
        tokens=Tokens(
            trunk=trunk,
            stem=positions * stem,
            branch=rollouts * branch,
            naive_rollout=naive_rollout.tokens,
            naive_update=naive_update.tokens,
        ),
        trunk=Pass(trunk, trunk_pairs, trunk),
        stems=stems,
        decode=decode,
        update=tree,
        naive_rollout=naive_rollout,
        naive_update=naive_update,
        span=span,
    )


def without_rollouts(work: SampleWork) -> SampleWork:
    """``work`` of a warm-up whose responses are written, not drawn."""
    return dataclasses.replace(
        work,
        tokens=dataclasses.replace(work.tokens, naive_rollout=0.0),
        stems=work.stems * 0,
        decode=work.decode * 0,
        naive_rollout=work.naive_rollout * 0,
    )


def _span(args: Namespace, documents: Documents, head: float) -> float:
    """Trunk tokens from the document of a sample's first chosen position to its last one, which
    every rollout of the sample is multiplied with while it is decoded."""
    apart = args.positions_drawn + 1
    first, last = args.seq_length / apart, args.seq_length * (apart - 1) / apart
    between = last - first
    heads = 1 + (documents.pieces - 1) * between / args.seq_length
    return between + min(first, documents.seen) + head * heads


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of a step. update: forward and backward. recompute: of activations
    that were not kept. naive_rollout, naive_update: as in ``Tokens``; the latter without recompute.
    """

    trunk: float
    rollout: float
    update: float
    recompute: float
    naive_rollout: float
    naive_update: float

    @property
    def total(self) -> float:
        return self.trunk + self.rollout + self.update + self.recompute

    def __mul__(self, factor: float) -> "StepFlops":
        return StepFlops(*(value * factor for value in dataclasses.astuple(self)))


# Backward multiplies by each weight twice; flash attention has five products there and two in
# forward. The head makes its gradients in its forward pass, and reads every row once.
BACKWARD, ATTENTION_BACKWARD, HEAD = 2.0, 2.5, 3.0


def model_cost(args: Namespace) -> TreeCost:
    """Operations of a token, a pair and a prediction in a forward pass, with the routers'."""
    cost = tree_cost(args, args.head_columns)
    routers = 2 * args.hidden_size * (args.num_moe_experts or 0) * args.num_layers
    return dataclasses.replace(cost, token=cost.token + routers)


def flops(work: Pass, cost: TreeCost) -> float:
    """Of a forward pass."""
    return work.tokens * cost.token + work.pairs * cost.pair + work.predictions * cost.prediction


def training_flops(work: Pass, cost: TreeCost) -> float:
    """Of a forward and backward pass, nothing recomputed."""
    return (
        work.tokens * cost.token * (1 + BACKWARD)
        + work.pairs * cost.pair * (1 + ATTENTION_BACKWARD)
        + work.predictions * cost.prediction * HEAD
    )


def step_flops(args: Namespace, work: SampleWork) -> StepFlops:
    """Of the whole global batch."""
    cost = model_cost(args)
    recomputed = 0.0
    if args.recompute_granularity == "full":
        share = 1.0
        if args.recompute_method == "block":
            stages = args.pipeline_model_parallel_size * args.chunks
            share = min(1.0, (args.recompute_num_layers or 0) * stages / args.num_layers)
        recomputed = share * flops(dataclasses.replace(work.update, predictions=0), cost)
    elif args.recompute_granularity == "selective":
        recomputed = work.update.pairs * cost.pair
    one = StepFlops(
        trunk=flops(work.trunk, cost),
        rollout=flops(work.stems + work.decode, cost),
        update=training_flops(work.update, cost),
        recompute=recomputed,
        naive_rollout=flops(work.naive_rollout, cost),
        naive_update=training_flops(work.naive_update, cost),
    )
    return one * args.global_batch_size
