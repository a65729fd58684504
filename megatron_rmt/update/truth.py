"""How likely the true next token is, with and without the thought: one pass over a tree."""

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_rmt.algorithm.doors import DoorError
from megatron_rmt.model.gpt import Policy
from megatron_rmt.model.head import token_loss_sum
from megatron_rmt.model.pipeline import forward_through_stages, from_last_stage
from megatron_rmt.prompt.prompt import Prompt
from megatron_rmt.rollout.responses import written
from megatron_rmt.update.tree import ChosenPosition, ReasonedSample, chosen_rows, grow_tree


@torch.no_grad()
def log_probs_of_truth(
    policy: Policy, prompt: Prompt, reasoned: Sequence[ReasonedSample], budget: int, group: int
) -> tuple[Tensor, Tensor]:
    """Log-probs fp32 in nats at temperature 1 of the true tokens at the chosen positions.

    Returns, on every rank and on the CPU, ``[positions]`` after the text alone and
    ``[positions, group]`` after the text, the thought and its end, written if need be. Collective
    over the tensor- and pipeline-parallel ranks, and those that share experts.

    Raises:
        DoorError: answers are boxed, so that the token does not stand right after the thought.
    """
    if prompt.template.answer == "boxed":
        raise DoorError(
            f"--rmt-template {prompt.template.name} asks for the answer in a box, but --rmt-reward "
            "asks for the log-prob of the true token right after the thought; pass --rmt-template "
            "inline."
        )
    device = policy.device
    closed = [_closed_with_truth(prompt, of) for of in reasoned]
    tree = grow_tree(
        closed,
        prompt.stem(budget),
        longest_position=policy.longest_position,
        device=device,
        attention=policy.attention,
    )
    # The true token is the last prediction of its rollout.
    rollouts = torch.arange(sum(len(of.rollouts) for of in closed), device=device)
    last = tree.trunk_predictions - 1 + torch.searchsorted(tree.rollouts, rollouts, right=True)
    chosen = torch.tensor(chosen_rows(reasoned), dtype=torch.int64)
    labels = torch.cat([of.sample.labels for of in reasoned])[chosen].to(device)
    predicting = torch.cat([chosen.to(device), tree.predicting[last]])
    targets = torch.cat([labels, tree.targets[last]])

    def read(hidden: Tensor, weight: Tensor) -> Tensor:
        _, log_probs = token_loss_sum(
            hidden[predicting],
            weight,
            targets,
            lambda rows, log_probs: -log_probs,
            vocab_size=policy.vocab_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            chunk_size=policy.head_chunk_size,
        )
        return log_probs.float()

    found = forward_through_stages(policy.model, tree.tokens, tree.visibility, read)
    if found is None:
        found = torch.empty(len(predicting), device=device)
    found = from_last_stage(found.contiguous()).cpu()
    without, after_thought = found.split([len(chosen), len(rollouts)])
    return without, after_thought.view(-1, group)


def _closed_with_truth(prompt: Prompt, of: ReasonedSample) -> ReasonedSample:
    """Each response's thought, its end, and the true next token, as if all were written."""
    positions = []
    for position in of.positions:
        end = [*prompt.close, int(of.sample.labels[position.row])]
        rollouts = [
            written([*rollout.tokens[: response.thought_length].tolist(), *end])
            for rollout, response in zip(position.rollouts, position.responses, strict=True)
        ]
        positions.append(ChosenPosition(position.row, rollouts))
    return ReasonedSample(of.sample, positions)
