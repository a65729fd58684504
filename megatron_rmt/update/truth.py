"""How likely the true next tokens are, with and without the thought: one pass over a tree."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_rmt.algorithm.doors import DoorError
from megatron_rmt.model.blocks import Block
from megatron_rmt.model.context_parallel import RowSplit, on_all_ranks
from megatron_rmt.model.gpt import Policy
from megatron_rmt.model.head import token_entropies, token_loss_sum
from megatron_rmt.model.pipeline import forward_through_stages, from_last_stage
from megatron_rmt.prompt.prompt import Prompt
from megatron_rmt.rollout.responses import written
from megatron_rmt.rollout.trunk import first_rows
from megatron_rmt.update.scoring import continuation
from megatron_rmt.update.tree import ChosenPosition, ReasonedSample, grow_tree, part_of_tree

# How context-parallel ranks share the rows of blocks, if they do.
Split = Callable[[Sequence[Block]], RowSplit | None]


class AfterText(NamedTuple):
    """What the model says of the truth at each position, on the CPU.

    alone: ``[positions]``, after the text alone. after_thought: ``[positions, group]``, after the
    text, a thought and its end, written if need be.
    """

    alone: Tensor
    after_thought: Tensor


def log_probs_of_truth(
    policy: Policy,
    prompt: Prompt,
    reasoned: Sequence[ReasonedSample],
    group: int,
    split: Split | None = None,
) -> AfterText:
    """Mean log-probs of the next ``prompt.target_tokens`` true tokens, as far as the text goes, at
    the chosen positions: in nats a token at temperature 1, in fp32 or the dtype of the weights if
    it is wider, on every rank.

    Equal thoughts of a group are read once, so what they are worth is equal to the last digit.
    Collective over the tensor- and pipeline-parallel ranks, those that share experts, and with a
    ``split`` the context-parallel ones.

    Raises:
        DoorError: answers are boxed, so that the tokens do not stand right after the thought.
    """
    (log_probs,) = _read_truth(policy, prompt, reasoned, group, split, asks_likeliest=False)
    return log_probs


def predictions_of_truth(
    policy: Policy,
    prompt: Prompt,
    reasoned: Sequence[ReasonedSample],
    group: int,
) -> tuple[AfterText, AfterText]:
    """``log_probs_of_truth``, and from the same pass 1.0 where the first true token is the most
    likely one, else 0.0."""
    log_probs, likeliest = _read_truth(policy, prompt, reasoned, group, None, asks_likeliest=True)
    return log_probs, likeliest


@torch.no_grad()
def _read_truth(
    policy: Policy,
    prompt: Prompt,
    reasoned: Sequence[ReasonedSample],
    group: int,
    split: Split | None,
    *,
    asks_likeliest: bool,
) -> list[AfterText]:
    """One pass over the tree of the thoughts, closed and followed by the truth as if all were
    written.

    Raises:
        DoorError: see ``log_probs_of_truth``.
    """
    if prompt.template.answer == "boxed":
        raise DoorError(
            f"--rmt-template {prompt.template.name} asks for the answer in a box, but --rmt-reward "
            "asks for the log-prob of the true token right after the thought; pass --rmt-template "
            "inline."
        )
    samples, alone, targets, lengths, which = [], [], [], [], []
    for of, start in zip(reasoned, first_rows([of.sample for of in reasoned]), strict=True):
        positions = []
        for position in of.positions:
            truth = continuation(prompt, of.sample, position.row, prompt.target_tokens)
            thoughts = [
                tuple(rollout.tokens[: response.thought_length].tolist())
                for rollout, response in zip(position.rollouts, position.responses, strict=True)
            ]
            once = list(dict.fromkeys(thoughts))
            closed = [written([*thought, *prompt.close, *truth]) for thought in once]
            positions.append(ChosenPosition(position.row, position.budget, position.stem, closed))
            which += [len(lengths) + once.index(thought) for thought in thoughts]
            lengths += [len(truth)] * len(once)
            alone.append(start + position.row + torch.arange(len(truth)))
            targets.append(torch.tensor(truth, dtype=torch.int64))
        samples.append(ReasonedSample(of.sample, positions))
    device = policy.device
    tree = grow_tree(
        samples,
        longest_position=policy.longest_position,
        device=device,
        attention=policy.attention,
    )
    # Who predicts the truth: rows of the trunk, and the last predictions of each thought.
    ends = torch.bincount(tree.rollouts.cpu(), minlength=len(lengths)).cumsum(0).tolist()
    after = [torch.arange(end - own, end) for end, own in zip(ends, lengths, strict=True)]
    after = tree.trunk_predictions + _joined(after).to(device)
    alone_lengths, alone = [len(rows) for rows in alone], _joined(alone).to(device)
    dtype = torch.promote_types(next(policy.model.parameters()).dtype, torch.float32)
    predicting = torch.cat([alone, tree.predicting[after]])
    targets = torch.cat([_joined(targets).to(device), tree.targets[after]])
    of_rank = None if split is None else split(tree.visibility.blocks)
    if of_rank is not None:
        held = of_rank.holds(predicting)
        tree, _ = part_of_tree(tree, of_rank)
        predicting, targets = predicting[held] - tree.first_row, targets[held]

    def read(hidden: Tensor, weight: Tensor) -> Tensor:
        how = {
            "vocab_size": policy.vocab_size,
            "tp_group": parallel_state.get_tensor_model_parallel_group(),
            "chunk_size": policy.head_chunk_size,
        }
        rows = hidden[predicting]
        _, log_probs = token_loss_sum(
            rows, weight, targets, lambda rows, log_probs: -log_probs, **how
        )
        found = [log_probs]
        if asks_likeliest:
            found.append(token_entropies(rows, weight, **how)[1] == targets)
        return torch.stack([own.to(dtype) for own in found])

    found = forward_through_stages(policy.model, tree.tokens, tree.visibility, read)
    if found is None:
        found = torch.empty(1 + asks_likeliest, len(predicting), dtype=dtype, device=device)
    found = from_last_stage(found.contiguous())
    if of_rank is not None:
        found = on_all_ranks(found, held, of_rank)
    found = found.cpu()
    results = []
    for values, of_piece in zip(found, (torch.mean, _first), strict=False):
        without, after_thought = values.split([len(alone), len(after)])
        without, after_thought = (
            torch.tensor([float(of_piece(piece)) for piece in part.split(sizes)], dtype=dtype)
            for part, sizes in ((without, alone_lengths), (after_thought, lengths))
        )
        after_thought = after_thought[torch.tensor(which, dtype=torch.int64)]
        results.append(AfterText(without, after_thought.view(-1, group)))
    return results


def _first(piece: Tensor) -> Tensor:
    return piece[0]


def _joined(rows: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.int64), *rows])
