"""Megatron's expert routers: what RMT asks of them, and what they need for an update over trees.

Rollouts route a token among a few others, the update among a whole tree, and both must send it to
the same experts: these have to depend on the token and the weights alone.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

_NOISE = "it draws noise, in the update other than in the rollouts"
_DROPS = "which tokens are dropped depends on the others, and rollouts route fewer than the update"
# The name of an option, what leaves it out, and why RMT does.
_REFUSED: tuple[tuple[str, Any, str], ...] = (
    ("moe_input_jitter_eps", None, _NOISE),
    ("moe_router_force_load_balancing", False, _NOISE),
    ("moe_router_force_biased", None, _NOISE),
    ("moe_expert_capacity_factor", None, _DROPS),
    ("moe_expert_rank_capacity_factor", None, _DROPS),
    ("moe_enable_routing_replay", False, "what it replays belongs to other tokens than a tree's"),
)
_REFUSED_BALANCE = {
    "sinkhorn": "it balances the tokens of a pass, and rollouts route others than the update",
    "quantile_balancing": "it takes no padding, and only numbers of tokens that experts divide",
}


def routing_problems(options: Any) -> Iterator[str]:
    """How a mixture of experts would route that RMT cannot follow, one sentence each.

    options: Megatron's arguments, or a model's ``TransformerConfig``, of a mixture of experts.
    """
    for name, absent, reason in _REFUSED:
        value = getattr(options, name, absent)
        # Megatron takes a negative capacity for none.
        if value == absent or (name == "moe_expert_capacity_factor" and value < 0):
            continue
        yield f"--{name.replace('_', '-')} is {value}; RMT needs it left out: {reason}."
    kinds = options.moe_router_load_balancing_type
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind in _REFUSED_BALANCE:
            yield (
                f"--moe-router-load-balancing-type is {kind}; {_REFUSED_BALANCE[kind]}: pass none, "
                "aux_loss, seq_aux_loss or global_aux_loss, or --moe-router-enable-expert-bias."
            )
    size, dispatcher = options.expert_model_parallel_size, options.moe_token_dispatcher_type
    if size == 1:
        return
    if dispatcher == "allgather":
        yield (
            "--moe-token-dispatcher-type is allgather; with --expert-model-parallel-size "
            f"{size} ranks hold different numbers of rollouts, pass alltoall."
        )
    if (
        dispatcher == "flex"
        and options.moe_flex_dispatcher_backend == "hybridep"
        and not options.moe_hybridep_pad_uneven_dispatch_inputs
    ):
        yield (
            "--moe-flex-dispatcher-backend is hybridep; with --expert-model-parallel-size "
            f"{size} ranks hold different numbers of rollouts, pass "
            "--moe-hybridep-pad-uneven-dispatch-inputs."
        )


def check_routing(config: TransformerConfig) -> None:
    """Refuse a model whose routers RMT cannot follow.

    Raises:
        ValueError: see ``routing_problems``.
    """
    problems = [*routing_problems(config)] if config.num_moe_experts else []
    if problems:
        raise ValueError("RMT cannot train this model: " + " ".join(problems))


def padding_mask(
    rows: int, tokens: int, config: TransformerConfig, *, embeds: bool
) -> Tensor | None:
    """``[1, rows]`` bool on the CPU, True from ``tokens`` on, which routers leave out: as
    ``GPTModel.forward`` takes it, ``[1, rows/tp]`` where its layers get their own part of the rows.
    embeds: it is of the model, or of the chunk, that has the embedding. None if there is no padding
    or nobody asks."""
    if not config.num_moe_experts or rows == tokens:
        return None
    mask = (torch.arange(rows) >= tokens)[None]
    # Under sequence parallelism the first chunk divides the mask like the embeddings; the others
    # get their hidden states, and hand the mask on as it is.
    if config.sequence_parallel and not embeds:
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
    Under sequence parallelism the z-loss is the mean of the tensor-parallel ranks' means, as in
    Megatron, so that the tokens of a rank with padding weigh more.
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
