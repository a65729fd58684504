"""The tree of one micro-batch: trunks, and for each chosen position a stem and its branches.

``grow_tree`` appends the stems and branches to a trunk and says which row predicts which token. All
layout is computed on the CPU from a few integers per document and rollout; only the finished index
tensors go to the device.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatron_rmt.model.blocks import position_block
from megatron_rmt.model.context_parallel import RowSplit
from megatron_rmt.model.visibility import TreeVisibility
from megatron_rmt.prompt.response import Response
from megatron_rmt.rollout.responses import Rollout
from megatron_rmt.rollout.trunk import NO_LABEL, Sample, first_rows, trunk_blocks


@dataclass
class ChosenPosition:
    """A position that is reasoned about, and what comes of it in the course of a step.

    row: of its sample; its label is the token to be predicted. budget: tokens of thought asked for.
    stem: the token ids that ask for them. rollouts: its group. responses: what each of them says.
    rewards, advantages: fp32 numbers, one for each. place: in the order in which the selection
    returned its sample's positions. differs: whether the group earns different amounts beside the
    length reward.
    """

    row: int
    budget: int
    stem: Sequence[int]
    rollouts: list[Rollout] = field(default_factory=list)
    responses: list[Response] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    place: int = 0
    differs: bool = False


@dataclass
class ReasonedSample:
    """A sample and its chosen positions, ascending. All on the host."""

    sample: Sample
    positions: list[ChosenPosition] = field(default_factory=list)

    @property
    def rollouts(self) -> list[Rollout]:
        """Those of all positions, in order."""
        return [rollout for position in self.positions for rollout in position.rollouts]


def chosen_rows(reasoned: Sequence[ReasonedSample]) -> list[int]:
    """Rows of the chosen positions in the trunk of these samples."""
    starts = first_rows([of.sample for of in reasoned])
    return [
        start + position.row
        for of, start in zip(reasoned, starts, strict=True)
        for position in of.positions
    ]


@dataclass(frozen=True)
class Tree:
    """One micro-batch of the update.

    tokens: ``[padded rows]`` int64. visibility: what each row sees. predicting: ``[predictions]``
    int64, the row whose output predicts ``targets`` ``[predictions]`` int64; the trunk's come
    first, ``trunk_predictions`` of them, then the responses'. ntp_mask: ``[trunk predictions]``
    fp32. rollouts: ``[response predictions]`` int64, which of the tree's rollouts. drawn:
    ``[response predictions]`` bool. drawn_log_probs: ``[response predictions]`` fp32. first_row: of
    a part of a tree (``part_of_tree``) in the whole.
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
    first_row: int = 0


def place_of_prediction(tree: Tree, reasoned: Sequence[ReasonedSample], prediction: int) -> str:
    """Where a prediction of a tree over ``reasoned`` is, for people."""
    if prediction < tree.trunk_predictions:
        row = tree.first_row + int(tree.predicting[prediction])
        for of, start in zip(reasoned, first_rows([of.sample for of in reasoned]), strict=True):
            if start <= row < start + len(of.sample):
                return of.sample.place(row - start)
    rollout = int(tree.rollouts[prediction - tree.trunk_predictions])
    places = [
        (of.sample, position)
        for of in reasoned
        for position in of.positions
        for _ in position.rollouts
    ]
    sample, position = places[rollout]
    return f"a response to {sample.place(position.row)}"


# A row that predicts nothing, for a micro-batch without samples: Megatron wants one token at least.
NO_SAMPLE = Sample(
    index=-1,
    tokens=torch.zeros(1, dtype=torch.int64),
    position_ids=torch.zeros(1, dtype=torch.int64),
    labels=torch.full((1,), NO_LABEL),
    loss_mask=torch.zeros(1),
    columns=torch.full((1,), -1),
    documents=((0, 1),),
)


