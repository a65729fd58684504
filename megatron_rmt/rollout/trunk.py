"""The trunk: the samples of one micro-batch, end to end in one packed sequence.

``UserBatch`` is a micro-batch as the user's job gave it; ``build_trunk`` makes a ``Sample`` of each
of its rows and marks the documents in it. A trunk is a list of samples.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rmt.model.blocks import Block

NO_LABEL = -1


@dataclass(frozen=True)
class UserBatch:
    """One micro-batch as the user's forward step gave it to the model, each
    ``[micro-batch, sequence]``, on the CPU: int64 tokens, position_ids, labels; fp32 loss_mask."""

    tokens: Tensor
    position_ids: Tensor
    labels: Tensor
    loss_mask: Tensor


@dataclass(frozen=True)
class Sample:
    """One sample of the user's data, in rows of a trunk. All tensors ``[rows]``, on the CPU.

    index: of the sample in the whole run, the key of its draws. tokens: int64 token ids.
    position_ids: int64 rotary positions. labels: int64, the token that follows, ``NO_LABEL`` where
    none is known. loss_mask: fp32 weight of each row in the NTP loss. columns: int64 index in the
    user's sample, -1 in a prompt's preamble. documents: (first, limit) rows of each document, its
    preamble included.
    """

    index: int
    tokens: Tensor
    position_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    columns: Tensor
    documents: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def labelled(self) -> Tensor:
        """``[rows]`` bool: rows whose prediction counts."""
        return (self.labels != NO_LABEL) & (self.loss_mask > 0)

    def document_of(self, row: int) -> tuple[int, int]:
        """(first, limit) rows of the document that ``row`` is in."""
        return next((first, limit) for first, limit in self.documents if first <= row < limit)

    def place(self, row: int) -> str:
        """Where ``row`` is, for people: sample, document in it, token of the sample; from 0."""
        document = self.documents.index(self.document_of(row))
        return f"sample {self.index}, document {document} in it, token {int(self.columns[row])}"


def build_trunk(
    batch: UserBatch,
    indices: Sequence[int],
    *,
    preamble: Sequence[int],
    end_of_document: int,
    separate_documents: bool,
) -> list[Sample]:
    """The samples of one micro-batch, whose numbers in the whole run are ``indices``.

    preamble: token ids put before each document (each sample, if documents are not separate).
    separate_documents: documents do not see each other, as Megatron's ``--reset-attention-mask``;
    a document ends with its ``end_of_document`` token.
    """
    before = torch.tensor(list(preamble), dtype=torch.int64)
    length = batch.tokens.shape[1]
    trunk = []
    for index, tokens, position_ids, labels, loss_mask in zip(
        indices, batch.tokens, batch.position_ids, batch.labels, batch.loss_mask, strict=True
    ):
        starts = [0]
        if separate_documents:
            ends = (tokens == end_of_document).nonzero()[:, 0] + 1
            starts += [end for end in ends.tolist() if end < length]
        columns, positions, documents, rows = [], [], [], 0
        for start, limit in itertools.pairwise([*starts, length]):
            columns += [torch.full_like(before, -1), torch.arange(start, limit)]
            positions += [position_ids[start] + torch.arange(len(before))]
            positions += [position_ids[start:limit] + len(before)]
            documents.append((rows, rows + len(before) + limit - start))
            rows = documents[-1][1]
        columns = torch.cat(columns)
        in_preamble = columns < 0
        trunk.append(
            Sample(
                index,
                tokens=tokens[columns].masked_scatter(in_preamble, before.repeat(len(documents))),
                position_ids=torch.cat(positions),
                labels=labels[columns].masked_fill(in_preamble, NO_LABEL),
                loss_mask=loss_mask[columns].float().masked_fill(in_preamble, 0.0),
                columns=columns,
                documents=tuple(documents),
            )
        )
    return trunk


def first_rows(trunk: Sequence[Sample]) -> list[int]:
    """The row of the trunk at which each sample begins."""
    return list(itertools.accumulate([0, *map(len, trunk)]))[:-1]


def trunk_blocks(trunk: Sequence[Sample]) -> list[Block]:
    """One causal block per document."""
    return [
        Block(start + first, start + limit)
        for sample, start in zip(trunk, first_rows(trunk), strict=True)
        for first, limit in sample.documents
    ]
