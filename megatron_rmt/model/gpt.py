"""The model as RMT runs it: the ``GPTModel`` inside Megatron's wrappers, and its passes' bounds."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_model import GPTModel


@dataclass(frozen=True)
class Policy:
    """The model that is trained and that generates.

    vocab_size: columns of the vocabulary that are tokens. longest_position: above every position
    id. head_chunk_size: rows of logits held at a time. attention: a name of ``--rmt-attention``.
    """

    model: GPTModel
    vocab_size: int
    longest_position: int
    head_chunk_size: int
    attention: str = "auto"

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.model.parameters()).device


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


@contextlib.contextmanager
def without_sequence_parallel(model: GPTModel) -> Iterator[None]:
    """Within, tensor-parallel ranks each hold all rows; afterwards as before, even after an error.

    A decoding step has few rows: two all-reduces a layer take half the messages of gathering and
    scattering them, and no row has to be padded. Weights are the same in both. Experts keep
    sequence parallelism, which their dispatch over tensor-parallel ranks is built on.
    """
    held: list[tuple[object, str]] = []
    if model.config.sequence_parallel and not model.config.num_moe_experts:
        modules = [*model.modules()]
        configs = {id(own): own for m in modules if (own := getattr(m, "config", None)) is not None}
        for owner in (*configs.values(), *modules):
            for name in ("sequence_parallel", "reduce_scatter_embeddings"):
                if getattr(owner, name, False) is True:
                    held.append((owner, name))
    try:
        for owner, name in held:
            setattr(owner, name, False)
        yield
    finally:
        for owner, name in held:
            setattr(owner, name, True)


@contextlib.contextmanager
def whole_parameters(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Parameters whose gathering over ranks is overlapped are whole within, and no module's forward
    looks for them; afterwards it does again, if it did."""
    hooked = [chunk for chunk in chunks if chunk.remove_forward_pre_hook_handles]
    try:
        for chunk in chunks:
            if chunk in hooked:
                chunk.disable_forward_pre_hook(param_sync=True)
            else:
                chunk.start_param_sync(force_sync=True)
        yield
    finally:
        for chunk in hooked:
            if not chunk.remove_forward_pre_hook_handles:
                chunk.enable_forward_pre_hook()
