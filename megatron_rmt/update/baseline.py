"""A moving average of the weights, whose own prediction a thought is measured against.

RLP (arXiv 2510.01265) takes log p(truth | text) by such an average instead of the policy, so that a
policy that only gets better at the text itself earns nothing by it. It is the one thing of RMT that
a run carries from step to step, so it is saved and restored with the checkpoint.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.models.gpt.gpt_model import GPTModel

PREFIX = "rmt_baseline."


class Baseline:
    """decay * average + (1 - decay) * weights, from step to step, in fp32 or wider on the device.

    It begins as the weights at hand, which ``follow`` joins in from the second step on; after
    ``load`` from the first one on.
    """

    def __init__(self, model: GPTModel, decay: float) -> None:
        self.model, self.decay = model, decay
        self._averages = [
            weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            for weight in model.parameters()
        ]
        self._is_of_this_step = True

    @torch.no_grad()
    def follow(self) -> None:
        """Take in the weights as they are before a step."""
        if not self._is_of_this_step:
            for average, weight in zip(self._averages, self.model.parameters(), strict=True):
                average.lerp_(weight.to(average.dtype), 1 - self.decay)
        self._is_of_this_step = False

    @contextlib.contextmanager
    def in_place_of_the_weights(self, *, rounded: bool = True) -> Iterator[None]:
        """The model computes with the average. rounded: to the dtype of the weights."""
        weights = list(self.model.parameters())
        own = [weight.data for weight in weights]
        for weight, average in zip(weights, self._averages, strict=True):
            weight.data = average.to(weight.dtype) if rounded else average
        try:
            yield
        finally:
            for weight, data in zip(weights, own, strict=True):
                weight.data = data

    def sharded_state(self) -> dict[str, Any]:
        """The average as Megatron's distributed checkpoints keep a model, under ``PREFIX``."""
        with self.in_place_of_the_weights(rounded=False):
            named = {
                name: value
                for name, value in self.model.sharded_state_dict().items()
                if not name.endswith("_extra_state")
            }
            # Else they would hold the parameters, which soon hold the weights again.
            dict_list_map_inplace(_detached, named)
        add_prefix_for_sharding(named, PREFIX)
        return named

    def load(self, checkpoint: Path) -> bool:
        """Go on from the average in a checkpoint's folder; whether it holds one. Collective."""
        stored = dist_checkpointing.load_tensors_metadata(str(checkpoint))
        if not any(name.startswith(PREFIX) for name in stored):
            return False
        loaded = dist_checkpointing.load(self.sharded_state(), str(checkpoint))
        with self.in_place_of_the_weights(rounded=False):
            self.model.load_state_dict(loaded, strict=False)
        self._is_of_this_step = False
        return True


def _detached(sharded: Any) -> Any:
    sharded.data = sharded.data.detach()
    return sharded
