"""Which parameters several ranks hold alike, and numbers by which their copies are compared.

Tensor-parallel ranks hold all that is not split: norms, routers, biases. Their gradients are
computed on each rank by itself, so rounding may part them a little. Data-parallel ranks hold
everything, bit for bit, as do the first and last pipeline stage a tied embedding.
"""

import functools
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_rmt.model.gpt import Model, chunks_of
from megatron_rmt.update.agreement import Copy, first_rank

# Of each parameter so many elements are compared in a step, and others in the next.
SAMPLE = 4096
# Largest relative difference of a parameter's norm over tensor-parallel ranks. Rounding stays below
# 1e-4, also where a norm of 128 numbers is kept in bf16.
TOLERANCE = 1e-3

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def copies_of_parameters(model: Model, iteration: int) -> list[Copy]:
    """What this rank shares with others of ``model``; nothing in a run of one process.

    The weights must be whole: no gathering may be on its way. Collective over the tensor-parallel
    ranks; does not wait for the device.
    """
    if dist.get_world_size() == 1:
        return []
    whole, replicated, experts = _shared(model)
    tensor_parallel = parallel_state.get_tensor_model_parallel_group()
    copies = [
        _bits(
            "parameters that data-parallel ranks hold alike",
            replicated,
            iteration,
            first_rank(parallel_state.get_data_parallel_group()),
        ),
        Copy(
            "parameters that tensor-parallel ranks hold alike",
            _own_number_if_apart(whole.values(), tensor_parallel),
            first_rank(tensor_parallel),
            lambda: {
                name: float(f"{float(own.detach().float().norm()):.3g}")
                for name, own in whole.items()
            },
        ),
    ]
    if model.config.num_moe_experts:
        group = parallel_state.get_expert_data_parallel_group()
        copies.append(_bits("experts that ranks hold alike", experts, iteration, first_rank(group)))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        shared, group = {}, dist.get_rank()
        ends = [chunk for chunk in chunks_of(model) if chunk.pre_process or chunk.post_process]
        if (
            ends
            and ends[0].share_embeddings_and_output_weights
            and parallel_state.is_rank_in_embedding_group()
        ):
            weight = ends[0].shared_embedding_or_output_weight().detach()
            shared = {"the tied embedding": weight}
            group = first_rank(parallel_state.get_embedding_group())
        copies.append(_bits("the embedding of two pipeline stages", shared, iteration, group))
    return copies


@functools.lru_cache(maxsize=1)
def _shared(model: Model) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Parameters by name: those that tensor-parallel ranks hold whole; all but experts; experts.

    Quantized ones are left out: their bits are not a tensor's.
    """
    whole, replicated, experts = {}, {}, {}
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not Tensor or parameter.element_size() not in _BITS:
            continue
        of_data_parallel = replicated if getattr(parameter, "allreduce", True) else experts
        of_data_parallel[name] = parameter
        if not getattr(parameter, "tensor_model_parallel", False) and ".experts." not in name:
            whole[name] = parameter
    return whole, replicated, experts


def _bits(what: str, parameters: Mapping[str, Tensor], iteration: int, group: int) -> Copy:
    """A sample of each of ``parameters``, which must be equal bit for bit."""

    def parts() -> dict[str, float]:
        return {name: int(_sum_of_bits([own], iteration)) for name, own in parameters.items()}

    return Copy(what, _sum_of_bits(parameters.values(), iteration), group, parts)


@torch.no_grad()
def _sum_of_bits(parameters: Iterable[Tensor], iteration: int) -> Tensor:
    """0-d int64: the samples' bit patterns, weighted by their places."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for own in parameters:
        first = iteration * SAMPLE % max(1, own.numel())
        by_dtype.setdefault(own.dtype, []).append(own.reshape(-1)[first : first + SAMPLE])
    total = torch.zeros((), dtype=torch.int64, device=torch.cuda.current_device())
    for samples in by_dtype.values():
        bits = torch.cat(samples)
        bits = bits.view(_BITS[bits.element_size()]).long()
        total = total + (bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum()
    return total


def _own_number_if_apart(parameters: Iterable[Tensor], group: dist.ProcessGroup) -> int | Tensor:
    """0 where all ranks of ``group`` have found their norms alike, else 1 + the rank in it."""
    parameters = [*parameters]
    if group.size() == 1 or not parameters:
        return 0
    norms = torch.stack(torch._foreach_norm(parameters, 2, dtype=torch.float32))
    ends = torch.cat([norms, -norms])
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = ends[: len(norms)], -ends[len(norms) :]
    apart = (largest - smallest > TOLERANCE * largest).any()
    return apart.long() * (1 + group.rank())
