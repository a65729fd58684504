"""How Hugging Face and Megatron name, shape and pack the same weights: one table per family.

Each row of a family's table pairs one tensor of a Megatron checkpoint with the Hugging Face tensors
that it is made of. Both directions of ``convert_checkpoint.py`` walk the same rows, so whatever is
packed here is also unpacked here. Nothing in this module reads or writes a file.

Megatron keys are those of a ``torch_dist`` checkpoint (``GPTModel.sharded_state_dict``). The local
and the Transformer Engine layer specification, grouped and sequential experts have the same, but
for the norm before experts (see ``Weight.alias``). The tensors of all layers are stacked under one
key, ``[layers, ...]``, those of experts ``[layers, experts, ...]``; a row is one place of the
stack. Where layers differ from one another each has keys of its own, with its number.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

# Where a tensor is in its stack: (), (layer,) or (layer, expert).
Place = tuple[int, ...]

LAYER = "model.layers.{layer}."
LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Yarn:
    """Rotary scaling by YaRN (arXiv 2309.00071), in Megatron's terms.

    Wavelengths that fit ``beta_fast`` times into the original context are kept, those that fit
    ``beta_slow`` times are stretched by ``factor``. rounds: the bounds of the dimensions between.
    """

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    rounds: bool
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class Latent:
    """Sizes of latent attention: of the latents of queries, and of keys and values, and
    for each head of what is not rotated, what is, and its value."""

    query: int
    key: int
    plain: int
    rotated: int
    value: int


@dataclass(frozen=True)
class ModelShape:
    """What a Hugging Face ``config.json`` says of the model, in Megatron's terms.

    ``rotary_scaling`` is the factor of Llama 3's scaling; None where there is no scaling.
    ``without_rotary`` says of each layer whether it turns no queries and keys; empty: none.
    ``window`` is how many tokens before itself a token sees, ``windowed`` of each layer whether it
    has the window; empty: all. ``activation_bound`` is that of a clamped GELU in SwiGLU's place.
    The first ``dense_layers`` layers of a mixture of experts have an MLP. ``shared_ffn`` is the
    size of the MLP that all tokens go through beside their experts. ``routed_scaling`` multiplies
    what experts give where each is weighted by a sigmoid; None: by a softmax. ``rotary_share`` is
    the part of each head that is turned. ``further_layers`` behind the last predict more tokens
    than the next and are not converted. ``switches`` are those of ``Family.switches`` that are on.
    Experts are in ``expert_groups``, of which a token's are in ``chosen_groups``; 0: in one.
    ``latent`` is None where keys and values are projected without a latent between.
    """

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head: int
    vocabulary: int
    tied: bool
    maximum_positions: int
    norm_epsilon: float
    rotary_base: int
    rotary_scaling: float | None
    experts: int = 0
    expert_ffn: int = 0
    experts_per_token: int = 0
    normalised_routing: bool = True
    without_rotary: tuple[bool, ...] = ()
    window: int | None = None
    windowed: tuple[bool, ...] = ()
    yarn: Yarn | None = None
    activation_bound: float | None = None
    dense_layers: int = 0
    shared_ffn: int = 0
    routed_scaling: float | None = None
    rotary_share: float = 1.0
    further_layers: int = 0
    switches: tuple[str, ...] = ()
    expert_groups: int = 0
    chosen_groups: int = 0
    latent: Latent | None = None

    @property
    def padded_vocabulary(self) -> int:
        """Rows of Megatron's embedding: a multiple of 128 and of every useful TP size.

        A tensor-parallel size that suits the model divides the number of KV groups, or is a power
        of two up to 128, so one padded size serves all layouts.
        """
        multiple = math.lcm(128, self.groups)
        return -(-self.vocabulary // multiple) * multiple

    def has(self, module: str, layer: int) -> bool:
        """Whether a layer has a module, named within it: either an MLP or experts, if any."""
        if not self.experts or not module.startswith(("mlp.", "pre_mlp_")):
            return True
        return module.startswith("mlp.linear_") == (layer < self.dense_layers)

    def size(self, dimension: str) -> int:
        """The size of a dimension named in a table, e.g. ``"query"`` or ``"hidden"``."""
        latent = self.latent or Latent(0, 0, 0, 0, 0)
        return {
            "vocabulary": self.vocabulary,
            "hidden": self.hidden,
            "ffn": self.ffn,
            "query": self.heads * self.head,
            "key": self.groups * self.head,
            "head": self.head,
            "heads": self.heads,
            "experts": self.experts,
            "expert_ffn": self.expert_ffn,
            "gates_and_ups": 2 * self.expert_ffn,
            "shared_ffn": self.shared_ffn,
            "query_latent": latent.query,
            "key_latent": latent.key,
            "key_latent_and_rotated": latent.key + latent.rotated,
            "plain_and_rotated": self.heads * (latent.plain + latent.rotated),
            "keys_and_values": self.heads * (latent.plain + latent.value),
            "values": self.heads * latent.value,
        }[dimension]


# Where blocks of the Hugging Face parts, of the given numbers of rows, are in a Megatron tensor:
# views of it, one for each block, whose elements in order are those of the block.
Packing = Callable[[torch.Tensor, Sequence[int], ModelShape], Sequence[torch.Tensor]]


def _stacked(whole: torch.Tensor, rows: Sequence[int], shape: ModelShape) -> Sequence[torch.Tensor]:
    """One part alone, or one above the other as gate and up are: ``[rows, ...]`` each."""
    return whole.split(list(rows))


def _per_group(
    whole: torch.Tensor, rows: Sequence[int], shape: ModelShape
) -> Sequence[torch.Tensor]:
    """Megatron's ``linear_qkv``: for each KV group its query heads, its key and its value.

    The views are ``[groups, rows / groups, ...]``.
    """
    grouped = whole.view(shape.groups, -1, *whole.shape[1:])
    return grouped.split([count // shape.groups for count in rows], dim=1)


def _transposed(
    whole: torch.Tensor, rows: Sequence[int], shape: ModelShape
) -> Sequence[torch.Tensor]:
    """Of every expert the transposed: ``[experts, in, out]``."""
    return [whole.transpose(1, 2)]


def _alternating(
    whole: torch.Tensor, rows: Sequence[int], shape: ModelShape
) -> Sequence[torch.Tensor]:
    """Of every expert gate and up by turns, slowest the input if there is one, where Megatron has
    all gates first: ``[experts, in, expert_ffn, 2]``."""
    halves = whole.unflatten(1, (2, -1))
    return [halves.permute(0, *range(halves.ndim - 1, 0, -1))]


@dataclass(frozen=True)
class Weight:
    """One row of a family's table.

    Attributes:
        megatron: Key in the Megatron checkpoint.
        parts: Hugging Face names, ``{layer}`` and ``{expert}`` standing for numbers, each with the
            names of its dimensions (see ``ModelShape.size``), slowest first. The first may be a sum
            such as ``query+key+key`` where blocks of rows are packed in one tensor.
        packing: Where the blocks are in the Megatron tensor.
        alias: Second key in the Megatron checkpoint, where the local and the Transformer Engine
            specification differ; both are written, either is read.
        dimensions: Those of the Megatron tensor, where they are not those of the parts: the row
            holds all experts of a layer, as their part does.
        dtype: What it is stored as on either side, whatever the model's dtype is.
    """

    megatron: str
    parts: tuple[tuple[str, str], ...]
    packing: Packing = _stacked
    alias: str | None = None
    dimensions: str | None = None
    dtype: torch.dtype | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys in the Megatron checkpoint, where layers are alike."""
        return (self.megatron,) if self.alias is None else (self.megatron, self.alias)

    @property
    def per_expert(self) -> bool:
        """Whether the tensor exists once for each expert of each layer."""
        return ".experts.experts." in self.megatron and self.dimensions is None

    def stack(self, shape: ModelShape) -> tuple[int, ...]:
        """How many layers, and experts in each, have the tensor; () where there is one."""
        layers = (shape.layers,) if self.megatron.startswith(LAYERS) else ()
        return (*layers, shape.experts) if self.per_expert else layers

    def stored_at(
        self, place: Place, shape: ModelShape
    ) -> Iterator[tuple[str, Place, tuple[int, ...]]]:
        """Each key that holds a place, the place there, and how many there are of each axis."""
        stack = self.stack(shape)
        for key in self.keys:
            if stack and shape.dense_layers:
                yield key.replace(LAYERS, f"{LAYERS}{place[0]}."), place[1:], stack[1:]
            else:
                yield key, place, stack

    @property
    def per_vocabulary(self) -> bool:
        """Whether the first axis is the vocabulary, which Megatron pads."""
        return self.parts[0][1].startswith("vocabulary")

    def names(self, place: Place) -> list[str]:
        """Hugging Face names of the parts at ``place``."""
        numbers = dict(zip(("layer", "expert"), place, strict=False))
        return [name.format(**numbers) for name, _ in self.parts]

    def part_shapes(self, shape: ModelShape) -> list[tuple[int, ...]]:
        """Shapes of the Hugging Face parts."""
        return [
            (sum(rows), *map(shape.size, dimensions.split()[1:]))
            for rows, (_, dimensions) in zip(self._blocks(shape), self.parts, strict=True)
        ]

    def _blocks(self, shape: ModelShape) -> list[list[int]]:
        """How many rows each block of each part has."""
        sums = [dimensions.split()[0] for _, dimensions in self.parts]
        return [[shape.size(name) for name in one.split("+")] for one in sums]

    def megatron_shape(self, shape: ModelShape) -> tuple[int, ...]:
        """Shape of the packed tensor at one place, the vocabulary not padded."""
        if self.dimensions is not None:
            return tuple(map(shape.size, self.dimensions.split()))
        parts = self.part_shapes(shape)
        return (sum(part[0] for part in parts), *parts[0][1:])

    def pack(
        self,
        read: Callable[[str], torch.Tensor],
        place: Place,
        shape: ModelShape,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """The Megatron tensor, ``megatron_shape``, in memory of its own.

        Args:
            read: Gives a Hugging Face part by its name; only one is held at a time.
            dtype: Of the result, unless the row has one of its own.

        Raises:
            ValueError: A part is not finite.
        """
        dtype = self.dtype or dtype
        whole = torch.empty(self.megatron_shape(shape), dtype=dtype)
        parts = zip(self.names(place), self._places_in(whole, shape), strict=True)
        for name, places in parts:
            stored = read(name)
            check_finite(name, stored, dtype)
            rows = [math.prod(block.shape) for block in places]
            for block, own in zip(places, stored.reshape(-1).split(rows), strict=True):
                block.copy_(own.view(block.shape))
        return whole

    def unpack(self, whole: torch.Tensor, shape: ModelShape) -> list[torch.Tensor]:
        """The Hugging Face parts of the Megatron tensor, in the order of ``parts``."""
        return [
            (
                places[0].reshape(part_shape).contiguous()
                if len(places) == 1
                else torch.cat([block.reshape(-1) for block in places]).view(part_shape)
            )
            for places, part_shape in zip(
                self._places_in(whole, shape), self.part_shapes(shape), strict=True
            )
        ]

    def _places_in(self, whole: torch.Tensor, shape: ModelShape) -> list[list[torch.Tensor]]:
        """Views of ``whole``, one for each block of each part."""
        blocks = self._blocks(shape)
        views = iter(self.packing(whole, [rows for part in blocks for rows in part], shape))
        return [[next(views) for _ in part] for part in blocks]


EMBEDDING = Weight(
    "embedding.word_embeddings.weight", (("model.embed_tokens.weight", "vocabulary hidden"),)
)
OUTPUT = Weight("output_layer.weight", (("lm_head.weight", "vocabulary hidden"),))
FINAL_NORM = Weight("decoder.final_layernorm.weight", (("model.norm.weight", "hidden"),))

ATTENTION_NORM = Weight(
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
    ((LAYER + "input_layernorm.weight", "hidden"),),
)
ATTENTION_OUTPUT = Weight(
    "decoder.layers.self_attention.linear_proj.weight",
    ((LAYER + "self_attn.o_proj.weight", "hidden query"),),
)
ATTENTION = (
    ATTENTION_NORM,
    Weight(
        "decoder.layers.self_attention.linear_qkv.weight",
        (
            (LAYER + "self_attn.q_proj.weight", "query hidden"),
            (LAYER + "self_attn.k_proj.weight", "key hidden"),
            (LAYER + "self_attn.v_proj.weight", "key hidden"),
        ),
        _per_group,
    ),
    ATTENTION_OUTPUT,
)
PACKED_ATTENTION = (
    ATTENTION_NORM,
    Weight(
        "decoder.layers.self_attention.linear_qkv.weight",
        ((LAYER + "self_attn.qkv_proj.weight", "query+key+key hidden"),),
        _per_group,
    ),
    ATTENTION_OUTPUT,
)
QKV_BIAS = (
    Weight(
        "decoder.layers.self_attention.linear_qkv.bias",
        (
            (LAYER + "self_attn.q_proj.bias", "query"),
            (LAYER + "self_attn.k_proj.bias", "key"),
            (LAYER + "self_attn.v_proj.bias", "key"),
        ),
        _per_group,
    ),
)
QUERY_KEY_NORMS = (
    Weight(
        "decoder.layers.self_attention.q_layernorm.weight",
        ((LAYER + "self_attn.q_norm.weight", "head"),),
    ),
    Weight(
        "decoder.layers.self_attention.k_layernorm.weight",
        ((LAYER + "self_attn.k_norm.weight", "head"),),
    ),
)
MLP_NORM = Weight(
    "decoder.layers.mlp.linear_fc1.layer_norm_weight",
    ((LAYER + "post_attention_layernorm.weight", "hidden"),),
)
MLP_OUTPUT = Weight(
    "decoder.layers.mlp.linear_fc2.weight",
    ((LAYER + "mlp.down_proj.weight", "hidden ffn"),),
)
GATED_MLP = (
    MLP_NORM,
    Weight(
        "decoder.layers.mlp.linear_fc1.weight",
        (
            (LAYER + "mlp.gate_proj.weight", "ffn hidden"),
            (LAYER + "mlp.up_proj.weight", "ffn hidden"),
        ),
    ),
    MLP_OUTPUT,
)
PACKED_GATED_MLP = (
    MLP_NORM,
    Weight(
        "decoder.layers.mlp.linear_fc1.weight",
        ((LAYER + "mlp.gate_up_proj.weight", "ffn+ffn hidden"),),
    ),
    MLP_OUTPUT,
)


EXPERTS_NORM = Weight(
    "decoder.layers.pre_mlp_layernorm.weight",
    ((LAYER + "post_attention_layernorm.weight", "hidden"),),
    # What the local specification calls it, as if experts were one MLP.
    alias="decoder.layers.mlp.linear_fc1.layer_norm_weight",
)
# All experts of a layer in one tensor, gates and ups by turns, and biases everywhere.
PACKED_EXPERTS = (
    EXPERTS_NORM,
    Weight("decoder.layers.mlp.router.weight", ((LAYER + "mlp.router.weight", "experts hidden"),)),
    Weight("decoder.layers.mlp.router.bias", ((LAYER + "mlp.router.bias", "experts"),)),
    Weight(
        "decoder.layers.mlp.experts.experts.linear_fc1.weight",
        ((LAYER + "mlp.experts.gate_up_proj", "experts hidden gates_and_ups"),),
        _alternating,
        dimensions="experts gates_and_ups hidden",
    ),
    Weight(
        "decoder.layers.mlp.experts.experts.linear_fc1.bias",
        ((LAYER + "mlp.experts.gate_up_proj_bias", "experts gates_and_ups"),),
        _alternating,
        dimensions="experts gates_and_ups",
    ),
    Weight(
        "decoder.layers.mlp.experts.experts.linear_fc2.weight",
        ((LAYER + "mlp.experts.down_proj", "experts expert_ffn hidden"),),
        _transposed,
        dimensions="experts hidden expert_ffn",
    ),
    Weight(
        "decoder.layers.mlp.experts.experts.linear_fc2.bias",
        ((LAYER + "mlp.experts.down_proj_bias", "experts hidden"),),
        dimensions="experts hidden",
    ),
)
OUTPUT_BIAS = Weight(
    "decoder.layers.self_attention.linear_proj.bias",
    ((LAYER + "self_attn.o_proj.bias", "hidden"),),
)
SINKS = Weight(
    "decoder.layers.self_attention.core_attention.softmax_offset",
    ((LAYER + "self_attn.sinks", "heads"),),
)


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    """The rows of a router and its experts, which replace the MLP."""
    expert = LAYER + block + ".experts.{expert}."
    return (
        EXPERTS_NORM,
        Weight(
            "decoder.layers.mlp.router.weight",
            ((LAYER + block + ".gate.weight", "experts hidden"),),
        ),
        Weight(
            "decoder.layers.mlp.experts.experts.linear_fc1.weight",
            (
                (f"{expert}{gate}.weight", "expert_ffn hidden"),
                (f"{expert}{up}.weight", "expert_ffn hidden"),
            ),
        ),
        Weight(
            "decoder.layers.mlp.experts.experts.linear_fc2.weight",
            ((f"{expert}{down}.weight", "hidden expert_ffn"),),
        ),
    )


# Beside experts that a router weighs by sigmoids, with a bias of its own for the choice.
SHARED_EXPERTS = (
    Weight(
        "decoder.layers.mlp.router.expert_bias",
        ((LAYER + "mlp.gate.e_score_correction_bias", "experts"),),
        dtype=torch.float32,
    ),
    Weight(
        "decoder.layers.mlp.shared_experts.linear_fc1.weight",
        (
            (LAYER + "mlp.shared_experts.gate_proj.weight", "shared_ffn hidden"),
            (LAYER + "mlp.shared_experts.up_proj.weight", "shared_ffn hidden"),
        ),
    ),
    Weight(
        "decoder.layers.mlp.shared_experts.linear_fc2.weight",
        ((LAYER + "mlp.shared_experts.down_proj.weight", "hidden shared_ffn"),),
    ),
)


# Of latent attention. The Transformer Engine specification has the norms within the projections
# that read them; with the local one the norm before an MLP has another key than elsewhere.
_SELF = LAYERS + "self_attention."
_ITS = LAYER + "self_attn."
LATENT_ATTENTION = (
    Weight(LAYERS + "input_layernorm.weight", ((LAYER + "input_layernorm.weight", "hidden"),)),
    Weight(
        _SELF + "linear_kv_down_proj.weight",
        ((_ITS + "kv_a_proj_with_mqa.weight", "key_latent_and_rotated hidden"),),
    ),
    Weight(
        _SELF + "linear_kv_up_proj.layer_norm_weight",
        ((_ITS + "kv_a_layernorm.weight", "key_latent"),),
        alias=_SELF + "kv_layernorm.weight",
    ),
    Weight(
        _SELF + "linear_kv_up_proj.weight",
        ((_ITS + "kv_b_proj.weight", "keys_and_values key_latent"),),
    ),
    Weight(_SELF + "linear_proj.weight", ((_ITS + "o_proj.weight", "hidden values"),)),
)
QUERY_LATENT = (
    Weight(
        _SELF + "linear_q_down_proj.weight", ((_ITS + "q_a_proj.weight", "query_latent hidden"),)
    ),
    Weight(
        _SELF + "linear_q_up_proj.layer_norm_weight",
        ((_ITS + "q_a_layernorm.weight", "query_latent"),),
        alias=_SELF + "q_layernorm.weight",
    ),
    Weight(
        _SELF + "linear_q_up_proj.weight",
        ((_ITS + "q_b_proj.weight", "plain_and_rotated query_latent"),),
    ),
)
_LATENT_LINEARS = ("proj", "q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj")
LATENT_MLP_NORM = Weight(
    MLP_NORM.megatron, MLP_NORM.parts, alias=LAYERS + "pre_mlp_layernorm.weight"
)


@dataclass(frozen=True)
class Part:
    """What a switch of the configuration adds to a family; see ``Family`` for the names."""

    weights: tuple[Weight, ...]
    flags: tuple[str, ...]
    stateful: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One Hugging Face ``model_type``: its table, its extra Megatron flags, what it cannot have.

    Attributes:
        weights: Rows, without ``lm_head`` (see ``weights_of``).
        flags: Megatron flags beyond those that all families share, a value behind a blank.
        without: Flags that all others share.
        stateful: Megatron modules that keep an ``_extra_state`` object in a checkpoint, at each
            place; empty here, but Megatron refuses a checkpoint without them.
        refused: Configuration switches that must be off.
        needed: Configuration switches that must be on.
        windows: The layers that ``sliding_window`` is for: ``"all"``, or ``"listed"``, those of
            ``layer_types``; None: it has no effect.
        whole_every: Where there are no ``layer_types``, of so many layers the last has no window.
        window_switch: Configuration switch without which ``sliding_window`` has no effect.
        switches: Configuration switches that may be on, and what they add.
        turns_in_part: Whether a part of each head may be left without rotary embedding.
        defaults: What transformers takes where ``config.json`` is silent, if it differs between
            families.
    """

    weights: tuple[Weight, ...]
    flags: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    stateful: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    windows: str | None = None
    whole_every: int | None = None
    window_switch: str | None = None
    switches: Mapping[str, Part] = field(default_factory=dict)
    turns_in_part: bool = False
    defaults: Mapping[str, object] = field(default_factory=dict)


ATTENTION_LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj")
LINEARS = (*ATTENTION_LINEARS, "mlp.linear_fc1", "mlp.linear_fc2")
EXPERT_MODULES = (
    *ATTENTION_LINEARS,
    "pre_mlp_layernorm",
    "mlp.experts.experts.linear_fc1",
    "mlp.experts.experts.linear_fc2",
)
STATEFUL_NORMS = ("self_attention.q_layernorm", "self_attention.k_layernorm")
STATEFUL_SHARED = ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")

FAMILIES: Mapping[str, Family] = {
    # SmolLM2 and R1-Distill-Llama are of this model_type.
    "llama": Family(
        weights=(EMBEDDING, *ATTENTION, *GATED_MLP, FINAL_NORM),
        stateful=LINEARS,
        refused=("attention_bias", "mlp_bias"),
    ),
    "mistral": Family(
        weights=(EMBEDDING, *ATTENTION, *GATED_MLP, FINAL_NORM),
        stateful=LINEARS,
        windows="all",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "mixtral": Family(
        weights=(
            EMBEDDING,
            *ATTENTION,
            *_experts("block_sparse_moe", "w1", "w3", "w2"),
            FINAL_NORM,
        ),
        stateful=EXPERT_MODULES,
        windows="all",
        defaults={
            "num_key_value_heads": 8,
            "rope_theta": 1e6,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
        },
    ),
    # Phi-4 and those of the Phi-3 models that read no more than they were trained on.
    "phi3": Family(
        weights=(EMBEDDING, *PACKED_ATTENTION, *PACKED_GATED_MLP, FINAL_NORM),
        stateful=LINEARS,
        windows="all",
        refused=("attention_bias", "mlp_bias"),
    ),
    "smollm3": Family(
        weights=(EMBEDDING, *ATTENTION, *GATED_MLP, FINAL_NORM),
        stateful=LINEARS,
        refused=("attention_bias", "mlp_bias"),
        windows="listed",
        window_switch="use_sliding_window",
        defaults={
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
        },
    ),
    "gpt_oss": Family(
        weights=(
            EMBEDDING,
            *ATTENTION,
            *QKV_BIAS,
            OUTPUT_BIAS,
            SINKS,
            *PACKED_EXPERTS,
            FINAL_NORM,
        ),
        flags=("--softmax-type learnable", "--quick-geglu", "--glu-linear-offset 1.0"),
        without=("--swiglu", "--disable-bias-linear"),
        stateful=(*EXPERT_MODULES, "self_attention.core_attention"),
        needed=("attention_bias",),
        windows="listed",
        whole_every=2,
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
            "num_experts_per_tok": 4,
            "num_local_experts": 128,
            "attention_bias": True,
            "swiglu_limit": 7.0,
            "rope_theta": 150000.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "truncate": False,
            },
        },
    ),
    # Qwen2.5 and R1-Distill-Qwen are of this model_type.
    "qwen2": Family(
        weights=(EMBEDDING, *ATTENTION, *QKV_BIAS, *GATED_MLP, FINAL_NORM),
        flags=("--add-qkv-bias",),
        stateful=LINEARS,
        windows="listed",
        window_switch="use_sliding_window",
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    ),
    "qwen3": Family(
        weights=(EMBEDDING, *ATTENTION, *QUERY_KEY_NORMS, *GATED_MLP, FINAL_NORM),
        flags=("--qk-layernorm",),
        stateful=(*LINEARS, *STATEFUL_NORMS),
        refused=("attention_bias",),
        windows="listed",
        window_switch="use_sliding_window",
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    "qwen3_moe": Family(
        weights=(
            EMBEDDING,
            *ATTENTION,
            *QUERY_KEY_NORMS,
            *_experts("mlp", "gate_proj", "up_proj", "down_proj"),
            FINAL_NORM,
        ),
        flags=("--qk-layernorm",),
        stateful=(*EXPERT_MODULES, *STATEFUL_NORMS),
        refused=("attention_bias", "mlp_only_layers"),
        windows="all",
        window_switch="use_sliding_window",
        defaults={
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "num_experts_per_tok": 8,
            "num_local_experts": 128,
            "moe_intermediate_size": 768,
        },
    ),
    # DeepSeek-V3 and R1.
    "deepseek_v3": Family(
        weights=(
            EMBEDDING,
            *LATENT_ATTENTION,
            *QUERY_LATENT,
            LATENT_MLP_NORM,
            *GATED_MLP[1:],
            *_experts("mlp", "gate_proj", "up_proj", "down_proj"),
            *SHARED_EXPERTS,
            FINAL_NORM,
        ),
        flags=("--multi-latent-attention", "--qk-layernorm", "--moe-router-dtype fp32"),
        without=("--group-query-attention", "--num-query-groups", "--kv-channels"),
        stateful=(
            "input_layernorm",
            *(f"self_attention.linear_{name}" for name in _LATENT_LINEARS),
            *LINEARS[len(ATTENTION_LINEARS) :],
            *EXPERT_MODULES[len(ATTENTION_LINEARS) :],
            *STATEFUL_SHARED,
        ),
        refused=("attention_bias",),
        needed=("norm_topk_prob", "rope_interleave"),
        defaults={
            "moe_intermediate_size": 2048,
            "num_experts_per_tok": 8,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 3,
            "norm_topk_prob": True,
            "rope_interleave": True,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "num_nextn_predict_layers": 1,
        },
    ),
    # GLM-4.5, its Air, 4.6 and 4.7.
    "glm4_moe": Family(
        weights=(
            EMBEDDING,
            *ATTENTION,
            *GATED_MLP,
            *_experts("mlp", "gate_proj", "up_proj", "down_proj"),
            *SHARED_EXPERTS,
            FINAL_NORM,
        ),
        flags=("--moe-router-dtype fp32",),
        stateful=(*LINEARS, *EXPERT_MODULES[len(ATTENTION_LINEARS) :], *STATEFUL_SHARED),
        needed=("norm_topk_prob",),
        switches={
            "attention_bias": Part(QKV_BIAS, ("--add-qkv-bias",), ()),
            "use_qk_norm": Part(QUERY_KEY_NORMS, ("--qk-layernorm",), STATEFUL_NORMS),
        },
        turns_in_part=True,
        defaults={
            "num_key_value_heads": 8,
            "partial_rotary_factor": 0.5,
            "moe_intermediate_size": 1408,
            "num_experts_per_tok": 8,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "num_nextn_predict_layers": 1,
        },
    ),
}

# Why a family that people ask for has no table.
_OLMO = (
    "it normalises what attention and MLP give, and queries and keys over all heads together; "
    "Megatron's GPT layer normalises what they get, and each head by itself"
)
_BOTH_SIDES = "it normalises what attention and MLP get and what they give"
_MAMBA = "it has state-space layers, whose weights have no rows here yet"
WITHOUT_TABLE: Mapping[str, str] = {
    "gemma2": f"{_BOTH_SIDES}, and bounds scores and logits",
    "gemma3_text": f"{_BOTH_SIDES}, and has rotary bases by layer",
    "glm4": f"{_BOTH_SIDES}, which Megatron's GPT layer has no place for",
    "nemotron_h": _MAMBA,
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "qwen3_5_text": "it has layers of linear attention, which RMT's tree of rollouts does not know",
    "qwen3_next": "it has layers of linear attention, which RMT's tree of rollouts does not know",
}


def weights_of(shape: ModelShape) -> tuple[Weight, ...]:
    """All rows that a model of this shape has; a tied model has no output layer of its own."""
    rows = FAMILIES[shape.family].weights + tuple(
        weight for part in parts_of(shape) for weight in part.weights
    )
    return rows if shape.tied else (*rows, OUTPUT)


def parts_of(shape: ModelShape) -> Iterator[Part]:
    """What the switches of the model's configuration add to its family."""
    for name in shape.switches:
        yield FAMILIES[shape.family].switches[name]


def stateful_modules(shape: ModelShape) -> Iterator[tuple[str, int]]:
    """Every module that keeps an ``_extra_state``, with its layer."""
    modules = FAMILIES[shape.family].stateful + tuple(
        module for part in parts_of(shape) for module in part.stateful
    )
    for module in modules:
        yield from ((module, layer) for layer in range(shape.layers) if shape.has(module, layer))


def rows_of(shape: ModelShape) -> Iterator[tuple[Weight, Place]]:
    """Every row of the model with every place that has it, layer by layer."""
    for layer in range(shape.layers):
        for weight in weights_of(shape):
            stack = weight.stack(shape)
            if stack and not shape.has(weight.megatron.removeprefix(LAYERS), layer):
                continue
            if stack:
                yield from ((weight, (layer, *rest)) for rest in np.ndindex(stack[1:]))
            elif layer == 0:
                yield weight, ()


def check_finite(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Check that all values of a weight are finite, also once it is stored as ``dtype``.

    Raises:
        ValueError: One is not.
    """
    least, most = (value.item() for value in torch.aminmax(tensor))
    largest = torch.finfo(dtype).max
    if -largest <= least and most <= largest:
        return
    worst = most if abs(most) > abs(least) or math.isnan(most) else least
    if math.isfinite(worst):
        word = str(dtype).removeprefix("torch.")
        raise ValueError(f"{name} holds {worst:.4g}, beyond {word}; choose another --dtype.")
    raise ValueError(
        f"{name} holds {'NaN' if math.isnan(worst) else 'Infinity'}; choose a checkpoint from "
        "before its training diverged, or copy it again."
    )
