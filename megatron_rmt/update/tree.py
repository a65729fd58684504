"""The tree of one micro-batch: trunks, and for each chosen position a stem and its branches.

``grow_tree`` appends the stems and branches to a trunk and says which row predicts which token. All
layout is computed on the CPU from a few integers per document and rollout; only the finished index
tensors go to the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rmt.model.blocks import position_block
from megatron_rmt.model.visibility import TreeVisibility
from megatron_rmt.rollout.responses import Responses
from megatron_rmt.rollout.trunk import NO_LABEL, Trunk, trunk_blocks


@dataclass(frozen=True)
class Tree:
    """One micro-batch of the update.

    tokens: ``[padded rows]`` int64. visibility: what each row sees. predicting: ``[predictions]``
    int64, the row whose output predicts ``targets`` ``[predictions]`` int64; the trunk's come
    first, ``trunk_predictions`` of them, then the responses'. ntp_mask: ``[trunk predictions]``
    fp32. rollouts: ``[response predictions]`` int64, position * group + rollout. drawn:
    ``[response predictions]`` bool. drawn_log_probs: ``[response predictions]`` fp32.
    """

    tokens: Tensor
    visibility: TreeVisibility
    predicting: Tensor
    targets: Tensor
    trunk_predictions: int
    ntp_mask: Tensor
    rollouts: Tensor
    drawn: Tensor
    drawn_log_probs: Tensor


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
    tokens, positions = [trunk.tokens], [trunk.position_ids]
    blocks = [*trunk_blocks(trunk)]
    predicting, targets, rollouts, drawn, log_probs = [], [], [], [], []
    stem_tokens = torch.tensor(list(stem), dtype=torch.int64)
    size = len(trunk)
    for index, row in enumerate(rows):
        lengths = responses.lengths[index].tolist()
        # The last token of a response predicts nothing, so it has no row.
        branches = [max(0, length - 1) for length in lengths]
        after = trunk.position_ids[row] + 1
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
                drawn.append(responses.drawn[index, rollout, :length])
                log_probs.append(responses.log_probs[index, rollout, :length])
            size += branch
    chosen = torch.zeros(len(trunk), dtype=torch.bool)
    chosen[list(rows)] = True
    trunk_rows = ((trunk.labels != NO_LABEL) & (trunk.loss_mask > 0) & ~chosen).nonzero()[:, 0]
    visibility = TreeVisibility(tokens=size, blocks=tuple(blocks), attention=attention)
    visibility.use_position_ids(torch.cat(positions).to(device), longest_position)
    return Tree(
        tokens=torch.cat(tokens).to(device),
        visibility=visibility,
        predicting=torch.cat([trunk_rows, *predicting]).to(device),
        targets=torch.cat([trunk.labels[trunk_rows], *targets]).to(device),
        trunk_predictions=len(trunk_rows),
        ntp_mask=trunk.loss_mask[trunk_rows].to(device),
        rollouts=_joined(rollouts, torch.int64).to(device),
        drawn=_joined(drawn, torch.bool).to(device),
        drawn_log_probs=_joined(log_probs, torch.float32).to(device),
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
    tree.visibility.position_ids = torch.cat([tree.visibility.position_ids, zeros])
    return Tree(**{**vars(tree), "tokens": torch.cat([tree.tokens, zeros])})
