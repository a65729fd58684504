"""Attention over a tree of tokens, for training and for generation.

The contexts of one document nest, so a document is one packed sequence: its **trunk** once, for
each chosen position a **stem** (the instruction), for each rollout of that position a **branch**.
A token sees its ancestors only. What a token may see is a ``Visibility``; it travels as Megatron's
``packed_seq_params``, never as a global, because activation recompute and pipeline schedules run
earlier micro-batches again.

Two kinds, one attention: ``TreeVisibility`` for the update (autograd, everything in one packed
sequence) and those of generation, which keep keys and values in a ``KeyValueStore`` that lives for
one step. ``attach_tree_attention`` teaches a model's own core attention, and the mixers of its
state-space layers, to follow them; calls without a visibility reach the original unchanged.
"""

import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_rmt.cpu.state_space import Lineage, State, StateSpace, mix
from megatron_rmt.model import latent_attention
from megatron_rmt.model.blocks import Block, longest_path, parents_of_rows
from megatron_rmt.model.context_parallel import RowSplit, alone, gather_keys
from megatron_rmt.model.layer_attention import LayerAttention
from megatron_rmt.model.output_processor import attach_output_processor
from megatron_rmt.model.tree_attention import TreeAttention, backend_for

# Megatron caches one rotary table per requested length: ask for few different lengths.
ROTARY_TABLE_STEP = 1024


