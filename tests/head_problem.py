"""A problem for the head, and its results by log_softmax in float64 and by the head."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rmt.model.head import LossOfRows, token_entropies, token_loss_sum
from megatron_rmt.rollout.sampling import DecodeHead, RolloutSettings

HIDDEN = 24
VOCAB, PADDED = 90, 128

Problem = dict[str, Tensor]


def make_problem(rows: int = 13, dtype: torch.dtype = torch.float64) -> Problem:
    """Inputs whose scores spread over some 40 nats and whose padding rows would be noticed."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "hidden": (2 * normal(rows, HIDDEN)).to(dtype),
        "weight": normal(PADDED, HIDDEN).to(dtype),
        "targets": torch.randint(VOCAB, (rows,), generator=generator),
        "by_log_prob": normal(rows),
    }


def log_probs_and_entropies(
    hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    log_p = (hidden.double() @ weight.double()[:VOCAB].T).log_softmax(-1)
    entropies = (
        torch.stack([-sum(x * x.exp() for x in row) for row in log_p])
        if len(log_p)
        else (log_p.sum(-1))
    )
    return log_p.gather(1, targets[:, None])[:, 0], entropies


def linear(problem: Problem) -> LossOfRows:
    return lambda rows, log_probs: problem["by_log_prob"][rows] * log_probs


def clipped(problem: Problem) -> LossOfRows:
    """The policy gradient of rollouts that an older policy drew, clipped: for some rows it is."""
    older = torch.linspace(-30, -1, len(problem["targets"]), dtype=torch.float64)

    def loss(rows: slice, log_probs: Tensor) -> Tensor:
        advantages, ratio = problem["by_log_prob"][rows], torch.exp(log_probs - older[rows])
        return -torch.minimum(advantages * ratio, advantages * ratio.clamp(0.8, 1.28))

    return loss


def squared(problem: Problem) -> LossOfRows:
    return lambda rows, log_probs: problem["by_log_prob"][rows] * log_probs.square()


LOSSES = {"linear": linear, "clipped": clipped, "squared": squared}


def expected_results(
    problem: Problem, loss_of: Callable[[Problem], LossOfRows] = linear
) -> list[Tensor]:
    """Sum of the losses, log-probs, entropies, and three times the gradients."""
    hidden = problem["hidden"].double().requires_grad_()
    weight = problem["weight"].double().requires_grad_()
    scaled = hidden * problem["scale"][:, None] if "scale" in problem else hidden
    log_probs, entropies = log_probs_and_entropies(scaled, weight, problem["targets"])
    total = loss_of(problem)(slice(None), log_probs).sum()
    gradients = torch.autograd.grad(3 * total, [hidden, weight])
    return [total.detach(), log_probs.detach(), entropies.detach(), *gradients]


def results_of_the_head(
    problem: Problem,
    chunk_size: int = 5,
    shard: slice = slice(None),
    group: torch.distributed.ProcessGroup | None = None,
    loss_of: Callable[[Problem], LossOfRows] = linear,
) -> list[Tensor]:
    """The same by the head, the gradient of the weight for this shard."""
    hidden = problem["hidden"].clone().requires_grad_()
    weight = problem["weight"][shard].clone().requires_grad_()
    settings = {
        "vocab_size": problem.get("vocab_size", VOCAB),
        "tp_group": group,
        "chunk_size": chunk_size,
    }
    scale = problem.get("scale")
    total, log_probs = token_loss_sum(
        hidden, weight, problem["targets"], loss_of(problem), scale=scale, **settings
    )
    assert not log_probs.requires_grad
    gradients = torch.autograd.grad(3 * total, [hidden, weight])
    scaled = problem["hidden"] if scale is None else problem["hidden"].double() * scale[:, None]
    entropies, _ = token_entropies(scaled, weight, **settings)
    return [total.detach(), log_probs, entropies, *gradients]


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value.double() - reference).norm() / reference.norm()).item()


def top_k_entropy(hidden: Tensor, weight: Tensor, k: int) -> Tensor:
    p = (hidden @ weight[:VOCAB].T).softmax(-1).sort(descending=True).values[:, :k]
    p = p / p.sum(-1, keepdim=True)
    return -(p * p.log()).sum(-1)


@torch.no_grad()
def decode_scores(
    hidden: Tensor, weight: Tensor, vocab_size: int = VOCAB, group: ProcessGroup | None = None
) -> Tensor:
    how = RolloutSettings(group=1, budget=1, seed=0, iteration=0, temperature=1.0)
    return DecodeHead(weight, vocab_size, group, how).scores(hidden)
