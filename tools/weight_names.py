"""How Hugging Face and Megatron name, shape and pack the same weights: one table per family.

Each row of a family's table pairs one tensor of a Megatron checkpoint with the Hugging Face tensors
that it is made of. Both directions of ``convert_checkpoint.py`` walk the same rows, so whatever is
packed here is also unpacked here. Nothing in this module reads or writes a file.

Megatron keys are those of a ``torch_dist`` checkpoint (``GPTModel.sharded_state_dict``), which are
the same for the local and the Transformer Engine layer specification. The tensors of all layers are
stacked under one key, ``[layers, ...]``; a row describes one layer of the stack.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

LAYER = "model.layers.{layer}."


@dataclass(frozen=True)
class ModelShape:
    """What a Hugging Face ``config.json`` says of the model, in Megatron's terms."""

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
    rotary_scaling: bool

    @property
    def padded_vocabulary(self) -> int:
        """Rows of Megatron's embedding: a multiple of 128 and of every useful TP size.

        A tensor-parallel size that suits the model divides the number of KV groups, or is a power
        of two up to 128, so one padded size serves all layouts.
        """
        multiple = math.lcm(128, self.groups)
        return -(-self.vocabulary // multiple) * multiple

    def size(self, dimension: str) -> int:
        """The size of a dimension named in a table, e.g. ``"query"`` or ``"hidden"``."""
        return {
            "vocabulary": self.vocabulary,
            "hidden": self.hidden,
            "ffn": self.ffn,
            "query": self.heads * self.head,
            "key": self.groups * self.head,
            "head": self.head,
        }[dimension]


def _join(parts: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
    """Stack the parts on their first axis: one part alone, or gate above up."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _split(whole: torch.Tensor, rows: Sequence[int], shape: ModelShape) -> list[torch.Tensor]:
    """The inverse of ``_join``: parts of the given numbers of rows."""
    return list(whole.split(list(rows)))


def _interleave_groups(parts: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
    """Megatron's ``linear_qkv``: for each KV group its query heads, its key and its value.

    Args:
        parts: Query ``[heads*head, ...]``, key and value ``[groups*head, ...]``.
    """
    grouped = [part.reshape(shape.groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _separate_groups(
    whole: torch.Tensor, rows: Sequence[int], shape: ModelShape
) -> list[torch.Tensor]:
    """The inverse of ``_interleave_groups``."""
    grouped = whole.reshape(shape.groups, -1, *whole.shape[1:])
    return [part.flatten(0, 1) for part in grouped.split([r // shape.groups for r in rows], dim=1)]


@dataclass(frozen=True)
class Packing:
    """A way to make one Megatron tensor of Hugging Face tensors, and back."""

    pack: Callable[[Sequence[torch.Tensor], ModelShape], torch.Tensor]
    unpack: Callable[[torch.Tensor, Sequence[int], ModelShape], list[torch.Tensor]]


STACKED = Packing(_join, _split)
PER_GROUP = Packing(_interleave_groups, _separate_groups)


@dataclass(frozen=True)
class Weight:
    """One row of a family's table.

    Attributes:
        megatron: Key in the Megatron checkpoint.
        parts: Hugging Face names, ``{layer}`` standing for the layer's number, each with the names
            of its dimensions (see ``ModelShape.size``), slowest first.
        packing: How the parts make up the Megatron tensor.
    """

    megatron: str
    parts: tuple[tuple[str, str], ...]
    packing: Packing = STACKED

    @property
    def per_layer(self) -> bool:
        """Whether the tensor exists once for each layer."""
        return self.megatron.startswith("decoder.layers.")

    @property
    def per_vocabulary(self) -> bool:
        """Whether the first axis is the vocabulary, which Megatron pads."""
        return self.parts[0][1].startswith("vocabulary")

    def names(self, layer: int) -> list[str]:
        """Hugging Face names of the parts in ``layer``."""
        return [name.format(layer=layer) for name, _ in self.parts]

    def part_shapes(self, shape: ModelShape) -> list[tuple[int, ...]]:
        """Shapes of the Hugging Face parts."""
        return [tuple(map(shape.size, dimensions.split())) for _, dimensions in self.parts]

    def megatron_shape(self, shape: ModelShape) -> tuple[int, ...]:
        """Shape of the packed tensor of one layer, the vocabulary not padded."""
        parts = self.part_shapes(shape)
        return (sum(part[0] for part in parts), *parts[0][1:])

    def pack(self, parts: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
        """The Megatron tensor, ``megatron_shape``, of the Hugging Face parts."""
        return self.packing.pack(parts, shape).contiguous()

    def unpack(self, whole: torch.Tensor, shape: ModelShape) -> list[torch.Tensor]:
        """The Hugging Face parts of the Megatron tensor, in the order of ``parts``."""
        rows = [part[0] for part in self.part_shapes(shape)]
        return [part.contiguous() for part in self.packing.unpack(whole, rows, shape)]


EMBEDDING = Weight(
    "embedding.word_embeddings.weight", (("model.embed_tokens.weight", "vocabulary hidden"),)
)
OUTPUT = Weight("output_layer.weight", (("lm_head.weight", "vocabulary hidden"),))
FINAL_NORM = Weight("decoder.final_layernorm.weight", (("model.norm.weight", "hidden"),))

ATTENTION = (
    Weight(
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        ((LAYER + "input_layernorm.weight", "hidden"),),
    ),
    Weight(
        "decoder.layers.self_attention.linear_qkv.weight",
        (
            (LAYER + "self_attn.q_proj.weight", "query hidden"),
            (LAYER + "self_attn.k_proj.weight", "key hidden"),
            (LAYER + "self_attn.v_proj.weight", "key hidden"),
        ),
        PER_GROUP,
    ),
    Weight(
        "decoder.layers.self_attention.linear_proj.weight",
        ((LAYER + "self_attn.o_proj.weight", "hidden query"),),
    ),
)
QKV_BIAS = (
    Weight(
        "decoder.layers.self_attention.linear_qkv.bias",
        (
            (LAYER + "self_attn.q_proj.bias", "query"),
            (LAYER + "self_attn.k_proj.bias", "key"),
            (LAYER + "self_attn.v_proj.bias", "key"),
        ),
        PER_GROUP,
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
GATED_MLP = (
    Weight(
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        ((LAYER + "post_attention_layernorm.weight", "hidden"),),
    ),
    Weight(
        "decoder.layers.mlp.linear_fc1.weight",
        (
            (LAYER + "mlp.gate_proj.weight", "ffn hidden"),
            (LAYER + "mlp.up_proj.weight", "ffn hidden"),
        ),
    ),
    Weight(
        "decoder.layers.mlp.linear_fc2.weight",
        ((LAYER + "mlp.down_proj.weight", "hidden ffn"),),
    ),
)


@dataclass(frozen=True)
class Family:
    """One Hugging Face ``model_type``: its table, its extra Megatron flags, what it cannot have.

    Attributes:
        weights: Rows, without ``lm_head`` (see ``weights_of``).
        flags: Megatron flags beyond those that all families share.
        stateful: Megatron modules that keep an ``_extra_state`` object in a checkpoint, for each
            layer; empty here, but Megatron refuses a checkpoint without them.
        refused: Configuration switches that must be off.
    """

    weights: tuple[Weight, ...]
    flags: tuple[str, ...] = ()
    stateful: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj")
LINEARS += ("mlp.linear_fc1", "mlp.linear_fc2")

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        weights=(EMBEDDING, *ATTENTION, *GATED_MLP, FINAL_NORM),
        stateful=LINEARS,
        refused=("attention_bias", "mlp_bias"),
    ),
    "qwen2": Family(
        weights=(EMBEDDING, *ATTENTION, *QKV_BIAS, *GATED_MLP, FINAL_NORM),
        flags=("--add-qkv-bias",),
        stateful=LINEARS,
        refused=("use_sliding_window",),
    ),
    "qwen3": Family(
        weights=(EMBEDDING, *ATTENTION, *QUERY_KEY_NORMS, *GATED_MLP, FINAL_NORM),
        flags=("--qk-layernorm",),
        stateful=(*LINEARS, "self_attention.q_layernorm", "self_attention.k_layernorm"),
        refused=("attention_bias", "use_sliding_window"),
    ),
}


def weights_of(shape: ModelShape) -> tuple[Weight, ...]:
    """All rows that a model of this shape has; a tied model has no output layer of its own."""
    rows = FAMILIES[shape.family].weights
    return rows if shape.tied else (*rows, OUTPUT)


def rows_of(shape: ModelShape) -> Iterator[tuple[Weight, int]]:
    """Every row of the model with every layer that has it, layer by layer; 0 where there is one."""
    for layer in range(shape.layers):
        for weight in weights_of(shape):
            if weight.per_layer or layer == 0:
                yield weight, layer


def summary(problems: Sequence[str], limit: int = 6) -> str:
    """The first problems in one line, and how many more there are."""
    problems = list(dict.fromkeys(problems))
    more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return "; ".join(problems[:limit]) + more


def read_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape of the model that a Hugging Face ``config.json`` describes.

    Raises:
        ValueError: The family, or a switch of the configuration, has no Megatron form here.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type {model_type!r} of config.json is not supported; "
            f"supported families: {', '.join(sorted(FAMILIES))}."
        )
    for switch in FAMILIES[model_type].refused:
        if config.get(switch):
            raise ValueError(
                f"config.json sets {switch}={config[switch]!r}, which has no Megatron form for "
                f"the family {model_type}; convert a model without it."
            )
    if config.get("quantization_config"):
        raise ValueError(
            "config.json describes quantized weights (quantization_config); "
            "dequantise the model and save it as safetensors first."
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(
            f"config.json sets hidden_act={config['hidden_act']!r}; only 'silu' is supported."
        )
    rotary_base, rotary_scaling = _rotary(config)
    try:
        heads = config["num_attention_heads"]
        return ModelShape(
            family=model_type,
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            ffn=config["intermediate_size"],
            heads=heads,
            groups=config.get("num_key_value_heads") or heads,
            head=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            maximum_positions=config["max_position_embeddings"],
            norm_epsilon=config["rms_norm_eps"],
            rotary_base=rotary_base,
            rotary_scaling=rotary_scaling,
        )
    except KeyError as error:
        raise ValueError(f"config.json lacks {error.args[0]!r}; is it complete?") from error


# Llama 3.1's rotary scaling as Megatron has it. All four are constants there: even
# --rope-scaling-factor does not reach the model (gpt_config_from_args drops it in 0.19).
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _rotary(config: Mapping[str, Any]) -> tuple[int, bool]:
    """Rotary base, and whether Llama 3.1's scaling is on; transformers 4 and 5 differ here."""
    rope = {"rope_theta": config.get("rope_theta", 10000.0)}
    rope |= config.get("rope_scaling") or {}
    rope |= config.get("rope_parameters") or {}
    base = rope["rope_theta"]
    if base != int(base):
        raise ValueError(f"config.json sets rope_theta={base!r}; Megatron needs a whole number.")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(
            f"config.json sets partial_rotary_factor={partial!r}; only 1.0 is supported."
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return int(base), False
    if kind == "llama3" and all(rope.get(key) == value for key, value in LLAMA3_SCALING.items()):
        return int(base), True
    raise ValueError(
        f"config.json sets rotary scaling {rope!r}; Megatron has 'default' and 'llama3' with "
        f"{LLAMA3_SCALING} only."
    )


def megatron_flags(shape: ModelShape) -> list[str]:
    """The Megatron command-line flags that build exactly this model, at any parallel layout.

    Precision, parallel layout and the tokenizer are not part of it.
    """
    flags: dict[str, Any] = {
        "--num-layers": shape.layers,
        "--hidden-size": shape.hidden,
        "--ffn-hidden-size": shape.ffn,
        "--num-attention-heads": shape.heads,
        "--group-query-attention": None,
        "--num-query-groups": shape.groups,
        "--kv-channels": shape.head,
        "--max-position-embeddings": shape.maximum_positions,
        "--position-embedding-type": "rope",
        "--rotary-base": shape.rotary_base,
        "--normalization": "RMSNorm",
        "--norm-epsilon": shape.norm_epsilon,
        "--swiglu": None,
        "--disable-bias-linear": None,
        "--attention-dropout": 0.0,
        "--hidden-dropout": 0.0,
        "--vocab-size": shape.vocabulary,
        "--padded-vocab-size": shape.padded_vocabulary,
    }
    if shape.rotary_scaling:
        flags["--use-rope-scaling"] = None
    if not shape.tied:
        flags["--untie-embeddings-and-output-weights"] = None
    words = [str(word) for flag in flags.items() for word in flag if word is not None]
    return [*words, *FAMILIES[shape.family].flags]
