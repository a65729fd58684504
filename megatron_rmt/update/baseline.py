"""A moving average of the weights, whose own prediction a thought is measured against.

RLP (arXiv 2510.01265) takes log p(truth | text) by such an average instead of the policy, so that a
policy that only gets better at the text itself earns nothing by it. It is the one thing of RMT that
a run carries from step to step, so it is saved and restored with the checkpoint.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from torch import Tensor

from megatron_rmt.model.gpt import Model

PREFIX = "rmt_baseline."


class Baseline:
    """decay * average + (1 - decay) * weights, from step to step, in fp32 or wider on the device.

    It begins as the weights at hand. Within a step it counts the step's weights already, but only
    ``take_in`` keeps them: a step that is left to the next run leaves no trace.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.model, self.decay = model, decay
        self._averages = [
            weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            for weight in model.parameters()
        ]
        self._is_of_this_step = True

    @torch.no_grad()
    def take_in(self) -> None:
        """Keep the weights of this step, before they move: the step will be taken."""
        if not self._is_of_this_step:
            for average, weight in zip(self._averages, self.model.parameters(), strict=True):
                average.copy_(self._with(average, weight))
        self._is_of_this_step = False

    def _with(self, average: Tensor, weight: Tensor) -> Tensor:
        return average.lerp(weight.detach().to(average.dtype), 1 - self.decay)

    @contextlib.contextmanager
    def in_place_of_the_weights(self) -> Iterator[None]:
        """The model computes with the average of this step, rounded to the dtype of the weights."""
        pairs = zip(self._averages, self.model.parameters(), strict=True)
        of_step = (
            (average if self._is_of_this_step else self._with(average, weight)).to(weight.dtype)
            for average, weight in pairs
        )
        with self._holding([*of_step]):
            yield

    @contextlib.contextmanager
    def _holding(self, values: Sequence[Tensor]) -> Iterator[None]:
        weights = list(self.model.parameters())
        own = [weight.data for weight in weights]
        for weight, value in zip(weights, values, strict=True):
            weight.data = value
        try:
            yield
        finally:
            for weight, data in zip(weights, own, strict=True):
                weight.data = data

    def sharded_state(self) -> dict[str, Any]:
        """The average as Megatron's distributed checkpoints keep a model, under ``PREFIX``."""
        with self._holding(self._averages):
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
        with self._holding(self._averages):
            self.model.load_state_dict(loaded, strict=False)
        self._is_of_this_step = False
        return True


def _detached(sharded: Any) -> Any:
    sharded.data = sharded.data.detach()
    return sharded
