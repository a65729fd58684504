"""Trunks and responses as whole tensors, as references want them, and trees grown from these."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_rmt.rollout.responses import Rollout
from megatron_rmt.rollout.trunk import Sample, UserBatch, first_rows
from megatron_rmt.rollout.trunk import build_trunk as build_samples
from megatron_rmt.update import tree
from megatron_rmt.update.tree import ChosenPosition, ReasonedSample, Tree


@dataclasses.dataclass
class Trunk:
    """Samples end to end: the fields of ``Sample`` ``[rows]``, and of each row the sample and the
    first row of its document."""

    tokens: Tensor
    position_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    columns: Tensor
    samples: Tensor
    document_first: Tensor
    documents: tuple[tuple[int, int], ...]
    indices: list[int]

    def __len__(self) -> int:
        return len(self.tokens)

    def split(self) -> list[Sample]:
        """The samples, with the values that the tensors hold now."""
        found = []
        for number, index in enumerate(self.indices):
            own = (self.samples == number).nonzero()[:, 0]
            first, limit = int(own[0]), int(own[-1]) + 1
            names = ("tokens", "position_ids", "labels", "loss_mask", "columns")
            fields = {name: getattr(self, name)[first:limit] for name in names}
            documents = [(a - first, b - first) for a, b in self.documents if first <= a < limit]
            found.append(Sample(index, **fields, documents=tuple(documents)))
        return found


def packed(samples: Sequence[Sample]) -> Trunk:
    """``samples`` end to end."""
    names = ("tokens", "position_ids", "labels", "loss_mask", "columns")
    documents = [
        (start + first, start + limit)
        for sample, start in zip(samples, first_rows(samples), strict=True)
        for first, limit in sample.documents
    ]
    return Trunk(
        **{name: torch.cat([getattr(sample, name) for sample in samples]) for name in names},
        samples=torch.arange(len(samples)).repeat_interleave(torch.tensor([*map(len, samples)])),
        document_first=torch.cat([torch.full((b - a,), a) for a, b in documents]),
        documents=tuple(documents),
        indices=[sample.index for sample in samples],
    )


def build_trunk(
    tokens: Tensor, position_ids: Tensor, labels: Tensor, loss_mask: Tensor, **how: Any
) -> Trunk:
    """``trunk.build_trunk``'s samples, numbered from 7, end to end."""
    batch = UserBatch(tokens, position_ids, labels, loss_mask)
    return packed(build_samples(batch, range(7, 7 + len(tokens)), **how))


@dataclasses.dataclass(frozen=True)
class Responses:
    """Rollouts padded to one length: tokens, drawn, log_probs ``[positions, group, longest]``,
    lengths ``[positions, group]``."""

    tokens: Tensor
    lengths: Tensor
    drawn: Tensor
    log_probs: Tensor

    def positions(self, first: int, limit: int) -> "Responses":
        """The responses of positions ``[first, limit)``."""
        return Responses(*(value[first:limit] for value in vars(self).values()))

    def split(self) -> list[list[Rollout]]:
        """``[positions][group]``."""
        return [
            [
                Rollout(*(value[:length].numpy() for value in values))
                for *values, length in zip(tokens, drawn, log_probs, lengths.tolist(), strict=True)
            ]
            for tokens, drawn, log_probs, lengths in zip(
                self.tokens, self.drawn, self.log_probs, self.lengths, strict=True
            )
        ]


def reasoned(
    trunk: Trunk,
    rows: Sequence[int],
    responses: Responses | None,
    stem: Sequence[int] = (3,),
    budget: int = 4,
) -> list[ReasonedSample]:
    """The samples of ``trunk``; ``rows`` of the trunk are chosen, with these responses."""
    groups = itertools.repeat([]) if responses is None else responses.split()
    found = [ReasonedSample(sample) for sample in trunk.split()]
    starts = first_rows([of.sample for of in found])
    for row, group in zip(rows, groups, strict=responses is not None):
        number = int(trunk.samples[row])
        own = row - starts[number]
        found[number].positions.append(ChosenPosition(own, budget, stem, group))
    return found


def grow_tree(
    trunk: Trunk, rows: Sequence[int], stem: Sequence[int], responses: Responses | None, **how: Any
) -> Tree:
    """``update.tree.grow_tree`` of ``reasoned``."""
    return tree.grow_tree(reasoned(trunk, rows, responses, stem), **how)
