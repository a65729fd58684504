"""Megatron's expert routers during the update, whose micro-batches are trees."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def padding_mask(rows: int, tokens: int, config: TransformerConfig) -> Tensor | None:
    """``[1, rows]`` bool on the CPU, True from ``tokens`` on, which routers leave out: as
    ``GPTModel.forward`` of this pipeline stage takes it, ``[1, rows/tp]`` where its layers get
    their own part of the rows. None if there is no padding or nobody asks."""
    if not config.num_moe_experts or rows == tokens:
        return None
    mask = (torch.arange(rows) >= tokens)[None]
    # Under sequence parallelism the first stage divides the mask like the embeddings; the others
    # get their hidden states, and hand the mask on as it is.
    if config.sequence_parallel and not parallel_state.is_pipeline_first_stage():
        mask = mask.chunk(parallel_state.get_tensor_model_parallel_world_size(), dim=1)[
            parallel_state.get_tensor_model_parallel_rank()
        ]
    return mask


@contextlib.contextmanager
def counting_trees(model: torch.nn.Module) -> Iterator[None]:
    """Within, forward and backward, the routers of ``model`` suit an update over trees.

    Their losses count every micro-batch alike: with ``--calculate-per-token-loss`` Megatron
    multiplies them by the tokens of the micro-batch, because it divides all gradients by the tokens
    that are reported, and a tree reports one, its loss being weighted already. And the expert bias
    leaves padding out: Megatron 0.19 lays its mask ``[tokens]`` over ``[tokens, experts]`` wrongly.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    before = [router.calculate_per_token_loss for router in routers]
    biased = [router for router in routers if getattr(router, "enable_expert_bias", False)]
    for router in routers:
        router.calculate_per_token_loss = False
    for router in biased:
        router._apply_expert_bias = _with_mask_of_rows(router._apply_expert_bias)
    try:
        yield
    finally:
        for router, per_token in zip(routers, before, strict=True):
            router.calculate_per_token_loss = per_token
        for router in biased:
            del router._apply_expert_bias


def _with_mask_of_rows(count: Callable[..., None]) -> Callable[..., None]:
    def count_rows(routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        count(routing_map, None if padding_mask is None else padding_mask[:, None])

    return count_rows