@dataclass
class Visibility(PackedSeqParams):
    """What each token of a packed sequence ``[tokens, 1, hidden]`` may see, and its position.

    position_ids: ``[padded tokens]`` int64, the rotary position of each token.
    tokens: number of real tokens; what follows is padding, sees nothing and yields zeros.
    latents: of a layer with latent attention, ``[tokens, 1, dim]``, while it attends.
    """

    # Whether keys and values are stored, and whether stored ones are all that is attended to.
    stores: ClassVar[bool] = False
    reads_stored: ClassVar[bool] = False

    position_ids: Tensor | None = None
    tokens: int = 0
    latents: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def use_position_ids(self, position_ids: Tensor, longest: int) -> None:
        """Set ``position_ids``, all below ``longest``."""
        self.position_ids = position_ids
        # "sbhd" keeps Megatron from splitting the sequence; the lengths only size its rotary table.
        self.qkv_format = "sbhd"
        self.max_seqlen_q = -(-longest // ROTARY_TABLE_STEP) * ROTARY_TABLE_STEP
        self.max_seqlen_kv = self.max_seqlen_q
        self.cp_group = alone()

    def take_angles(self, angles: Tensor) -> bool:
        """Whether ``attend`` rotates queries and keys itself, by ``angles``
        ``[padded tokens, 1, 1, rotated dims]`` fp32; else the layers do."""
        return False

    def attend(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of ``query`` ``[tokens, heads, dim]`` over ``key``, ``value``
        ``[tokens, kv heads, dim]`` (this layer's; rotated, unless by ``take_angles``):
        ``[tokens, heads, dim]``. Values may have other dims, and so has what is returned; the same
        tensor as ``key`` if latents are both."""
        raise NotImplementedError(f"{type(self).__name__} must say how its tokens attend.")

    def mix(self, space: StateSpace, gate: Tensor, inputs: Tensor, steps: Tensor) -> Tensor:
        """What the state-space layer ``space`` makes of its tokens, each after its ancestors:
        ``[tokens, channels]``. The others as ``StateSpace.split`` returns them, ``[tokens, ...]``.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how its tokens mix.")


@dataclass
class TreeVisibility(Visibility):
    """The update's visibility: documents and chosen positions, a few integers for each.

    blocks: cover the rows of the packed sequence in order. attention: a name of
    ``--rmt-attention``. split: where context-parallel ranks share these rows, else None.
    """

    blocks: tuple[Block, ...] = ()
    attention: str = "auto"
    split: RowSplit | None = None
    # Of layers without and with windows that leave something out.
    _backends: dict[bool, TreeAttention] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _lineage: Lineage | None = field(default=None, init=False, repr=False, compare=False)

    def attend(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.split is not None:
            query, key, value = gather_keys(query, key, value, self.split)
        return self.attend_all(layer, query, key, value)

    def attend_all(
        self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """``attend`` with the keys and values of all ranks' rows."""
        window = layer.window
        if window is not None and window + 1 >= longest_path(self.blocks):
            window = None
        windowed = window is not None
        # What a backend prepares from the blocks serves all layers, and recomputed ones.
        backend = self._backends.get(windowed)
        if backend is None or backend.blocks is not self.blocks:
            kind = backend_for(self.attention, query.device, windowed=windowed)
            rows = None if self.split is None else self.split.own
            backend = self._backends[windowed] = kind(self.blocks, rows)
        return backend(query, key, value, layer.scale, window, layer.sink)

    def mix(self, space: StateSpace, gate: Tensor, inputs: Tensor, steps: Tensor) -> Tensor:
        return self.mix_all(space, gate, inputs, steps)[0]

    def mix_all(
        self, space: StateSpace, gate: Tensor, inputs: Tensor, steps: Tensor
    ) -> tuple[Tensor, State]:
        """``mix``, and the states at the ends of ``lineage``'s chunks."""
        lineage = self.lineage(space.width, inputs.device)
        return mix(space, gate, inputs, steps, lineage, space.nothing_before())

    def lineage(self, width: int, device: torch.device) -> Lineage:
        """How rows descend from each other, for layers that all have convolutions of ``width``."""
        if self._lineage is None:
            self._lineage = Lineage.of(parents_of_rows(self.blocks), width).to(device)
        return self._lineage


def attach_tree_attention(model: torch.nn.Module) -> int:
    """Let every core attention of ``model``, and every mixer of a state-space layer, follow a
    ``Visibility``; returns how many there are.

    Only ``forward`` of each such *instance* is wrapped: parameters, checkpoint keys,
    linear layers (and so FP8) and calls without a visibility stay those of the model's own spec,
    local or Transformer Engine. Harmless when called twice.

    Raises:
        ValueError: a layer's attention is of a kind that would not follow it.
    """
    attached = 0
    for module in model.modules():
        if isinstance(module, TransformerLayer):
            _check_attention(module)
        if isinstance(module, SelfAttention | MLASelfAttention):
            _follow_visibility(module)
            _mark_as_split(getattr(module.core_attention, "softmax_offset", None))
            attached += 1
        if isinstance(module, MambaMixer):
            _mix_by_visibility(module)
            attached += 1
        if isinstance(module, HybridModel):
            attach_output_processor(module)
        if hasattr(module, "rotary_pos_emb") and hasattr(module, "decoder"):
            _rotate_by_visibility(module.decoder)
        if isinstance(module, GPTModel) and module.config.mtp_num_layers:
            _hand_over_hidden(module)
            if module.mtp_process:
                _rotate_by_visibility(module.mtp)
    return attached


def _check_attention(layer: TransformerLayer) -> None:
    attention = layer.self_attention
    if not isinstance(attention, SelfAttention | MLASelfAttention | IdentityOp):
        raise ValueError(
            f"RMT: layer {layer.layer_number} has a {type(attention).__name__}, which a tree of "
            "tokens cannot be told to; pass a layer specification (--spec) with SelfAttention or "
            "MLASelfAttention."
        )
    if layer.config.fused_single_qkv_rope:
        raise ValueError(
            "RMT: fused_single_qkv_rope is on in the model's TransformerConfig, which Megatron "
            "cannot combine with packed sequences; turn it off."
        )


def _follow_visibility(attention: SelfAttention | MLASelfAttention) -> None:
    core_attention, layer = attention.core_attention, LayerAttention.of(attention)
    if getattr(core_attention.forward, "follows_visibility", False):
        return
    original = core_attention.forward
    is_latent = isinstance(attention, MLASelfAttention)
    if is_latent:
        _project_by_visibility(attention)

    @functools.wraps(original)
    def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        visibility = kwargs.get("packed_seq_params")
        if not isinstance(visibility, Visibility):
            return original(query, key, value, *args, **kwargs)
        rows, real = query.shape[0], slice(0, visibility.tokens)
        own = layer.with_sink(getattr(core_attention, "softmax_offset", None))
        query, key, value = (x[real, 0] for x in (query, key, value))
        if is_latent and visibility.reads_stored:
            query = latent_attention.absorbed(attention, query)
            output = visibility.attend(own, query, visibility.latents, visibility.latents)
            output = latent_attention.values_of(attention, output)
        else:
            output = visibility.attend(own, query, key, value)
        visibility.latents = None
        output = output.flatten(1)
        if visibility.tokens < rows:
            output = F.pad(output, (0, 0, 0, rows - visibility.tokens))
        return output[:, None]

    forward.follows_visibility = True
    core_attention.forward = forward


def _project_by_visibility(attention: MLASelfAttention) -> None:
    """Rotate by the rows' positions, and keep the latents where keys and values are stored.

    Without ``packed_seq_params``, as Megatron would take them for sequences end to end.
    """
    original = attention.get_query_key_value_tensors

    @functools.wraps(original)
    def project(
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **others: Any,
    ) -> Any:
        visibility = packed_seq_params
        if not isinstance(visibility, Visibility):
            return original(
                hidden_states, key_value_states, position_ids, packed_seq_params, **others
            )
        with latent_attention.rotating_by(
            attention, visibility.position_ids, visibility.max_seqlen_q
        ):
            found = original(hidden_states, key_value_states, position_ids, None, **others)
        query, key, *rest = found
        found = query, latent_attention.with_whole_gradient(attention, key), *rest
        if visibility.stores:
            _, key, _, _, compressed = found
            latents = latent_attention.latents(attention, key, compressed)
            visibility.latents = latents[: visibility.tokens]
        return found

    attention.get_query_key_value_tensors = project


def _mix_by_visibility(mixer: MambaMixer) -> None:
    if getattr(mixer.forward, "follows_visibility", False):
        return
    original = mixer.forward

    @functools.wraps(original)
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        visibility = kwargs.get("packed_seq_params")
        if not isinstance(visibility, Visibility):
            return original(hidden_states, *args, **kwargs)
        projected, _ = mixer.in_proj(hidden_states)
        space = StateSpace.of(mixer)
        mixed = visibility.mix(space, *space.split(projected[: visibility.tokens, 0]))
        if mixer.rmsnorm:
            mixed = mixer.norm(mixed)
        if visibility.tokens < projected.shape[0]:
            mixed = F.pad(mixed, (0, 0, 0, projected.shape[0] - visibility.tokens))
        return mixer.out_proj(mixed[:, None])

    forward.follows_visibility = True
    mixer.forward = forward


def _mark_as_split(sink: Tensor | None) -> None:
    """Say of a sink that tensor-parallel ranks share out its heads, as Megatron forgets to: it
    would leave all but the first rank's out of the gradient's norm."""
    for parameter in (sink, getattr(sink, "main_param", None)):
        if parameter is not None:
            parameter.tensor_model_parallel = True


def _hand_over_hidden(model: GPTModel) -> None:
    """Give the decoder's output to the ``output_processor`` at once, where there is a visibility.

    Megatron lets the layers of multi-token prediction run before it, over all rows and with logits
    of all of them: of rollouts, of stems and branches, too.
    """
    original = model._postprocess
    if getattr(original, "follows_visibility", False):
        return

    @functools.wraps(original)
    def postprocess(*args: Any, **kwargs: Any) -> Any:
        if not isinstance(kwargs.get("packed_seq_params"), Visibility):
            return original(*args, **kwargs)
        if not model.post_process:
            return kwargs["hidden_states"]
        tied = model.share_embeddings_and_output_weights
        return kwargs["output_processor"](
            hidden_states=kwargs["hidden_states"],
            output_layer=model.output_layer,
            output_weight=model.shared_embedding_or_output_weight() if tied else None,
            rotary_pos_emb=kwargs["rotary_pos_emb"],
            context=kwargs["output_processor_context"],
            config=model.config,
        )

    postprocess.follows_visibility = True
    model._postprocess = postprocess


def _rotate_by_visibility(decoder: torch.nn.Module) -> None:
    if getattr(decoder, "rotates_by_visibility", False):
        return
    alike = _rotates_halves_alike(decoder.config)

    def pick_positions(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        visibility, table = kwargs.get("packed_seq_params"), kwargs.get("rotary_pos_emb")
        if isinstance(visibility, Visibility) and table is not None:
            angles = table.index_select(0, visibility.position_ids)
            # Layers without angles rotate nothing.
            taken = alike and visibility.take_angles(angles)
            kwargs["rotary_pos_emb"] = None if taken else angles
        return args, kwargs

    decoder.register_forward_pre_hook(pick_positions, with_kwargs=True)
    decoder.rotates_by_visibility = True


def _rotates_halves_alike(config: TransformerConfig) -> bool:
    """Whether all layers rotate pairs half of the rotated dimensions apart, and do nothing else."""
    return not (
        config.rotary_interleaved
        or config.no_rope_freq
        # Its cosines and sines have a factor.
        or getattr(config, "yarn_rotary_scaling_factor", None)
    )
