"""Which weight each prediction of a tree has in the loss of the global batch."""

import functools
from collections.abc import Sequence

import torch

from megatron_rmt.algorithm.losses import Predictions, response_weights
from megatron_rmt.algorithm.schedules import Schedule
from megatron_rmt.update.tree import ChosenPosition, Tree


def loss_weights(
    positions: Sequence[ChosenPosition],
    tree: Tree,
    all_positions: float,
    ntp_tokens: float,
    schedule: Schedule,
) -> Predictions:
    """Of one tree's predictions. all_positions, ntp_tokens: of the global batch."""
    device = tree.tokens.device
    values = torch.tensor([value for position in positions for value in position.advantages])
    rollouts = all_positions * schedule.group
    share = functools.partial(response_weights, rollouts=tree.rollouts, positions=rollouts)
    policy = share(values.to(device), selected=tree.drawn)
    supervised = torch.zeros_like(policy)
    if schedule.warm_up:
        lengths = [own.thought_length for position in positions for own in position.responses]
        # Predictions stand in the order of their rollouts.
        token = torch.arange(len(tree.drawn), device=device)
        token -= torch.searchsorted(tree.rollouts, tree.rollouts)
        thought = token < torch.tensor(lengths, device=device)[tree.rollouts]
        thought &= schedule.thought_from_text
        # Thought and answer each have their own mean, so that a long thought leaves the one token
        # of the answer its weight.
        for part in (~tree.drawn & thought, ~tree.drawn & ~thought):
            supervised += share(torch.ones_like(values).to(device), selected=part)
    ntp = tree.ntp_mask / max(ntp_tokens, 1.0)
    return Predictions.of(ntp, policy, supervised, tree.drawn_log_probs)
