"""Forest packing: several samples' trees in one micro-batch, spread evenly over the ranks.

Rollouts end at different lengths, so trees differ in size: a micro-batch of one sample may be too
small to keep a GPU busy, and one data-parallel rank may wait for another. After the rollouts the
samples of all data-parallel ranks are dealt out again: to ranks by what their trees cost, in each
rank to micro-batches of at most ``--rmt-max-tokens`` packed tokens. Megatron fixes the number of
micro-batches: those that are left over get a tree of one token that predicts nothing. Where the
samples cannot be kept below the limit (a step's rollouts may be longer than any before), they are
spread over all micro-batches as evenly as they go, and the excess is a metric: no run ends for it.

A sample holds at most ``--seq-length`` tokens: longer documents come as several samples, which are
trained as separate windows, as Megatron's dataset cut them; short ones share a sample. The loss
does not change, since its weights are those of the global batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rmt.rollout.responses import Responses
from megatron_rmt.rollout.trunk import NO_LABEL, Trunk


@dataclass(frozen=True)
class TreeSource:
    """What one tree is grown from, all on the CPU.

    rows: the chosen trunk rows, ascending. responses: of the same positions. advantages:
    ``[positions, group]`` fp32.
    """

    trunk: Trunk
    rows: list[int]
    responses: Responses
    advantages: Tensor

    @property
    def group(self) -> int:
        """Rollouts per position."""
        return self.responses.lengths.shape[1]


def split_samples(source: TreeSource) -> list[TreeSource]:
    """One source for each sample of ``source``, in order."""
    trunk, parts = source.trunk, []
    counts = torch.bincount(trunk.samples).tolist()
    start = position = 0
    for count in counts:
        own = slice(start, start + count)
        rows = [row - start for row in source.rows if start <= row < start + count]
        documents = tuple(
            (first - start, limit - start)
            for first, limit in trunk.documents
            if start <= first < start + count
        )
        parts.append(
            TreeSource(
                Trunk(
                    tokens=trunk.tokens[own],
                    position_ids=trunk.position_ids[own],
                    labels=trunk.labels[own],
                    loss_mask=trunk.loss_mask[own],
                    samples=torch.zeros(count, dtype=torch.int64),
                    columns=trunk.columns[own],
                    document_first=trunk.document_first[own] - start,
                    documents=documents,
                ),
                rows,
                source.responses.positions(position, position + len(rows)),
                source.advantages[position : position + len(rows)],
            )
        )
        start += count
        position += len(rows)
    return parts


def join_samples(sources: Sequence[TreeSource]) -> TreeSource:
    """One source that holds all samples of ``sources`` (at least one), in order."""
    trunks = [source.trunk for source in sources]
    starts, samples = [0], [0]
    for trunk in trunks:
        starts.append(starts[-1] + len(trunk))
        samples.append(samples[-1] + int(trunk.samples[-1]) + 1)

    def joined(name: str, offsets: Sequence[int] | None = None) -> Tensor:
        values = [getattr(trunk, name) for trunk in trunks]
        if offsets is not None:
            values = [value + offset for value, offset in zip(values, offsets, strict=False)]
        return torch.cat(values)

    trunk = Trunk(
        tokens=joined("tokens"),
        position_ids=joined("position_ids"),
        labels=joined("labels"),
        loss_mask=joined("loss_mask"),
        samples=joined("samples", samples),
        columns=joined("columns"),
        document_first=joined("document_first", starts),
        documents=tuple(
            (first + start, limit + start)
            for own, start in zip(trunks, starts, strict=False)
            for first, limit in own.documents
        ),
    )
    rows = [row + start for own, start in zip(sources, starts, strict=False) for row in own.rows]
    longest = max(source.responses.tokens.shape[2] for source in sources)

    def padded(name: str) -> Tensor:
        values = [getattr(source.responses, name) for source in sources]
        missing = [longest - value.shape[2] for value in values]
        return torch.cat(
            [torch.nn.functional.pad(v, (0, n)) for v, n in zip(values, missing, strict=True)]
        )

    responses = Responses(
        tokens=padded("tokens"),
        lengths=torch.cat([source.responses.lengths for source in sources]),
        drawn=padded("drawn"),
        log_probs=padded("log_probs"),
    )
    return TreeSource(trunk, rows, responses, torch.cat([s.advantages for s in sources]))


def empty_source(group: int) -> TreeSource:
    """One token of no sample (-1) that predicts nothing, for a micro-batch without samples."""
    zero = torch.zeros(1, dtype=torch.int64)
    trunk = Trunk(
        tokens=zero,
        position_ids=zero,
        labels=torch.full((1,), NO_LABEL),
        loss_mask=torch.zeros(1),
        samples=zero - 1,
        columns=zero - 1,
        document_first=zero,
        documents=((0, 1),),
    )
    nothing = torch.zeros(0, group, 0)
    lengths = torch.zeros(0, group, dtype=torch.int64)
    responses = Responses(nothing.long(), lengths, nothing.bool(), nothing)
    return TreeSource(trunk, [], responses, torch.zeros(0, group))


@dataclass(frozen=True)
class TreeSize:
    """Of one tree: packed tokens, (query, key) pairs that see each other, rows of the head."""

    tokens: int
    pairs: int
    predictions: int


def tree_size(source: TreeSource, stem_length: int) -> TreeSize:
    """Size of the tree that ``source`` grows into, with stems of ``stem_length`` tokens."""
    trunk = source.trunk
    tokens = len(trunk)
    pairs = sum(_triangle(limit - first) for first, limit in trunk.documents)
    for index, row in enumerate(source.rows):
        seen = row + 1 - int(trunk.document_first[row])
        tokens += stem_length
        pairs += stem_length * seen + _triangle(stem_length)
        for length in source.responses.lengths[index].tolist():
            branch = max(0, length - 1)
            tokens += branch
            pairs += branch * (seen + stem_length) + _triangle(branch)
    labelled = int(((trunk.labels != NO_LABEL) & (trunk.loss_mask > 0)).sum())
    predictions = labelled - len(source.rows) + int(source.responses.lengths.sum())
    return TreeSize(tokens, pairs, predictions)


def _triangle(count: int) -> int:
    return count * (count + 1) // 2


@dataclass(frozen=True)
class TreeCost:
    """Floating-point operations of a forward pass, all layers: of one token, of one pair, of one
    row of the head."""

    token: int
    pair: int
    prediction: int

    def of(self, size: TreeSize) -> int:
        """Of a whole tree, by which trees are balanced; backward takes twice as much again."""
        return (
            self.token * size.tokens + self.pair * size.pairs + self.prediction * size.predictions
        )


def tree_cost(config: Any, vocab_size: int) -> TreeCost:
    """Cost of trees of a model with Megatron's ``TransformerConfig``; every layer counts alike."""
    heads = config.num_attention_heads * config.kv_channels
    key_heads = (config.num_query_groups or config.num_attention_heads) * config.kv_channels
    width = config.ffn_hidden_size
    if config.num_moe_experts:
        width = config.moe_router_topk * config.moe_ffn_hidden_size
        width += config.moe_shared_expert_intermediate_size or 0
    matrices = config.hidden_size * (
        2 * heads + 2 * key_heads + (3 if config.gated_linear_unit else 2) * width
    )
    return TreeCost(
        token=2 * matrices * config.num_layers,
        pair=4 * heads * config.num_layers,
        prediction=2 * config.hidden_size * vocab_size,
    )


