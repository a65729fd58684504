"""What rollouts change of the model while they run, and that it comes back."""

from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor

from megatron_rmt.model.blocks import Block
from megatron_rmt.model.gpt import whole_parameters, without_sequence_parallel
from megatron_rmt.model.pipeline import forward_through_stages
from megatron_rmt.model.visibility import TreeVisibility, attach_tree_attention
from tests.distributed import run_distributed
from tests.tiny_model import LONGEST_POSITION, build_model


def _hidden_states_of_two_ranks() -> list[Any]:
    """With sequence parallelism, without, and with again; and the all-reduces of each."""
    parallel_state.initialize_model_parallel(2, create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    # Megatron refuses torch's norm there, as it does not mark its weight for the sum of gradients.
    WrappedTorchNorm.__new__ = lambda cls, config, hidden_size, eps=1e-5, **_: torch.nn.RMSNorm(
        hidden_size, eps=eps
    )
    torch.manual_seed(0)
    model = build_model(sequence_parallel=True, tensor_model_parallel_size=2)
    attach_tree_attention(model)
    model.eval()
    calls: list[str] = []
    all_reduce = torch.distributed.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append("all_reduce")
        return all_reduce(*args, **kwargs)

    torch.distributed.all_reduce = counted

    def read() -> tuple[Tensor, list[str]]:
        calls.clear()
        visibility = TreeVisibility(tokens=5, blocks=(Block(0, 5),))
        visibility.use_position_ids(torch.arange(5), LONGEST_POSITION)
        with torch.no_grad():
            hidden = forward_through_stages(
                model, torch.arange(5), visibility, lambda hidden, _: hidden.clone()
            )
        return hidden, [*calls]

    found = [read()]
    try:
        with without_sequence_parallel(model):
            found.append(read())
            raise KeyError
    except KeyError:
        found.append(read())
    return found


@pytest.mark.multiprocess
def test_hidden_states_do_not_depend_on_sequence_parallelism_which_comes_back_after_an_error():
    for (before, _), (without, messages), (after, again) in run_distributed(
        2, _hidden_states_of_two_ranks
    ):
        torch.testing.assert_close(without, before, rtol=1e-12, atol=1e-12)
        assert torch.equal(before, after)
        # The embedding's, and two of each of two layers.
        assert messages == ["all_reduce"] * 5
        assert "all_reduce" not in again


class _Chunk(torch.nn.Linear):
    """As Megatron's data-parallel wrapper keeps its hooks."""

    def __init__(self, hooked: bool) -> None:
        super().__init__(1, 1)
        self.calls: list[Any] = []
        self.remove_forward_pre_hook_handles = {self: 1} if hooked else {}

    def start_param_sync(self, force_sync: bool) -> None:
        self.calls.append(("gathered", force_sync))

    def disable_forward_pre_hook(self, param_sync: bool) -> None:
        self.remove_forward_pre_hook_handles.clear()
        self.start_param_sync(force_sync=param_sync)

    def enable_forward_pre_hook(self) -> None:
        self.remove_forward_pre_hook_handles[self] = 1


@pytest.mark.parametrize("hooked", [True, False])
def test_parameters_are_gathered_once_and_hooks_are_away_while_needed(hooked):
    chunk = _Chunk(hooked)

    def fail() -> None:
        with whole_parameters([chunk]):
            assert not chunk.remove_forward_pre_hook_handles
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert chunk.calls == [("gathered", True)]
    # In the first step Megatron has taken them away itself.
    assert bool(chunk.remove_forward_pre_hook_handles) == hooked
