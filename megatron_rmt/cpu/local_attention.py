"""Megatron's attention for local layers, built where Megatron leaves it to Transformer Engine's.

Where context-parallel ranks share a sequence, Megatron refuses to build it, as it would see a
rank's own part of a sequence alone. RMT's trees bring their own attention
(``model/visibility.py``) and only ask for a module that stands there, so on a CPU it may be built,
and refuses to run by itself. With latent attention Megatron hands it the widths of keys and values,
which it does not take, though it can have keys of any width.
"""

import copy
import functools
from typing import Any, NoReturn


def install() -> None:
    """Let it be built; harmless when called twice."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    original = DotProductAttention.__init__
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def construct(
        self: Any,
        config: Any,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **named: Any,
    ) -> None:
        if v_channels is not None:
            config = copy.copy(config)
            # Which it takes for the width of what it returns.
            config.kv_channels = v_channels
        if config.context_parallel_size == 1:
            original(self, config, *args, **named)
            return
        of_one_rank = copy.copy(config)
        of_one_rank.context_parallel_size = 1
        original(self, of_one_rank, *args, **named)
        self.config = config
        self.forward = _refuse

    DotProductAttention.__init__ = construct


def _refuse(*args: Any, **named: Any) -> NoReturn:
    raise RuntimeError(
        "Megatron's own attention was reached with --context-parallel-size above 1, which on a CPU "
        "only RMT's trees can have; train with --rmt, and with --eval-iters 0."
    )
