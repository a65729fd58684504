"""From the hidden states of rollouts to their next tokens.

Scores are split over the tensor-parallel ranks; ``algorithm.rng`` gives the numbers for the draws.
"""

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from megatron_rmt.cpu import compiled
from megatron_rmt.cpu.compiled import fused
from megatron_rmt.model.head import (
    first_with_maximum,
    of_all_ranks,
    reduce_over_ranks,
    vocab_range,
)
from megatron_rmt.model.head_products import multiply_scores, score_dtype, slices, wide_copy

# A token's weight is a whole number of 2^-34 of the weight of the most probable token. With at most
# 2^19 tokens every sum of weights stays below 2^53 and is exact in float64, in whatever order and
# over whatever vocabulary split it is taken.
_WEIGHT_SCALE = 2.0**34
_LEAST_EXPONENT = -24.0  # exp(-24) is below 2^-34
_MAXIMUM_VOCABULARY = 2**19

_BLOCK = 256
# Elements worked on at a time: near the cache on a CPU, bounded memory and few launches on a GPU.
_ELEMENTS_CPU = 2**18
_ELEMENTS_CUDA = 2**25


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """How responses are drawn.

    group: responses per position. budget: B_t, which the stem names. seed, iteration: of the draws.
    temperature: of the sampling distribution. greedy: most likely token instead of a draw. top_k,
    top_p: see ``sample_tokens``. kv_bytes: bound on the keys and values held at a time, None for no
    bound. writes_truth: format warm-up; every thought is closed at the budget at the latest, or
    where the text would end, and the true answer is written. thinks: False closes the thought in
    the prompt, so that a response is an answer alone. graph: a step may be recorded as a CUDA
    graph.
    """

    group: int
    budget: int
    seed: int
    iteration: int
    temperature: float
    greedy: bool = False
    top_k: int | None = None
    top_p: float | None = None
    kv_bytes: int | None = None
    writes_truth: bool = False
    thinks: bool = True
    graph: bool = True


