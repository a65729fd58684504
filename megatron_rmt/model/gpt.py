"""The model as RMT runs it: the ``GPTModel`` or ``HybridModel`` inside Megatron's wrappers, and its
passes' bounds.

With virtual pipeline stages a rank holds several chunks of it, ``ModelChunks``; whoever only walks
over modules or parameters need not tell.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class ModelChunks(torch.nn.ModuleList):
    """The chunks of a model that one pipeline rank holds, in the order of their layers."""

    @property
    def config(self) -> TransformerConfig:
        """That of all chunks."""
        return self[0].config

    def sharded_state_dict(self) -> dict[str, Any]:
        """Of all chunks, under the names that ``state_dict`` has here and the keys of Megatron's
        checkpoints."""
        return {
            f"{index}.{name}": value
            for index, chunk in enumerate(self)
            for name, value in chunk.sharded_state_dict().items()
        }


Chunk = GPTModel | HybridModel
Model = Chunk | ModelChunks


@dataclass(frozen=True)
class Policy:
    """The model that is trained and that generates.

    vocab_size: columns of the vocabulary that are tokens. longest_position: above every position
    id. head_chunk_size: rows of logits held at a time. attention: a name of ``--rmt-attention``.
    """

    model: Model
    vocab_size: int
    longest_position: int
    head_chunk_size: int
    attention: str = "auto"

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.model.parameters()).device


def gpt_model(chunks: Sequence[torch.nn.Module]) -> Model:
    """The model inside Megatron's wrappers; of the same chunks the same object each time.

    Raises:
        ValueError: another kind of model.
    """
    models = tuple(map(_unwrapped, chunks))
    return models[0] if len(models) == 1 else _joined(models)


def _unwrapped(model: torch.nn.Module) -> Chunk:
    while not isinstance(model, Chunk) and hasattr(model, "module"):
        model = model.module
    if not isinstance(model, Chunk):
        raise ValueError(
            f"RMT: the model is a {type(model).__name__}; RMT trains a GPTModel or a HybridModel."
        )
    return model


# What is kept for a model is found by the object.
@functools.lru_cache(maxsize=1)
def _joined(chunks: tuple[Chunk, ...]) -> ModelChunks:
    return ModelChunks(chunks)


def chunks_of(model: Model) -> list[Chunk]:
    """What this rank holds of the model, in the order of the layers: one chunk or several."""
    return [*model] if isinstance(model, ModelChunks) else [model]


def decoder_modules(model: Model) -> Iterator[torch.nn.Module]:
    """The modules that every pass runs; the layers of multi-token prediction are not among them."""
    for chunk in chunks_of(model):
        yield from chunk.decoder.modules()


def all_rows(hidden: Tensor, config: TransformerConfig) -> Tensor:
    """The decoder's output ``[rows (/tp under sequence parallel), 1, hidden]`` of all rows.

    Backward takes this rank's share of a gradient that all tensor-parallel ranks hold alike.
    """
    if not config.sequence_parallel:
        return hidden
    return tensor_parallel.gather_from_sequence_parallel_region(
        hidden, tensor_parallel_output_grad=False
    )


def named_parameters(
    chunks: Sequence[torch.nn.Module],
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of a rank's chunks by name, without those of Megatron's wrappers; of several
    chunks with the chunk's number before it."""
    for index, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            of_chunk = f"{index}." if len(chunks) > 1 else ""
            yield of_chunk + name.removeprefix("module."), parameter


@contextlib.contextmanager
def generating(model: Model) -> Iterator[None]:
    """Evaluation mode for rollouts; the training mode comes back even after an error."""
    chunks = chunks_of(model)
    was_training = chunks[0].training
    quantized = model.config.fp8 or model.config.fp4
    if quantized:
        # Transformer Engine would go on with weights quantized before the last optimizer step.
        for chunk in chunks:
            chunk.set_is_first_microbatch()
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
def without_sequence_parallel(model: Model) -> Iterator[None]:
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
