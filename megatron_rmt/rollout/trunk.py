"""The trunk: the samples of one micro-batch, end to end in one packed sequence.

``UserBatch`` is a micro-batch as the user's job gave it; ``build_trunk`` lays its samples end to
end and marks the documents in them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rmt.model.blocks import Block


@dataclass(frozen=True)
class UserBatch:
    """One micro-batch as the user's forward step gave it to the model, each
    ``[micro-batch, sequence]``, on the CPU: int64 tokens, position_ids, labels; fp32 loss_mask."""

    tokens: Tensor
    position_ids: Tensor
    labels: Tensor
    loss_mask: Tensor


NO_LABEL = -1


@dataclass(frozen=True)
class Trunk:
    """The samples of one micro-batch, end to end. All tensors ``[rows]``, on the CPU.

    tokens: int64 token ids. position_ids: int64 rotary positions. labels: int64, the token that
    follows, ``NO_LABEL`` where none is known. loss_mask: fp32 weight of each row in the NTP loss.
    samples: int64 index of the sample in the micro-batch. columns: int64 index in the sample, -1 in
    a prompt's preamble. document_first: int64, first row of the row's document (its preamble
    included). documents: (first, limit) rows of each document.
    """

    tokens: Tensor
    position_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    samples: Tensor
    columns: Tensor
    document_first: Tensor
    documents: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return self.tokens.shape[0]


def build_trunk(
    tokens: Tensor,
    position_ids: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    preamble: Sequence[int],
    end_of_document: int,
    separate_documents: bool,
) -> Trunk:
    """Lay the samples ``[micro-batch, sequence]`` of one micro-batch end to end.

    preamble: token ids put before each document (each sample, if documents are not separate).
    separate_documents: documents do not see each other, as Megatron's ``--reset-attention-mask``;
    a document ends with its ``end_of_document`` token.
    """
    batch, length = tokens.shape
    preamble_tokens = torch.tensor(list(preamble), dtype=torch.int64)
    pieces: dict[str, list[Tensor]] = {}
    documents: list[tuple[int, int]] = []
    row = 0
    for sample in range(batch):
        starts = [0]
        if separate_documents:
            ends = (tokens[sample] == end_of_document).nonzero()[:, 0] + 1
            starts += [end for end in ends.tolist() if end < length]
        for start, limit in zip(starts, [*starts[1:], length], strict=True):
            columns = torch.arange(start, limit)
            own_positions = position_ids[sample, start:limit]
            count = len(preamble_tokens) + limit - start
            no_text = torch.full((len(preamble_tokens),), -1)
            added = {
                "tokens": [preamble_tokens, tokens[sample, start:limit]],
                "position_ids": [
                    own_positions[0] + torch.arange(len(preamble_tokens)),
                    own_positions + len(preamble_tokens),
                ],
                "labels": [no_text, labels[sample, start:limit]],
                "loss_mask": [no_text.clamp(min=0), loss_mask[sample, start:limit]],
                "samples": [torch.full((count,), sample)],
                "columns": [no_text, columns],
                "document_first": [torch.full((count,), row)],
            }
            for name, tensors in added.items():
                pieces.setdefault(name, []).extend(tensors)
            documents.append((row, row + count))
            row += count
    whole = {name: torch.cat(tensors) for name, tensors in pieces.items()}
    whole["loss_mask"] = whole["loss_mask"].float()
    return Trunk(**whole, documents=tuple(documents))


def trunk_blocks(trunk: Trunk) -> tuple[Block, ...]:
    """One causal block per document."""
    return tuple(Block(first, limit) for first, limit in trunk.documents)
