"""A whole step over context-parallel ranks, in fp64: the rollouts, reports and gradients of one
process."""

import dataclasses
from argparse import Namespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_rmt.algorithm.rewards import REWARDS
from megatron_rmt.mid_training import MidTraining
from megatron_rmt.model.gpt import Policy, generating
from megatron_rmt.model.visibility import attach_tree_attention
from megatron_rmt.rollout.trunk import UserBatch
from megatron_rmt.step import Collected, collect
from megatron_rmt.update.forward_step import make_forward_step
from tests.distributed import run_distributed
from tests.tiny_model import LONGEST_POSITION, build_model
from tests.tiny_step import BYTES, tiny_run, tiny_schedule

MICRO_BATCHES, LENGTH = 2, 32


def _batches(data_ranks: int, data_rank: int) -> list[UserBatch]:
    """This data-parallel rank's of four samples, one in each micro-batch of two ranks."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(1, 10, (4, LENGTH + 1), generator=generator)
    text[1, 17] = 0
    mask = (torch.rand(4, LENGTH, generator=generator) < 0.8).float()
    size = 4 // (MICRO_BATCHES * data_ranks)
    found = []
    for number in range(MICRO_BATCHES):
        first = (number * data_ranks + data_rank) * size
        own = slice(first, first + size)
        positions = torch.arange(LENGTH).repeat(size, 1)
        found.append(UserBatch(text[own, :-1], positions, text[own, 1:], mask[own]))
    return found


def _run(context: int, data_ranks: int, reward: str, greedy: bool, attention: str) -> MidTraining:
    torch.manual_seed(11)
    model = build_model(context_parallel_size=context)
    attach_tree_attention(model)
    run = tiny_run(greedy=greedy, entropy_thresholds=(0.1, 0.7, 1.4), max_tokens=None)
    args = Namespace(
        hybrid_layer_pattern=None,
        micro_batch_size=4 // (MICRO_BATCHES * data_ranks),
        consumed_train_samples=12,
        reset_attention_mask=True,
        sequence_parallel=False,
        tensor_model_parallel_size=1,
    )
    policy = Policy(model, len(BYTES), LONGEST_POSITION, 7, attention)
    return dataclasses.replace(run, args=args, policy=policy, reward=REWARDS[reward])


def _step(context: int, *how: Any) -> tuple[list[Any], dict[str, Tensor], dict[str, Tensor]]:
    """What was drawn and earned, the gradients, and the reports as Megatron sums them up."""
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            context_parallel_size=context, create_gloo_process_groups=False
        )
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    data = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    run = _run(context, data[0], *how)
    with generating(run.policy.model):
        collected = collect(run, _batches(*data), tiny_schedule(iteration=5))
    gradients, reports = _update(run, collected)
    drawn = [
        # Information gains are sums of another order, so rounded.
        (of.sample.index, own.row, rollout.tokens.tolist(), round(reward, 9))
        for of in collected.reasoned
        for own in of.positions
        for rollout, reward in zip(own.rollouts, own.rewards, strict=True)
    ]
    return drawn, gradients, reports


def _update(run: MidTraining, collected: Collected) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = run.policy.model.train()
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    wrapped.zero_grad_buffer()
    found = get_forward_backward_func()(
        forward_step_func=make_forward_step(collected.settings),
        data_iterator=iter(collected.updates),
        model=[wrapped],
        num_microbatches=MICRO_BATCHES,
        seq_length=LENGTH,
        micro_batch_size=1,
        forward_only=False,
    )
    wrapped.finish_grad_sync()
    gradients = {name: own.main_grad.clone() for name, own in model.named_parameters()}
    reports = {}
    for key in found[0]:
        total = torch.stack([report[key].double() for report in found]).sum(0)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(total, group=group)
        reports[key] = total[0] / total[1]
    return gradients, reports


HOW = {
    "sampled": ("match", False, "lse"),
    "greedy, dense masks": ("match", True, "sdpa"),
    "information gain": ("information-gain", False, "lse"),
}


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("ranks", "context", "how"),
    [
        (2, 2, "sampled"),
        pytest.param(2, 2, "greedy, dense masks", marks=pytest.mark.slow),
        pytest.param(2, 2, "information gain", marks=pytest.mark.slow),
        pytest.param(3, 3, "sampled", marks=pytest.mark.slow),
        pytest.param(4, 2, "sampled", marks=pytest.mark.slow),
    ],
)
def test_a_step_of_context_parallel_ranks_is_that_of_one_process(
    ranks: int, context: int, how: str
):
    ((alone, gradients, reports),) = run_distributed(1, _step, 1, *HOW[how])
    assert len({tuple(tokens) for _, _, tokens, _ in alone}) > 4
    found = run_distributed(ranks, _step, context, *HOW[how])
    for drawn, own_gradients, own_reports in found:
        assert [of for of in alone if of[0] in {index for index, *_ in drawn}] == drawn
        assert own_gradients.keys() == gradients.keys()
        for name, expected in gradients.items():
            error = float((own_gradients[name] - expected).norm() / expected.norm())
            assert error < 1e-12, (name, error)
        assert own_reports.keys() == reports.keys()
        for name in reports.keys() - {"rmt padding", "rmt logprob difference"}:
            torch.testing.assert_close(
                own_reports[name], reports[name], rtol=1e-6, atol=1e-9, equal_nan=True, msg=name
            )
    assert {of[0] for drawn, *_ in found for of in drawn} == {of[0] for of in alone}
