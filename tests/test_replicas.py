"""The numbers by which ranks compare their copies of parameters."""

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_rmt.update import replicas
from tests.distributed import run_distributed

pytestmark = pytest.mark.faults


def _bits(*parameters: Tensor, iteration: int = 0) -> int:
    return int(replicas._sum_of_bits(parameters, iteration))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_smallest_change_of_one_element_is_seen(dtype):
    weights = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    changed = weights.clone()
    changed[1, 7] = torch.nextafter(changed[1, 7].float(), torch.tensor(9.0)).to(dtype)
    if dtype == torch.bfloat16:
        changed[1, 7] = weights[1, 7] * (1 + 2**-7)
    assert _bits(weights) == _bits(weights.clone())
    assert _bits(weights) != _bits(changed)
    assert _bits(weights) != _bits(weights.flip(1)), "two that changed places"
    assert _bits(weights, weights) != _bits(weights, changed)


def test_every_element_is_compared_in_some_step(monkeypatch):
    monkeypatch.setattr(replicas, "SAMPLE", 16)
    weights = torch.rand(100)
    for index in range(100):
        changed = weights.clone()
        changed[index] += 1
        seen = [_bits(weights, iteration=i) != _bits(changed, iteration=i) for i in range(25)]
        assert any(seen), index
        assert not all(seen)


def test_no_parameter_and_an_empty_one_have_a_number():
    assert _bits() == _bits(torch.empty(0)) == 0


def test_parameters_are_shared_by_tensor_parallel_ranks_data_parallel_ones_or_experts_alone():
    model, kinds = torch.nn.Module(), ("norm", "split", "expert", "quantized")
    model.experts = torch.nn.Module()
    for name in kinds:
        numbers = torch.zeros(2, dtype=torch.int8 if name == "quantized" else torch.float32)
        parameter = torch.nn.Parameter(numbers, requires_grad=False)
        parameter.tensor_model_parallel = name == "split"
        parameter.allreduce = name != "expert"
        (model.experts if name == "expert" else model).register_parameter(name, parameter)
    outer = torch.nn.Module()
    outer.layer = model
    whole, replicated, experts = map(set, replicas._shared(outer))
    assert whole == {"layer.norm"}
    assert replicated == {"layer.norm", "layer.split"}
    assert experts == {"layer.experts.expert"}


def _apart(factor: float) -> int:
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    group = parallel_state.get_tensor_model_parallel_group()
    weights = torch.rand(64, generator=torch.Generator().manual_seed(0))
    own = weights * factor if group.rank() == 1 else weights
    return int(replicas._own_number_if_apart([torch.ones(3), own], group))


@pytest.mark.multiprocess
def test_norms_that_differ_by_more_than_rounding_are_apart():
    assert run_distributed(2, _apart, 1.01) == [1, 2]
    assert run_distributed(2, _apart, 1.0) == [0, 0]
    assert run_distributed(2, _apart, 1 + 1e-5) == [0, 0]
