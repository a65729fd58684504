"""The layers of a dense model while rollouts are decoded on a CPU, without Python in them.

A decoding step has few rows: Megatron's modules and the calls of their operations take longer than
the arithmetic. So a layer's own forward is recorded once, as two graphs of tensor operations, what
comes before its core attention and what comes after, and compiled (``cpu.compiled``). All layers of
a model share the graphs; weights are their inputs, so that they are always the training weights.

Recorded are layers without collectives and without experts, at one tensor-parallel rank. Others,
and all where nothing can be compiled, run as Megatron wrote them; so does everything on a GPU. Of
Megatron only ``forward`` of the layers is replaced, while rollouts run, and while they are recorded
``make_viewless_tensor``.
"""

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from megatron.core.transformer import transformer_layer
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from megatron_rmt.cpu import compiled, layer_kernels
from megatron_rmt.model.gpt import Model, decoder_modules
from megatron_rmt.model.visibility import Visibility
from megatron_rmt.rollout.kv_cache import DecodeVisibility, StemVisibility


@dataclass(frozen=True)
class _Graph:
    """A compiled part of a layer, of those tensors (what the attention found, the inputs, the
    parameters) that it ``reads``."""

    function: Callable[..., Any]
    reads: tuple[int, ...]

    def __call__(self, tensors: Sequence[Tensor | None]) -> Any:
        return self.function(*[tensors[index] for index in self.reads])


# Of each model, by the kind of layer, see ``_record``; None where the recording failed.
_Graphs = tuple[_Graph, _Graph]
_recorded: WeakKeyDictionary[Model, dict[Any, _Graphs | None]] = WeakKeyDictionary()


@contextlib.contextmanager
def captured_layers(model: Model) -> Iterator[None]:
    """Within, passes over stems and over new tokens, without gradient, run captured layers."""
    recorded = _recorded.setdefault(model, {})
    layers = [layer for layer in decoder_modules(model) if _can_be_captured(layer)]
    for layer in layers:
        parameters = [parameter.detach() for parameter in layer.parameters()]
        kind = layer.training, *((x.shape, x.dtype) for x in parameters)
        layer.forward = functools.partial(_forward, layer, parameters, kind, recorded)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _can_be_captured(layer: torch.nn.Module) -> bool:
    return (
        type(layer) is TransformerLayer
        and compiled.is_available()
        and next(layer.parameters()).device.type == "cpu"
        and not layer.is_moe_layer
        and layer.config.tensor_model_parallel_size == 1
        # Else the number of a layer says whether it rotates.
        and not layer.config.no_rope_freq
        and isinstance(layer.self_attention, SelfAttention)
        and isinstance(layer.cross_attention, IdentityOp)
        and next(layer.buffers(), None) is None
        # Else somebody else has wrapped it.
        and "forward" not in vars(layer)
    )


def _forward(
    layer: TransformerLayer,
    parameters: Sequence[Tensor],
    kind: Any,
    recorded: dict[Any, _Graphs | None],
    hidden_states: Tensor,
    *,
    packed_seq_params: Any = None,
    rotary_pos_emb: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """In the place of ``TransformerLayer.forward``."""
    visibility, angles = packed_seq_params, rotary_pos_emb
    known = isinstance(visibility, StemVisibility | DecodeVisibility) and angles is not None
    graphs = None
    if known and all(value is None for value in others.values()):
        # The embedding's have another stride in the dimension that has one element.
        hidden = hidden_states[:, 0, None]
        inputs = hidden, angles, *layer_kernels.cosine_and_sine(angles, hidden.dtype)
        if kind not in recorded:
            try:
                recorded[kind] = _record(layer, visibility, inputs, parameters)
            except Exception as error:
                # Whatever a layer does that cannot be recorded, Megatron itself can do.
                message = f"decoding runs uncaptured layers, which is slower: {error}"
                warnings.warn(message, stacklevel=2)
                recorded[kind] = None
        graphs = recorded[kind]
    if graphs is None:
        return TransformerLayer.forward(
            layer, hidden_states, packed_seq_params=visibility, rotary_pos_emb=angles, **others
        )
    before, after = graphs
    query, key, value = before((None, *inputs, *parameters))
    attended = layer.self_attention.core_attention(
        query, key, value, attention_mask=None, packed_seq_params=visibility
    )
    return after((attended, *inputs, *parameters)), None


class _AttentionReachedError(Exception):
    """The arguments: query, key and value."""


class _Part(torch.nn.Module):
    """``layer`` up to its core attention, or from there on, given what that has found."""

    def __init__(self, layer: TransformerLayer, visibility: Visibility) -> None:
        super().__init__()
        self.layer = layer
        self.visibility = visibility

    def forward(
        self, attended: Tensor | None, hidden: Tensor, angles: Tensor, cosine: Tensor, sine: Tensor
    ) -> Any:
        layer_kernels.use_cosine_and_sine(angles, cosine, sine)

        def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
            if attended is None:
                raise _AttentionReachedError(query, key, value)
            return attended

        with (
            _replaced(self.layer.self_attention.core_attention, "forward", attend),
            # That would assign data, only to hide from autograd that a tensor is a view.
            _replaced(transformer_layer, "make_viewless_tensor", lambda inp, **_: inp),
        ):
            try:
                return TransformerLayer.forward(
                    self.layer,
                    hidden,
                    attention_mask=None,
                    rotary_pos_emb=angles,
                    packed_seq_params=self.visibility,
                )[0]
            except _AttentionReachedError as reached:
                return reached.args


@contextlib.contextmanager
def _replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _record(
    layer: TransformerLayer,
    visibility: Visibility,
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
) -> _Graphs:
    """The layer up to its core attention and from there on, from running it without data.

    inputs: hidden states ``[rows, 1, hidden]``, rotary angles, their cosines and sines. The first
    graph reads those to query, key and value, the second also what the attention found, to hidden
    states.
    """
    part = _Part(layer, visibility)
    names = [f"layer.{name}" for name, _ in layer.named_parameters()]
    count = 1 + len(inputs)

    def run(*tensors: Tensor | None) -> Any:
        own = dict(zip(names, tensors[count:], strict=True))
        return functional_call(part, own, tensors[:count])

    def graph(tensors: Sequence[Tensor | None]) -> _Graph:
        recorded = make_fx(run, tracing_mode="symbolic")(*tensors)
        # What this part computes for the other one alone.
        recorded.graph.eliminate_dead_code()
        reads = []
        for index, node in enumerate(recorded.graph.find_nodes(op="placeholder")):
            if node.users:
                reads.append(index)
            else:
                recorded.graph.erase_node(node)
        recorded.recompile()
        part_of_layer = _Graph(compiled.compile_loop(recorded.forward), tuple(reads))
        for index in reads:
            if index < count:
                # One compilation serves all numbers of rows.
                torch._dynamo.mark_dynamic(tensors[index], 0)
        part_of_layer(tensors)
        return part_of_layer

    # A number of rows that is also another size would be taken for that, and 1 for a constant.
    sizes = {size for x in (*inputs, *parameters) for size in x.shape}
    rows = next(number for number in itertools.count(8) if number not in sizes)
    inputs = [x.new_zeros(rows, *x.shape[1:]) for x in inputs]
    attention = layer.config.num_attention_heads * layer.config.kv_channels
    attended = inputs[0].new_zeros(rows, 1, attention)
    return graph([None, *inputs, *parameters]), graph([attended, *inputs, *parameters])
