"""The ``GPTModel`` inside Megatron's wrappers, and its state while rollouts are generated."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from megatron.core.models.gpt.gpt_model import GPTModel


def gpt_model(chunks: Sequence[torch.nn.Module]) -> GPTModel:
    """The ``GPTModel`` inside Megatron's wrappers.

    Raises:
        ValueError: another kind of model, or several chunks (virtual pipeline).
    """
    if len(chunks) != 1:
        raise ValueError(
            f"RMT: this rank holds {len(chunks)} model chunks; leave out virtual pipeline stages."
        )
    model = chunks[0]
    while not isinstance(model, GPTModel) and hasattr(model, "module"):
        model = model.module
    if not isinstance(model, GPTModel):
        raise ValueError(f"RMT: the model is a {type(model).__name__}; RMT trains a GPTModel.")
    return model


@contextlib.contextmanager
def generating(model: GPTModel) -> Iterator[None]:
    """Evaluation mode for rollouts; the training mode comes back even after an error."""
    was_training = model.training
    quantized = model.config.fp8 or model.config.fp4
    if quantized:
        # Transformer Engine would go on with weights quantized before the last optimizer step.
        model.set_is_first_microbatch()
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        if quantized:
            # Made without gradient they may lack what the backward pass needs.
            for module in model.modules():
                getattr(module, "_fp8_workspaces", {}).clear()