class DecodeHead:
    """The language-model head while rollouts are generated, on the last pipeline stage.

    weight: ``[padded vocab/tp, hidden]``, this rank's shard. vocab_size: the true one. most_rows:
    for which memory is held from the first call on, so that it keeps its place.
    """

    def __init__(
        self,
        weight: Tensor,
        vocab_size: int,
        tp_group: ProcessGroup | None,
        how: RolloutSettings,
        most_rows: int = 0,
    ) -> None:
        self.most_rows = most_rows
        self.start, columns = vocab_range(len(weight), vocab_size, tp_group)
        self.weight, self.tp_group, self.how = weight[:columns], tp_group, how
        self._wide_weight = wide_copy(self.weight)
        self._held: Tensor | None = None

    def scores(self, hidden: Tensor) -> Tensor:
        """This rank's scores ``[rows, columns]`` of ``hidden`` ``[rows, hidden]``, fp32 (fp64 for
        fp64 inputs); the next call overwrites them.

        Column j is token ``start + j`` and no padding. No collective.
        """
        if self._held is None or len(self._held) < len(hidden):
            dtype = score_dtype(hidden, self.weight)
            rows = max(len(hidden), self.most_rows)
            self._held = hidden.new_empty(rows, len(self.weight), dtype=dtype)
        scores = self._held[: len(hidden)]
        multiply_scores(hidden, self.weight, scores, self._wide_weight)
        return scores

    def draw(self, scores: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """A token ``[rows]`` and its log-prob fp32 for each row of ``scores``."""
        how = self.how
        given = {"vocab_start": self.start, "tp_group": self.tp_group}
        given |= {"temperature": how.temperature}
        if how.greedy:
            return most_probable(scores, **given)
        return sample_tokens(scores, uniforms, top_k=how.top_k, top_p=how.top_p, **given)


def _kernels(logits: Tensor) -> ModuleType | None:
    """``sampling_triton`` for fp32 scores on a GPU with Triton, else None: torch's operations."""
    return _triton() if logits.is_cuda and logits.dtype == torch.float32 else None


@functools.cache
def _triton() -> ModuleType | None:
    """Looked for once, not for each token."""
    if importlib.util.find_spec("triton") is None:
        return None
    from megatron_rmt.rollout import sampling_triton

    return sampling_triton


def _row_chunks(scores: Tensor) -> Iterator[slice]:
    elements = _ELEMENTS_CUDA if scores.is_cuda else _ELEMENTS_CPU
    return slices(len(scores), max(1, elements // scores[0].numel()))


def _weights(scores: Tensor, maxima: Tensor, temperature: float) -> Tensor:
    """exp((scores - maxima) / temperature) as a whole multiple of 2^-34, scaled to integers."""
    exponents = (scores - maxima) * (1.0 / temperature)
    # Below it is 0 anyway; a CPU takes ten times as long where the exponential gets denormal.
    return exponents.clamp(min=_LEAST_EXPONENT).exp().mul(_WEIGHT_SCALE).floor()


@fused
def _weigh(scores: Tensor, maxima: Tensor, temperature: float) -> Tensor:
    """Weights fp32 of one block of each row, `scores` [rows, _BLOCK].

    Always of a whole block: its vector instructions give a column the same weight, bit for bit, in
    whatever block it is computed; for a single number others would be used.
    """
    return _weights(scores, maxima[:, None], temperature)


@fused
def _sums_of_weights(
    scores: Tensor, maxima: Tensor, temperature: float, least: Tensor | None
) -> Tensor:
    """fp64 [rows, blocks]: sums of the weights over [rows, blocks, _BLOCK], of those alone that
    reach `least` [rows] if it is given."""
    weights = _weights(scores, maxima[:, None, None], temperature)
    if least is not None:
        weights = torch.where(weights >= least[:, None, None], weights, 0.0)
    return weights.sum(-1, dtype=torch.float64)


class _Scores(NamedTuple):
    """logits: fp32 [rows, vocab/tp]. maxima: [rows], of the whole vocabulary."""

    logits: Tensor
    maxima: Tensor
    temperature: float
    tp_group: ProcessGroup | None


def _block_sums(scores: _Scores, least: Tensor | None = None) -> Tensor:
    """Sums of the weights of each block of columns: float64 [rows, blocks], exact.

    least: smallest weight [rows] that counts.
    """
    logits, maxima, temperature, _ = scores
    # Compiled, it holds no more than the weights.
    at_once = compiled.is_available() and not logits.is_cuda
    whole = logits.shape[1] // _BLOCK
    parts = [logits[:, : whole * _BLOCK].unflatten(1, (whole, _BLOCK))] if whole else []
    rest = logits[:, whole * _BLOCK :]
    if rest.shape[1]:
        fill = _BLOCK - rest.shape[1]
        parts.append(F.pad(rest, (0, fill), value=-torch.inf)[:, None])
    sums = []
    for part in parts:
        sums_of_rows = [
            _sums_of_weights(
                part[rows], maxima[rows], temperature, None if least is None else least[rows]
            )
            for rows in ([slice(None)] if at_once else _row_chunks(part))
        ]
        sums.append(torch.cat(sums_of_rows))
    return torch.cat(sums, 1)


def _kth_weight(scores: _Scores, k: int) -> Tensor:
    """Weight [rows] of the ``k`` th most probable token."""
    logits, maxima, temperature, tp_group = scores
    largest = logits.topk(min(k, logits.shape[1]), sorted=False).values
    largest = F.pad(largest, (0, k - largest.shape[1]), value=-torch.inf)
    of_all = of_all_ranks(largest, tp_group).transpose(0, 1).flatten(1)
    kth = of_all.topk(k, sorted=False).values.amin(1, keepdim=True)
    block = kth.repeat(1, _BLOCK)
    return _weigh(block, maxima, temperature)[:, 0]


def _nucleus_weight(scores: _Scores, mass: Tensor) -> Tensor:
    """The largest weight [rows] such that the tokens that reach it weigh at least ``mass`` [rows].

    Bisection of the whole numbers up to the largest weight, as a sort of the vocabulary would have
    to gather it: 35 passes over the logits, one all-reduce of [rows] each.
    """
    low = torch.zeros_like(mass)  # reached by all: heavy enough
    high = torch.full_like(mass, _WEIGHT_SCALE + 1)  # reached by none
    for _ in range(int(_WEIGHT_SCALE).bit_length()):
        middle = ((low + high) / 2).floor()
        reached = _block_sums(scores, middle).sum(1)
        reduce_over_ranks(reached, ReduceOp.SUM, scores.tp_group)
        heavy = reached >= mass
        low, high = torch.where(heavy, middle, low), torch.where(heavy, high, middle)
    return low


def sample_tokens(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float,
    vocab_start: int,
    tp_group: ProcessGroup | None,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample one token a row from softmax(logits / temperature) by inverse CDF in two levels.

    The cumulative sum is taken over sums of blocks of 256 columns, then inside the one block that
    the uniform number falls into. The vocabulary is never gathered: tensor parallelism takes one
    all-reduce of the maxima [rows], one all-gather of the shards' sums [tp, rows] and one
    all-reduce of ids and scores, and of what proves that the ranks draw alike, [4, rows]. All sums
    are exact (weights are multiples of 2^-34), so the token does not depend on how the vocabulary
    is split. A token whose probability is below 2^-34 (6e-11) of the most probable one's is never
    drawn.

    Args:
        logits: float32 [rows, vocab/tp], without padded columns; not modified.
        uniforms: float64 [rows] in [0, 1), equal on all tensor-parallel ranks.
        temperature: above 0 (`greedy_tokens` is the limit at 0).
        vocab_start: global id of this rank's first column.
        tp_group: tensor-parallel group in the order of the vocabulary, or None for one rank.
        top_k: draw only from tokens that are at least as probable as the `top_k` th (None: all).
        top_p: and only from the most probable tokens that together have probability `top_p` of
            what `top_k` leaves; a token as probable as the last of them counts with them.

    Returns:
        (int64 [rows] global token ids, float32 [rows] their log-probs), equal on all ranks. The
        log-probs are those of softmax(logits / temperature) before `top_k` and `top_p`, to within
        vocab * 2^-34. A row with NaN or +inf, or with nothing finite, gives an arbitrary id and a
        log-prob that is not finite, without an error (no synchronisation with the device). A
        log-prob of +inf says that the ranks do not draw alike: another uniform number on the rank
        that drew, or not one rank that did.

    Raises:
        ValueError: vocabulary above 2^19.
    """
    rows, columns = logits.shape
    if vocab_start + columns > _MAXIMUM_VOCABULARY:
        raise ValueError(
            f"the vocabulary has {vocab_start + columns} columns or more; at most "
            f"{_MAXIMUM_VOCABULARY} can be summed exactly"
        )
    if rows == 0:
        nothing = torch.empty(0, device=logits.device)
        return nothing.long(), nothing
    kernels = _kernels(logits)
    if kernels is not None:
        return kernels.sample_tokens(
            logits,
            uniforms,
            temperature=temperature,
            vocab_start=vocab_start,
            tp_group=tp_group,
            top_k=top_k,
            top_p=top_p,
        )

    # First level: the cumulative sum over blocks, of the tokens that may be drawn.
    maxima = reduce_over_ranks(logits.amax(1), ReduceOp.MAX, tp_group)
    scores = _Scores(logits, maxima, temperature, tp_group)
    cumulative, offset, total = _block_distribution(scores, None)
    whole, least = total, None
    if top_k is not None:
        least = _kth_weight(scores, top_k)
        cumulative, offset, total = _block_distribution(scores, least)
    if top_p is not None:
        nucleus = _nucleus_weight(scores, top_p * total)
        least = nucleus if least is None else torch.maximum(least, nucleus)
        cumulative, offset, total = _block_distribution(scores, least)

    # The token is the first column whose cumulative sum exceeds this whole number, which is below
    # the total: no uniform number exceeds 1 - 2^-53, so the product does not round up to the total.
    target = (uniforms * total).floor() - offset
    owned = (target >= 0) & (target < cumulative[:, -1])
    target = target.unsqueeze(1)
    block = (cumulative <= target).sum(1, keepdim=True).clamp_(max=cumulative.shape[1] - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_(min=0)), 0.0)
    # Second level: inside the block that the number falls into.
    column = block * _BLOCK + torch.arange(_BLOCK, device=logits.device)
    # Beyond the end the last column repeats, behind every column that the search can stop at.
    weights = _weigh(logits.gather(1, column.clamp(max=columns - 1)), maxima, temperature)
    if least is not None:
        weights.mul_(weights >= least[:, None])
    inside = weights.cumsum(1, dtype=torch.float64)
    step = (inside <= target - before).sum(1).clamp_(max=_BLOCK - 1)
    column = (block.squeeze(1) * _BLOCK + step).clamp_(max=columns - 1)
    # The shard that holds the token tells the others.
    # Ids are below 2^19, so one float64 sum carries them and the scores.
    drawn = torch.stack([column + vocab_start, logits.gather(1, column[:, None])[:, 0]]).double()
    several = tp_group is not None and tp_group.size() > 1
    if several:
        drawn = torch.cat([drawn, uniforms[None], torch.ones_like(uniforms)[None]])
    drawn = reduce_over_ranks(torch.where(owned, drawn, 0.0), ReduceOp.SUM, tp_group)
    log_probs = (drawn[1] - maxima) / temperature - (whole / _WEIGHT_SCALE).log()
    if several:
        alike = (drawn[2] == uniforms) & (drawn[3] == 1)
        log_probs = torch.where(alike | ~log_probs.isfinite(), log_probs, torch.inf)
    return drawn[0].long(), log_probs.float()


def _block_distribution(scores: _Scores, least: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(cumulative sums of this shard's weights [rows, blocks], sum of the weights [rows] of the
    shards before this one, sum over all shards)."""
    cumulative = _block_sums(scores, least).cumsum(1)
    shard_sums = of_all_ranks(cumulative[:, -1], scores.tp_group)
    rank = 0 if scores.tp_group is None else scores.tp_group.rank()
    return cumulative, shard_sums[:rank].sum(0), shard_sums.sum(0)


def greedy_tokens(logits: Tensor, *, vocab_start: int, tp_group: ProcessGroup | None) -> Tensor:
    """The most probable token of each row; the lowest id among ties.

    Args:
        logits: float32 [rows, vocab/tp], without padded columns; not modified.
        vocab_start: global id of this rank's first column.
        tp_group: tensor-parallel group, or None for one rank. Two all-reduces of [rows].

    Returns:
        int64 [rows] global token ids, equal on all ranks.
    """
    return first_with_maximum(logits.argmax(1) + vocab_start, logits.amax(1), tp_group)


def most_probable(
    logits: Tensor, *, temperature: float, vocab_start: int, tp_group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """``greedy_tokens`` and their log-probs fp32 under softmax(logits / temperature)."""
    shard = {"vocab_start": vocab_start, "tp_group": tp_group}
    kernels = _kernels(logits) if len(logits) else None
    if kernels is not None:
        return kernels.most_probable(logits, temperature=temperature, **shard)
    tokens = greedy_tokens(logits, **shard)
    return tokens, token_log_probs(logits, tokens, temperature=temperature, **shard)


def token_log_probs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float,
    vocab_start: int,
    tp_group: ProcessGroup | None,
) -> Tensor:
    """Log-probs fp32 [rows] of global token ids [rows] under softmax(logits / temperature).

    logits as in `sample_tokens`. Collectives: one all-reduce of maxima and one of the stacked sums
    and scores, both [rows]-sized.
    """
    maxima = reduce_over_ranks(logits.amax(1), ReduceOp.MAX, tp_group)
    sums = torch.empty(2, len(tokens), dtype=torch.float32, device=logits.device)
    for chunk in _row_chunks(logits):
        shifted = (logits[chunk] - maxima[chunk, None]).mul_(1.0 / temperature)
        column = (tokens[chunk] - vocab_start)[:, None]
        here = (column >= 0) & (column < logits.shape[1])
        own = shifted.gather(1, column.clamp(0, logits.shape[1] - 1)) * here
        sums[0, chunk], sums[1, chunk] = own[:, 0], shifted.exp_().sum(1)
    reduce_over_ranks(sums, ReduceOp.SUM, tp_group)
    return sums[0] - sums[1].log()
