"""Hidden states of the last layer, where a model hands them out: one hook for all models.

``GPTModel.forward`` takes an ``output_processor``, which is called with the hidden states in the
place of the output layer and the loss; its return is the model's. ``HybridModel`` of Megatron 0.19
has none, and gets the same one here.
"""

import functools
from collections.abc import Callable
from typing import Any

from megatron.core.models.hybrid.hybrid_model import HybridModel


def attach_output_processor(model: HybridModel) -> None:
    """Let ``model.forward`` take ``output_processor`` and ``output_processor_context``, as that of
    ``GPTModel``; without the former it is as it was. Harmless when called twice."""
    if getattr(model.forward, "takes_output_processor", False):
        return
    original = model.forward

    @functools.wraps(original)
    def forward(
        *args: Any,
        output_processor: Callable[..., Any] | None = None,
        output_processor_context: Any = None,
        **kwargs: Any,
    ) -> Any:
        if output_processor is None or not model.post_process:
            return original(*args, **kwargs)
        # A chunk that is not the last one returns hidden states; the decoder, which has the final
        # norm, knows by itself that it is.
        model.post_process = False
        try:
            hidden = original(*args, **kwargs)
        finally:
            model.post_process = True
        tied = model.share_embeddings_and_output_weights
        return output_processor(
            hidden_states=hidden,
            output_layer=model.output_layer,
            output_weight=model.shared_embedding_or_output_weight() if tied else None,
            context=output_processor_context,
            config=model.config,
        )

    forward.takes_output_processor = True
    model.forward = forward
