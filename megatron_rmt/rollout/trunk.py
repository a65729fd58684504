"""The trunk: the samples of one micro-batch, end to end in one packed sequence.

``UserBatch`` is a micro-batch as the user's job gave it; ``build_trunk`` makes a ``Sample`` of each
of its rows and marks the documents in it. A trunk is a list of samples.

What is text is said here alone. A row counts (``Sample.labelled``) if the job weighs its prediction
and its label is a token. Whatever does not count (loss mask 0, a label of -100 or of no token,
padding) is context for what follows and no more: it is not chosen, no true text runs across it, and
no prompt stands before it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rmt.model.blocks import Block
from megatron_rmt.prompt.pieces import before_document

NO_LABEL = -1


@dataclass(frozen=True)
class UserBatch:
    """One micro-batch as the user's forward step gave it to the model, each
    ``[micro-batch, sequence]``, on the CPU: int64 tokens, position_ids, labels; fp32 loss_mask.
    plain: whether each sample trains on its next tokens alone; empty for none."""

    tokens: Tensor
    position_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    plain: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One sample of the user's data, in rows of a trunk. All tensors ``[rows]``, on the CPU.

    index: of the sample in the whole run, the key of its draws. tokens: int64 token ids.
    position_ids: int64 rotary positions. labels: int64, the token that follows, negative where none
    is known. loss_mask: fp32 weight of each row in the NTP loss. columns: int64 index in the
    user's sample, -1 in a prompt's preamble. documents: (first, limit) rows of each document, its
    preamble included; padding stands in the document before it, or by itself. plain: no position
    of it is chosen, and no preamble stands before it.
    """

    index: int
    tokens: Tensor
    position_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    columns: Tensor
    documents: tuple[tuple[int, int], ...]
    plain: bool = False

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def labelled(self) -> Tensor:
        """``[rows]`` bool: rows whose prediction counts."""
        return _counts(self.labels, self.loss_mask)

    def true_tokens(self, row: int, most: int) -> list[int]:
        """At most ``most`` of the tokens that follow ``row``: to the end of its document, or to the
        first that does not count, such as a turn of a dialogue that the loss mask leaves out."""
        own = slice(row, min(self.document_of(row)[1], row + most))
        counted = int(_counts(self.labels[own], self.loss_mask[own]).long().cumprod(0).sum())
        return self.labels[own][:counted].tolist()

    def document_of(self, row: int) -> tuple[int, int]:
        """(first, limit) rows of the document that ``row`` is in."""
        return next((first, limit) for first, limit in self.documents if first <= row < limit)

    def place(self, row: int) -> str:
        """Where ``row`` is, for people: sample, document in it, token of the sample; from 0."""
        document = self.documents.index(self.document_of(row))
        return f"sample {self.index}, document {document} in it, token {int(self.columns[row])}"


def _counts(labels: Tensor, loss_mask: Tensor) -> Tensor:
    """Bool: the label is known and the job weighs its prediction."""
    return (labels >= 0) & (loss_mask > 0)


def build_trunk(
    batch: UserBatch,
    indices: Sequence[int],
    *,
    preamble: Sequence[int],
    end_of_document: int,
    separate_documents: bool,
    vocab_size: int | None = None,
    begin: Sequence[int] = (),
) -> list[Sample]:
    """The samples of one micro-batch, whose numbers in the whole run are ``indices``.

    preamble: token ids put before each document (each sample, if documents are not separate), but
    neither before padding nor in plain samples. separate_documents: documents do not see each
    other, as Megatron's ``--reset-attention-mask``; a document ends with its ``end_of_document``
    token. vocab_size: labels from it on, like negative ones, become ``NO_LABEL``. begin: token ids
    that begin a text, of which a document's own give way to the preamble's.
    """
    unknown = batch.labels < 0
    if vocab_size is not None:
        unknown |= batch.labels >= vocab_size
    trunk = []
    for index, plain, tokens, position_ids, labels, loss_mask in zip(
        indices,
        batch.plain or itertools.repeat(False, len(indices)),
        batch.tokens,
        batch.position_ids,
        batch.labels.masked_fill(unknown, NO_LABEL),
        batch.loss_mask,
        strict=True,
    ):
        counts = _counts(labels, loss_mask)
        columns, positions, documents, befores, rows = [], [], [], [], 0
        for start, limit, is_text in _spans(
            tokens, labels, counts, end_of_document if separate_documents else None
        ):
            before, dropped = [], 0
            if is_text:
                before, dropped = before_document(
                    () if plain else preamble, begin, tokens[start:limit].tolist()
                )
            befores += before
            own = start + dropped
            columns += [torch.full((len(before),), -1), torch.arange(own, limit)]
            positions += [position_ids[start] + torch.arange(len(before))]
            positions += [position_ids[own:limit] - dropped + len(before)]
            documents.append((rows, rows + len(before) + limit - own))
            rows = documents[-1][1]
        columns = torch.cat(columns)
        in_preamble = columns < 0
        trunk.append(
            Sample(
                index,
                tokens=tokens[columns].masked_scatter(in_preamble, torch.tensor(befores).long()),
                position_ids=torch.cat(positions),
                labels=labels[columns].masked_fill(in_preamble, NO_LABEL),
                loss_mask=loss_mask[columns].float().masked_fill(in_preamble, 0.0),
                columns=columns,
                documents=tuple(documents),
                plain=plain,
            )
        )
    return trunk


def _spans(
    tokens: Tensor, labels: Tensor, counts: Tensor, end_of_document: int | None
) -> list[tuple[int, int, bool]]:
    """(first column, limit, whether it is text) of what a sample is split into, in order.

    A document's end token begins a new span behind it, but where nothing counts it stays with the
    span before. An end token that only another one follows is no text. One at the very start is the
    rest of a document, unless more of what does not count follows.
    """
    length, text, counted = len(tokens), tokens.tolist(), [0, *counts.cumsum(0).tolist()]
    starts = [0] if end_of_document is None else document_starts(tokens, end_of_document)
    spans: list[tuple[int, int, bool]] = []
    for start, limit in itertools.pairwise([*starts, length]):
        counts_here = counted[limit] > counted[start]
        if spans and not counts_here:
            first, _, is_text = spans[-1]
            spans[-1] = (first, limit, is_text and counted[start] > counted[first])
        else:
            is_end = limit - start == 1 and text[start] == int(labels[start]) == end_of_document
            spans.append((start, limit, counted[-1] > 0 and not (is_end and counts_here)))
    return spans


def document_starts(tokens: Tensor, end_of_document: int) -> list[int]:
    """Columns of a sample ``[sequence]`` at which a document starts: behind each end of one."""
    ends = (tokens == end_of_document).nonzero()[:, 0] + 1
    return [0, *(end for end in ends.tolist() if end < len(tokens))]


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
