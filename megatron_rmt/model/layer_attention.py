"""How a layer attends, apart from queries, keys, values and what a token's ancestors are."""

import math
from dataclasses import dataclass, replace

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor


@dataclass(frozen=True)
class LayerAttention:
    """One layer's.

    number: of the layer in the whole model, from 1. scale: of the scores. window: a token sees
    itself and so many of its ancestors, the nearest (Megatron's ``--window-size`` on the left);
    None: all of them. sink: ``[heads]``, of this rank, the score of a key that every token sees
    beside its ancestors and whose value is zero (Megatron's ``--softmax-type``); None: no such key.
    """

    number: int
    scale: float
    window: int | None = None
    sink: Tensor | None = None

    @classmethod
    def of(cls, attention: SelfAttention | MLASelfAttention) -> "LayerAttention":
        """As the model's own configuration says."""
        config, number = attention.config, attention.layer_number
        skip = config.window_attn_skip_freq
        windowed = is_layer_window_attention(config.window_size, skip, number)
        if isinstance(attention, MLASelfAttention):
            scale = attention.softmax_scale
        else:
            width = attention.hidden_size_per_attention_head
            scale = config.softmax_scale or 1.0 / math.sqrt(width)
        return cls(
            number,
            scale,
            config.window_size[0] if windowed else None,
        )

    def with_sink(self, sink: Tensor | None) -> "LayerAttention":
        """The same with a ``sink``."""
        return self if sink is None else replace(self, sink=sink)