def grow_tree(
    reasoned: Sequence[ReasonedSample],
    *,
    longest_position: int,
    device: torch.device,
    attention: str = "auto",
) -> Tree:
    """The tree of samples and their rollouts; one row that predicts nothing where there are none.

    No NTP loss falls on a chosen position (the paper's mask m_pos). longest_position: bound on
    every position id, sizes the rotary table. attention: a name of ``--rmt-attention``.
    """
    reasoned = reasoned or [ReasonedSample(NO_SAMPLE)]
    trunk = [of.sample for of in reasoned]
    # The trunk: which of its rows predict their label.
    tokens = [sample.tokens.numpy() for sample in trunk]
    position_ids = [sample.position_ids.numpy() for sample in trunk]
    blocks = trunk_blocks(trunk)
    labels = torch.cat([sample.labels for sample in trunk])
    loss_mask = torch.cat([sample.loss_mask for sample in trunk])
    predicted = torch.cat([sample.labelled for sample in trunk])
    size = len(labels)
    # The stems and branches: a response's first token is predicted by the last row of its stem.
    predicting: list[np.ndarray] = []
    rollouts = [rollout for of in reasoned for rollout in of.rollouts]
    for of, start in zip(reasoned, first_rows(trunk), strict=True):
        for position in of.positions:
            predicted[start + position.row] = False
            # The last token of a response predicts nothing, so it has no row.
            branches = [max(0, len(rollout) - 1) for rollout in position.rollouts]
            stem = np.array(position.stem, dtype=np.int64)
            document, _ = of.sample.document_of(position.row)
            own = (size, start + document, start + position.row + 1)
            blocks.append(position_block(*own, len(stem), branches))
            after = int(of.sample.position_ids[position.row]) + 1
            tokens.append(stem)
            position_ids.append(after + np.arange(len(stem)))
            size += len(stem)
            last_of_stem = np.array([size - 1])
            for rollout, branch in zip(position.rollouts, branches, strict=True):
                tokens.append(rollout.tokens[:branch])
                position_ids.append(after + len(stem) + np.arange(branch))
                if len(rollout):
                    predicting += [last_of_stem, np.arange(size, size + branch)]
                size += branch
    trunk_rows = predicted.nonzero()[:, 0]
    lengths = torch.tensor([len(rollout) for rollout in rollouts], dtype=torch.int64)
    visibility = TreeVisibility(tokens=size, blocks=tuple(blocks), attention=attention)
    visibility.use_position_ids(_joined(position_ids, np.int64).to(device), longest_position)
    targets = _joined([rollout.tokens for rollout in rollouts], np.int64)
    return Tree(
        tokens=_joined(tokens, np.int64).to(device),
        visibility=visibility,
        predicting=torch.cat([trunk_rows, _joined(predicting, np.int64)]).to(device),
        targets=torch.cat([labels[trunk_rows], targets]).to(device),
        trunk_predictions=len(trunk_rows),
        ntp_mask=loss_mask[trunk_rows].to(device),
        rollouts=torch.arange(len(rollouts)).repeat_interleave(lengths).to(device),
        drawn=_joined([rollout.drawn for rollout in rollouts], bool).to(device),
        drawn_log_probs=_joined([rollout.log_probs for rollout in rollouts], np.float32).to(device),
    )


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype), *arrays], dtype=dtype))


def part_of_tree(tree: Tree, split: RowSplit) -> tuple[Tree, Tensor]:
    """What this context-parallel rank holds of ``tree``, and which of its predictions those are,
    ``[predictions]`` bool. It may hold no row."""
    rows = split.own
    held = split.holds(tree.predicting)
    on_trunk, on_responses = held[: tree.trunk_predictions], held[tree.trunk_predictions :]
    visibility = dataclasses.replace(
        tree.visibility,
        tokens=rows.stop - rows.start,
        position_ids=tree.visibility.position_ids[rows],
        split=split,
    )
    part = Tree(
        tokens=tree.tokens[rows],
        visibility=visibility,
        predicting=tree.predicting[held] - rows.start,
        targets=tree.targets[held],
        trunk_predictions=int(on_trunk.sum()),
        ntp_mask=tree.ntp_mask[on_trunk],
        rollouts=tree.rollouts[on_responses],
        drawn=tree.drawn[on_responses],
        drawn_log_probs=tree.drawn_log_probs[on_responses],
        first_row=rows.start,
    )
    return part, held


def pad_tree(tree: Tree, rows: int) -> Tree:
    """``tree`` with ``rows`` rows: pipeline schedules want micro-batches of one size, and tensor
    (sequence) parallel and FP8 want multiples. Padding sees nothing and predicts nothing."""
    zeros = tree.tokens.new_zeros(rows - tree.tokens.shape[0])
    tree.visibility.position_ids = torch.cat([tree.visibility.position_ids, zeros])
    return dataclasses.replace(tree, tokens=torch.cat([tree.tokens, zeros]))
