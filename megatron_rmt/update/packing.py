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

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_rmt.update.tree import ReasonedSample


class TreeSize(NamedTuple):
    """Of one tree: packed tokens, (query, key) pairs that see each other, rows of the head."""

    tokens: int
    pairs: int
    predictions: int


def tree_size(of: ReasonedSample) -> TreeSize:
    """Size of the tree that one sample grows into."""
    sample = of.sample
    tokens = len(sample)
    pairs = sum(_triangle(limit - first) for first, limit in sample.documents)
    predictions = int(sample.labelled.sum()) - len(of.positions)
    for position in of.positions:
        seen = position.row + 1 - sample.document_of(position.row)[0]
        stem = len(position.stem)
        tokens += stem
        pairs += stem * seen + _triangle(stem)
        for rollout in position.rollouts:
            branch = max(0, len(rollout) - 1)
            tokens += branch
            pairs += branch * (seen + stem) + _triangle(branch)
            predictions += len(rollout)
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


def tree_cost(config: Any, vocab_size: int, pattern: str | None = None) -> TreeCost:
    """Cost of trees of a model with Megatron's ``TransformerConfig``; every layer counts alike, and
    with the ``pattern`` of a hybrid stack every one of a kind."""
    width = config.ffn_hidden_size
    if config.num_moe_experts:
        width = config.moe_router_topk * config.moe_ffn_hidden_size
        width += config.moe_shared_expert_intermediate_size or 0
    attentions = mlps = config.num_layers
    mixers = 0
    if pattern is not None:
        attentions, mlps, mixers = (pattern.count(kind) for kind in "*-M")
    attention, pair = _attention_cost(config)
    mlp = config.hidden_size * (3 if config.gated_linear_unit else 2) * width
    token = 2 * (attentions * attention + mlps * mlp)
    if mixers:
        token += mixers * _mixer_operations(config)
    return TreeCost(
        token=token,
        pair=2 * pair * attentions,
        prediction=2 * config.hidden_size * vocab_size,
    )


def _attention_cost(config: Any) -> tuple[int, int]:
    """Multiplications of one layer's attention: by its weights for a token, and for a pair."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if not config.multi_latent_attention:
        query = heads * config.kv_channels
        key = (config.num_query_groups or heads) * config.kv_channels
        return hidden * (2 * query + 2 * key), 2 * query
    rank, rotated = config.kv_lora_rank, config.qk_pos_emb_head_dim
    query, value = heads * (config.qk_head_dim + rotated), heads * config.v_head_dim
    down = hidden * (rank + rotated) + rank * (heads * config.qk_head_dim + value)
    to_query = hidden * query
    if config.q_lora_rank:
        to_query = config.q_lora_rank * (hidden + query)
    return down + to_query + hidden * value, query + value


def _mixer_operations(config: Any) -> int:
    """Of one token in a Mamba layer: its two products, and what goes into its states and out."""
    width = config.mamba_head_dim
    heads = config.mamba_num_heads or 2 * config.hidden_size // width
    state, shared = config.mamba_state_dim, config.mamba_num_groups * config.mamba_state_dim
    projected = 3 * heads * width + 2 * shared + heads
    return 2 * config.hidden_size * projected + 4 * heads * width * state


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
    tokens = [size.tokens for size in sizes]
    result = []
    for own in _spread(by_cost, costs, ranks):
        by_tokens = sorted(own, key=lambda sample: (-tokens[sample], sample))
        total = sum(tokens[sample] for sample in own)
        least = micro_batches if use_all else min(micro_batches, max(1, -(-total // max_tokens)))
        for count in range(least, micro_batches + 1):
            parts = _spread(by_tokens, tokens, count)
            if all(sum(tokens[sample] for sample in part) <= max_tokens for part in parts):
                break
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


def repack(
    micro_batches: Sequence[Sequence[ReasonedSample]],
    cost: TreeCost,
    *,
    max_tokens: int,
    use_all: bool,
    dp_group: dist.ProcessGroup,
    device: torch.device,
) -> list[list[ReasonedSample]]:
    """This rank's micro-batches after all ranks' samples were dealt out again; some may be empty.

    Collective over the data-parallel ``dp_group``, where every rank has as many micro-batches and
    samples: one all-gather of four integers per sample and one all-to-all of their bytes, about 36
    per trunk token, 13 per response token and 160 per response.
    """
    samples = [sample for micro_batch in micro_batches for sample in micro_batch]
    sent = [pickle.dumps(sample) for sample in samples]
    own = torch.tensor(
        [[*tree_size(sample), len(content)] for sample, content in zip(samples, sent, strict=True)],
        dtype=torch.int64,
        device=device,
    )
    ranks, rank = dp_group.size(), dp_group.rank()
    gathered = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(gathered, own, group=dp_group)
    table = torch.cat(gathered).tolist()
    sizes = [TreeSize(*row[:3]) for row in table]
    dealt = deal_out(
        sizes,
        [cost.of(size) for size in sizes],
        ranks=ranks,
        micro_batches=len(micro_batches),
        max_tokens=max_tokens,
        use_all=use_all,
    )
    # Samples are numbered over all ranks, those of one rank in a row.
    first = rank * len(samples)
    of_rank = [range(r * len(samples), (r + 1) * len(samples)) for r in range(ranks)]
    receives = [sorted(sample for part in parts for sample in part) for parts in dealt]
    outgoing = [[sample for sample in to if sample in of_rank[rank]] for to in receives]
    incoming = [[sample for sample in receives[rank] if sample in own] for own in of_rank]
    content = b"".join(sent[sample - first] for part in outgoing for sample in part)
    lengths = [row[3] for row in table]
    arrived = [sample for part in incoming for sample in part]
    into = torch.empty(sum(lengths[s] for s in arrived), dtype=torch.uint8, device=device)
    dist.all_to_all_single(
        into,
        torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device) if content else into[:0],
        [sum(lengths[s] for s in part) for part in incoming],
        [sum(lengths[s] for s in part) for part in outgoing],
        group=dp_group,
    )
    pieces = into.cpu().split([lengths[s] for s in arrived])
    received = {
        sample: pickle.loads(piece.numpy().tobytes())
        for sample, piece in zip(arrived, pieces, strict=True)
    }
    return [[received[sample] for sample in part] for part in dealt[rank]]
