"""Routing of a mixture of experts where no router computes: every expert gets its equal part.

Megatron's own token dispatcher goes its way, with its copies to the host and its waits; what it
would read there, how many tokens go where, is put on the device in advance.
"""

from typing import Any

import torch
from torch import Tensor


def route_evenly() -> None:
    """Let Megatron's all-to-all dispatcher find equal parts, on this rank and from the others."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    preprocess = MoEAlltoAllTokenDispatcher.preprocess

    def preprocessed(dispatcher: Any, routing_map: Tensor) -> Tensor:
        found = preprocess(dispatcher, routing_map)
        tokens, experts = routing_map.shape
        routed = tokens * dispatcher.config.moe_router_topk
        own = torch.arange(experts)
        counts = routed // experts + (own < routed % experts).long()
        first = dispatcher.local_expert_indices[0]
        local = counts[first : first + dispatcher.num_local_experts]
        ranks, tp = dispatcher.ep_size, dispatcher.tp_size
        per_rank = torch.stack([local] * ranks * tp)
        if ranks * tp > 1:
            dispatcher.input_splits = counts.view(ranks, -1).sum(1).cuda()
            dispatcher.output_splits = per_rank[:ranks].sum(1).cuda()
            dispatcher.output_splits_tp = (local.sum() * ranks).repeat(tp).cuda()
        if dispatcher.num_local_experts > 1:
            dispatcher.num_global_tokens_per_local_expert = per_rank.cuda()
        return per_rank.sum(0).to(found.device)

    MoEAlltoAllTokenDispatcher.preprocess = preprocessed
