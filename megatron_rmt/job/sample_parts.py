"""Whole samples of what context-parallel ranks are given of them.

The user's forward step gives each of these ranks either whole samples or its part of each, as
Megatron's ``get_batch_on_this_cp_rank`` cuts them for plain training: in twice as many pieces as
there are ranks, of which rank r gets piece r and the r-th from the end. RMT splits trees in its own
way (``model/context_parallel.py``), so every rank wants whole samples.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rmt.model.context_parallel import context_parallel_group
from megatron_rmt.rollout.trunk import UserBatch

_FIELDS = ("tokens", "position_ids", "labels", "loss_mask")
_CUT_OTHERWISE = (
    "forward_step_func gives GPTModel.forward parts of samples that Megatron's "
    "get_batch_on_this_cp_rank has not cut, by which RMT puts them together; cut them so for "
    "--context-parallel-size, or leave them whole."
)


@dataclass(frozen=True)
class Joined:
    """batch: of whole samples. columns: those that this rank was given, int64 in the order in which
    it has them. problem: why the parts are none of Megatron's, in a sentence, or None."""

    batch: UserBatch
    columns: Tensor
    problem: str | None = None


def join_parts(own: UserBatch) -> Joined:
    """The micro-batch of which this rank was given ``own``. Collective over the context-parallel
    ranks: one gathering of what each of them was given."""
    group = context_parallel_group()
    if group is None:
        return Joined(own, torch.arange(own.tokens.shape[1]))
    parts = [own] * group.size()
    dist.all_gather_object(parts, own, group=group)
    return joined(parts, group.rank())


def joined(parts: list[UserBatch], rank: int) -> Joined:
    """``join_parts``, given what all ranks have, to ``rank``."""
    own, ranks = parts[rank], len(parts)
    (_, length), shapes = own.tokens.shape, {part.tokens.shape for part in parts}
    if len(shapes) == 1 and all(
        torch.equal(getattr(part, name), getattr(own, name)) for part in parts for name in _FIELDS
    ):
        return Joined(own, torch.arange(length))
    if len(shapes) > 1 or length % 2:
        return Joined(own, torch.arange(length), _CUT_OTHERWISE)

    def whole(name: str) -> Tensor:
        pieces: list[Tensor | None] = [None] * (2 * ranks)
        for of, part in enumerate(parts):
            pieces[of], pieces[-1 - of] = getattr(part, name).chunk(2, dim=1)
        return torch.cat(pieces, dim=1)

    batch = UserBatch(**{name: whole(name) for name in _FIELDS})
    pieces = torch.arange(ranks * length).chunk(2 * ranks)
    # Within a sample positions count on from piece to piece, unless a document begins there.
    of_pieces = batch.position_ids.chunk(2 * ranks, dim=1)
    follow = [
        (after[:, 0] == before[:, -1] + 1) | (after[:, 0] == 0)
        for before, after in itertools.pairwise(of_pieces)
    ]
    problem = None if torch.stack(follow).all() else _CUT_OTHERWISE
    return Joined(batch, torch.cat([pieces[rank], pieces[-1 - rank]]), problem)