def deal_out(
    sizes: Sequence[TreeSize],
    costs: Sequence[int],
    *,
    ranks: int,
    micro_batches: int,
    max_tokens: int,
    use_all: bool,
) -> list[list[list[int]]]:
    """Which samples each micro-batch of each data-parallel rank gets: ``[rank][micro-batch]``.

    Greedy, longest first, equals in order: a sample goes to the rank with the least cost so far,
    then in its rank to the micro-batch with the fewest tokens. A rank uses as few micro-batches as
    keep within ``max_tokens``, or all of them if ``use_all`` (pipeline stages pad micro-batches to
    one size, so that they had better be alike) or if no number does. In each rank the largest comes
    first, so that ranks that meet in every micro-batch (experts) have like work.
    """
    by_cost = sorted(range(len(sizes)), key=lambda sample: (-costs[sample], sample))
    of_ranks = _spread(by_cost, costs, ranks)
    result = []
    for own in of_ranks:
        tokens = [size.tokens for size in sizes]
        by_tokens = sorted(own, key=lambda sample: (-tokens[sample], sample))
        total = sum(tokens[sample] for sample in own)
        count = micro_batches if use_all else min(micro_batches, max(1, -(-total // max_tokens)))
        parts = _spread(by_tokens, tokens, count)
        while count < micro_batches and _most(parts, tokens) > max_tokens:
            count += 1
            parts = _spread(by_tokens, tokens, count)
        parts.sort(key=lambda part: (-sum(tokens[sample] for sample in part), part))
        result.append([sorted(part) for part in parts] + [[]] * (micro_batches - count))
    return result


def _spread(samples: Sequence[int], weights: Sequence[int], parts: int) -> list[list[int]]:
    """Each of ``samples`` in turn to the part with the least weight, the first of equals."""
    result: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for sample in samples:
        least = loads.index(min(loads))
        result[least].append(sample)
        loads[least] += weights[sample]
    return result


def _most(parts: Sequence[Sequence[int]], tokens: Sequence[int]) -> int:
    return max(sum(tokens[sample] for sample in part) for part in parts)


def repack(
    sources: Sequence[TreeSource],
    cost: TreeCost,
    *,
    stem_length: int,
    max_tokens: int,
    use_all: bool,
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[TreeSource]:
    """The sources of this rank's micro-batches after all ranks' samples were dealt out again.

    Collective over the data-parallel ``group``, where every rank has as many ``sources``: one
    all-gather of four integers per sample and one all-to-all of about 5 integers per trunk token
    and 3 per response token, int32.
    """
    samples = [sample for source in sources for sample in split_samples(source)]
    rollouts = sources[0].group
    sent = [to_integers(sample) for sample in samples]
    own_sizes = torch.tensor(
        [
            [size.tokens, size.pairs, size.predictions, len(integers)]
            for size, integers in (
                (tree_size(sample, stem_length), integers)
                for sample, integers in zip(samples, sent, strict=True)
            )
        ],
        dtype=torch.int64,
        device=device,
    )
    ranks, rank = group.size(), group.rank()
    gathered = [torch.empty_like(own_sizes) for _ in range(ranks)]
    dist.all_gather(gathered, own_sizes, group=group)
    table = torch.cat(gathered).tolist()
    sizes = [TreeSize(*row[:3]) for row in table]
    dealt = deal_out(
        sizes,
        [cost.of(size) for size in sizes],
        ranks=ranks,
        micro_batches=len(sources),
        max_tokens=max_tokens,
        use_all=use_all,
    )
    per_rank = len(samples)
    goes_to = {
        sample: receiver
        for receiver, parts in enumerate(dealt)
        for part in parts
        for sample in part
    }
    lengths = [row[3] for row in table]
    outgoing = [
        [sample for sample in range(rank * per_rank, (rank + 1) * per_rank) if goes_to[sample] == r]
        for r in range(ranks)
    ]
    incoming = [
        [s for s in range(r * per_rank, (r + 1) * per_rank) if goes_to[s] == rank]
        for r in range(ranks)
    ]
    out = torch.cat(
        [sent[s - rank * per_rank] for part in outgoing for s in part]
        or [torch.empty(0, dtype=torch.int32)]
    ).to(device)
    arrived = [sample for part in incoming for sample in part]
    into = torch.empty(sum(lengths[s] for s in arrived), dtype=torch.int32, device=device)
    dist.all_to_all_single(
        into,
        out,
        [sum(lengths[s] for s in part) for part in incoming],
        [sum(lengths[s] for s in part) for part in outgoing],
        group=group,
    )
    pieces = into.cpu().split([lengths[s] for s in arrived])
    received = {
        sample: from_integers(piece, rollouts)
        for sample, piece in zip(arrived, pieces, strict=True)
    }
    return [
        join_samples([received[sample] for sample in part]) if part else empty_source(rollouts)
        for part in dealt[rank]
    ]


def to_integers(sample: TreeSource) -> Tensor:
    """One sample as one int32 tensor; fp32 numbers as their bits."""
    trunk, responses = sample.trunk, sample.responses
    real = torch.arange(responses.tokens.shape[2]) < responses.lengths[..., None]
    fields = [
        torch.tensor([len(trunk), len(trunk.documents), len(sample.rows)]),
        torch.tensor(trunk.documents).flatten(),
        torch.tensor(sample.rows, dtype=torch.int64),
        trunk.tokens,
        trunk.position_ids,
        trunk.labels,
        trunk.columns,
        _bits(trunk.loss_mask),
        responses.lengths.flatten(),
        responses.tokens[real],
        responses.drawn[real],
        _bits(responses.log_probs[real]),
        _bits(sample.advantages).flatten(),
    ]
    return torch.cat([field.to(torch.int32) for field in fields])


def from_integers(integers: Tensor, group: int) -> TreeSource:
    """The sample that ``to_integers`` wrote, with ``group`` rollouts per position."""
    taken = 0

    def take(count: int) -> Tensor:
        nonlocal taken
        taken += count
        return integers[taken - count : taken]

    rows, documents, positions = take(3).tolist()
    bounds = take(2 * documents).view(documents, 2)
    chosen = take(positions).tolist()
    tokens, position_ids, labels, columns = (take(rows).long() for _ in range(4))
    loss_mask = take(rows).view(torch.float32)
    lengths = take(positions * group).long().view(positions, group)
    total = int(lengths.sum())
    shape = (positions, group, int(lengths.max()) if positions else 0)
    real = torch.arange(shape[2]) < lengths[..., None]

    def scattered(values: Tensor) -> Tensor:
        result = values.new_zeros(shape)
        result[real] = values
        return result

    responses = Responses(
        tokens=scattered(take(total).long()),
        lengths=lengths,
        drawn=scattered(take(total).bool()),
        log_probs=scattered(take(total).view(torch.float32)),
    )
    trunk = Trunk(
        tokens=tokens,
        position_ids=position_ids,
        labels=labels,
        loss_mask=loss_mask,
        samples=torch.zeros(rows, dtype=torch.int64),
        columns=columns,
        document_first=bounds[:, 0].long().repeat_interleave(bounds[:, 1] - bounds[:, 0]),
        documents=tuple((first, limit) for first, limit in bounds.tolist()),
    )
    advantages = take(positions * group).view(torch.float32).view(positions, group)
    return TreeSource(trunk, chosen, responses, advantages)


def _bits(values: Tensor) -> Tensor:
    return values.float().contiguous().view(torch.int32)
