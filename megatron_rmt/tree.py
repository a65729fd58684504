"""The tree of one micro-batch: trunks, and for each chosen position a stem and its branches.

``build_trunk`` lays the samples of a micro-batch, as Megatron's dataset gave them, end to end in
one packed sequence and marks the documents in it. ``grow_tree`` appends the stems and branches and
says which row predicts which token. All layout is computed on the CPU from a few integers per
document and rollout; only the finished index tensors go to the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rmt.attention import TreePlan
from megatron_rmt.tree_attention import Block, position_block

NO_LABEL = -1


@dataclass(frozen=True)
class Trunk:
    """The samples of one micro-batch, end to end. All tensors ``[rows]``, on the CPU.

    tokens: int64 token ids. positions: int64 rotary positions. labels: int64, the token that
    follows, ``NO_LABEL`` where none is known. loss_mask: fp32 weight of each row in the NTP loss.
    samples: int64 index of the sample in the micro-batch. columns: int64 index in the sample, -1 in
    a prompt head. document_first: int64, first row of the row's document (its head included).
    documents: (first, limit) rows of each document.
    """

    tokens: Tensor
    positions: Tensor
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
    head: Sequence[int],
    end_of_document: int,
    separate_documents: bool,
) -> Trunk:
    """Lay the samples ``[micro-batch, sequence]`` of one micro-batch end to end.

    head: token ids put before each document (each sample, if documents are not separate).
    separate_documents: documents do not see each other, as Megatron's ``--reset-attention-mask``;
    a document ends with its ``end_of_document`` token.
    """
    batch, length = tokens.shape
    head_tokens = torch.tensor(list(head), dtype=torch.int64)
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
            count = len(head_tokens) + limit - start
            no_head = torch.full((len(head_tokens),), -1)
            added = {
                "tokens": [head_tokens, tokens[sample, start:limit]],
                "positions": [
                    own_positions[0] + torch.arange(len(head_tokens)),
                    own_positions + len(head_tokens),
                ],
                "labels": [no_head, labels[sample, start:limit]],
                "loss_mask": [no_head.clamp(min=0), loss_mask[sample, start:limit]],
                "samples": [torch.full((count,), sample)],
                "columns": [no_head, columns],
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


@dataclass(frozen=True)
class Responses:
    """What the rollouts of some positions generated; ``longest`` is the length of the longest.

    tokens: ``[positions, group, longest]`` int64. lengths: ``[positions, group]`` int64. sampled:
    ``[positions, group, longest]`` bool, True where the policy drew the token (a forced end of
    thought is not drawn). log_probs: like tokens, fp32, of each drawn token under the sampling
    distribution when it was drawn.
    """

    tokens: Tensor
    lengths: Tensor
    sampled: Tensor
    log_probs: Tensor

    def positions(self, first: int, limit: int) -> "Responses":
        """The responses of positions ``[first, limit)``."""
        span = slice(first, limit)
        return Responses(
            self.tokens[span], self.lengths[span], self.sampled[span], self.log_probs[span]
        )


def join_responses(parts: Sequence[Responses]) -> Responses:
    """The responses of several lists of positions, one after the other."""
    longest = max(part.tokens.shape[2] for part in parts)

    def joined(name: str) -> Tensor:
        padded = (F.pad(getattr(part, name), (0, longest - part.tokens.shape[2])) for part in parts)
        return torch.cat(list(padded))

    return Responses(
        joined("tokens"),
        torch.cat([p.lengths for p in parts]),
        joined("sampled"),
        joined("log_probs"),
    )


@dataclass(frozen=True)
class Tree:
    """One micro-batch of the update.

    tokens: ``[padded rows]`` int64. plan: what each row sees. predicting: ``[predictions]`` int64,
    the row whose output predicts ``targets`` ``[predictions]`` int64; the trunk's predictions come
    first, ``trunk_predictions`` of them, then the responses'. ntp_mask: ``[trunk predictions]``
    fp32. rollouts: ``[response predictions]`` int64, position * group + rollout. sampled:
    ``[response predictions]`` bool. sampled_log_probs: ``[response predictions]`` fp32.
    """

    tokens: Tensor
    plan: TreePlan
    predicting: Tensor
    targets: Tensor
    trunk_predictions: int
    ntp_mask: Tensor
    rollouts: Tensor
    sampled: Tensor
    sampled_log_probs: Tensor


def grow_tree(
    trunk: Trunk,
    rows: Sequence[int],
    stem: Sequence[int],
    responses: Responses | None,
    *,
    longest_position: int,
    device: torch.device,
    attention: str = "auto",
) -> Tree:
    """Append the stems and branches of the chosen trunk ``rows`` and list every prediction.

    rows: the trunk row of each chosen position; its label is the token to be predicted, and no NTP
    loss falls on it (the paper's mask m_pos). responses: of the same positions (None if there are
    none). longest_position: bound on every position id, sizes the rotary table. attention: a name
    of ``--rmt-attention``.
    """
    tokens, positions = [trunk.tokens], [trunk.positions]
    blocks = [*trunk_blocks(trunk)]
    predicting, targets, rollouts, sampled, log_probs = [], [], [], [], []
    stem_tokens = torch.tensor(list(stem), dtype=torch.int64)
    size = len(trunk)
    for index, row in enumerate(rows):
        lengths = responses.lengths[index].tolist()
        # The last token of a response predicts nothing, so it has no row.
        branches = [max(0, length - 1) for length in lengths]
        after = trunk.positions[row] + 1
        blocks.append(
            position_block(
                size, int(trunk.document_first[row]), row + 1, len(stem_tokens), branches
            )
        )
        tokens.append(stem_tokens)
        positions.append(after + torch.arange(len(stem_tokens)))
        size += len(stem_tokens)
        last_of_stem = torch.tensor([size - 1])
        for rollout, (length, branch) in enumerate(zip(lengths, branches, strict=True)):
            response = responses.tokens[index, rollout, :length]
            tokens.append(response[:branch])
            positions.append(after + len(stem_tokens) + torch.arange(branch))
            if length:
                predicting += [last_of_stem, torch.arange(size, size + branch)]
                targets.append(response)
                rollouts.append(torch.full((length,), index * len(lengths) + rollout))
                sampled.append(responses.sampled[index, rollout, :length])
                log_probs.append(responses.log_probs[index, rollout, :length])
            size += branch
    chosen = torch.zeros(len(trunk), dtype=torch.bool)
    chosen[list(rows)] = True
    trunk_rows = ((trunk.labels != NO_LABEL) & (trunk.loss_mask > 0) & ~chosen).nonzero()[:, 0]
    plan = TreePlan(tokens=size, blocks=tuple(blocks), attention=attention)
    plan.use_positions(torch.cat(positions).to(device), longest_position)
    return Tree(
        tokens=torch.cat(tokens).to(device),
        plan=plan,
        predicting=torch.cat([trunk_rows, *predicting]).to(device),
        targets=torch.cat([trunk.labels[trunk_rows], *targets]).to(device),
        trunk_predictions=len(trunk_rows),
        ntp_mask=trunk.loss_mask[trunk_rows].to(device),
        rollouts=_joined(rollouts, torch.int64).to(device),
        sampled=_joined(sampled, torch.bool).to(device),
        sampled_log_probs=_joined(log_probs, torch.float32).to(device),
    )


def _joined(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(tensors) if tensors else torch.empty(0, dtype=dtype)


def pad_tree(tree: Tree, rows: int) -> Tree:
    """``tree`` with ``rows`` rows: pipeline schedules want micro-batches of one size, and tensor
    (sequence) parallel and FP8 want multiples. Padding sees nothing and predicts nothing."""
    missing = rows - tree.tokens.shape[0]
    if missing < 0:
        raise ValueError(f"pad_tree: rows={rows} is less than the tree's {tree.tokens.shape[0]}.")
    zeros = tree.tokens.new_zeros(missing)
    tree.plan.positions = torch.cat([tree.plan.positions, zeros])
    return Tree(**{**vars(tree), "tokens": torch.cat([tree.tokens, zeros])})
