"""Attention of generation, over stored keys and values, against dense attention in float64."""

import math

import pytest
import torch
from torch import Tensor

from megatron_rmt.model.blocks import Block
from megatron_rmt.model.layer_attention import LayerAttention
from megatron_rmt.rollout.kv_cache import (
    DecodeVisibility,
    KeyValueStore,
    StemVisibility,
    TailCache,
    TrunkVisibility,
    shared_trunks,
)
from megatron_rmt.rollout.live_rollouts import RolloutPosition

HEADS, KV_HEADS, WIDTH = 4, 2, 8
SCALE = 0.3
SINK = torch.tensor([-1.5, 0.25, 3.0, 9.0], dtype=torch.float64)


def _qkv(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(tokens, heads, WIDTH, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def _dense(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, sink: Tensor | None = None
) -> Tensor:
    """Softmax attention written out: ``[queries, heads, width]``, visible ``[queries, keys]``."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * SCALE
    scores = scores.masked_fill(~visible, -math.inf)
    if sink is not None:
        scores = torch.cat([scores, sink[:, None, None].expand(-1, len(query), -1)], dim=-1)
    weights = scores.softmax(-1)[..., : len(key)]
    return torch.einsum("hqk,khd->qhd", weights, value)


def _close(value: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-13)


def _stored_trunk(trunk_tokens: int, layers: tuple[int, ...] = (1,)) -> tuple[KeyValueStore, dict]:
    """A store filled in two micro-batches, and its keys and values per layer."""
    store, contents = KeyValueStore(trunk_tokens), {}
    first = trunk_tokens // 3
    for layer in layers:
        query, key, value = _qkv(trunk_tokens, seed=layer)
        for start, limit in ((0, first), (first, trunk_tokens)):
            visibility = TrunkVisibility(
                tokens=limit - start,
                blocks=(Block(0, limit - start),),
                store=store,
                first_row=start,
            )
            rows = slice(start, limit)
            output = visibility.attend(
                LayerAttention(layer, SCALE), query[rows], key[rows], value[rows]
            )
            causal = torch.ones(limit - start, limit - start, dtype=torch.bool).tril()
            _close(output, _dense(query[rows], key[rows], value[rows], causal))
        contents[layer] = (key, value)
    return store, contents


def test_the_trunk_pass_attends_and_keeps_keys_and_values_of_each_layer():
    store, contents = _stored_trunk(12, layers=(1, 2))
    for layer, (key, value) in contents.items():
        assert torch.equal(store.trunk[layer][0].transpose(0, 1), key)
        assert torch.equal(store.trunk[layer][1].transpose(0, 1), value)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("window", "sink"),
    [(None, None), (None, SINK), (0, SINK), *((w, None) for w in (0, 1, 2, 3, 6))],
)
def test_stems_and_decoding_equal_dense_attention_also_after_rollouts_have_left(
    window: int | None, sink: Tensor | None
):
    """Three positions of two samples, groups of two, three steps; rollouts leave in between."""
    layer = LayerAttention(1, SCALE, window, sink)
    nearest = len if window is None else lambda keys: window + 1
    store, contents = _stored_trunk(12)
    trunk_key, trunk_value = contents[1]
    visible, stem, group = [(0, 3), (2, 4), (4, 11)], 2, 2
    tails = TailCache(stem + 3)

    query, key, value = _qkv(len(visible) * stem, seed=7)
    positions = [
        RolloutPosition(sample=sample, column=0, first=first, limit=limit, next_position=0)
        for sample, (first, limit) in zip([0, 0, 1], visible, strict=True)
    ]
    visibility = StemVisibility(
        tokens=len(query),
        store=store,
        tails=tails,
        trunks=shared_trunks(positions),
        group=group,
    )
    output = visibility.attend(layer, query, key, value)
    contexts = []
    for index, (first, limit) in enumerate(visible):
        rows = slice(index * stem, (index + 1) * stem)
        keys = torch.cat([trunk_key[first:limit], key[rows]])
        values = torch.cat([trunk_value[first:limit], value[rows]])
        seen = torch.ones(stem, limit - first + stem).tril(limit - first).bool()
        seen = seen.triu(limit - first + 1 - nearest(keys))
        _close(output[rows], _dense(query[rows], keys, values, seen, sink))
        contexts += [(keys, values)] * group

    batch = torch.arange(len(visible) * group)
    for step, staying in enumerate([[0, 1, 2, 5, 4], [2, 1, 3, 4], None]):
        query, key, value = _qkv(len(batch), seed=20 + step)
        for row, rollout in enumerate(batch.tolist()):
            keys, values = contexts[rollout]
            keys, values = torch.cat([keys, key[row, None]]), torch.cat([values, value[row, None]])
            contexts[rollout] = (keys, values)
        visibility = DecodeVisibility(
            tokens=len(batch),
            store=store,
            tails=tails,
            trunks=shared_trunks([positions[row] for row in (batch // group).tolist()]),
            column=stem + step,
        )
        output = visibility.attend(layer, query, key, value)
        for row, rollout in enumerate(batch.tolist()):
            keys, values = contexts[rollout]
            keys, values = (x[-nearest(keys) :] for x in (keys, values))
            everything = torch.ones(1, len(keys), dtype=torch.bool)
            reference = _dense(query[row, None], keys, values, everything, sink)
            _close(output[row, None], reference)
        if staying is not None:
            tails.keep(staying)
            batch = batch[staying]
