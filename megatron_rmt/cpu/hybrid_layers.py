"""Megatron's hybrid stacks where neither Transformer Engine nor ``mamba_ssm`` can run.

Megatron 0.19 has one specification of hybrid layers, of Transformer Engine's, and its Mamba layers
call the kernels of ``mamba_ssm``. Here that specification gets local layers, whose checkpoints have
the same names, and Mamba layers ``state_space``'s scan. Layers that have no local form (experts,
latent and other attention) stay as they are, and fail when they are built.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from megatron_rmt.cpu.state_space import Lineage, StateSpace, mix, straight


def install() -> None:
    """Let hybrid stacks be built and trained; harmless when called twice."""
    from megatron.core.models.hybrid import hybrid_block, hybrid_layer_specs
    from megatron.core.ssm import mamba_context_parallel, mamba_mixer
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    # In place: some modules hold the specification already.
    hybrid_layer_specs.hybrid_stack_spec.submodules = _local_submodules()
    hybrid_block.TENorm = WrappedTorchNorm
    mamba_mixer.HAVE_MAMBA_SSM = mamba_mixer.HAVE_EINOPS = True
    mamba_context_parallel.HAVE_EINOPS = True
    mamba_mixer.ExtendedRMSNorm = GatedRMSNorm
    mamba_mixer.MambaMixer._ssm_training = _mix_sequences


def _local_submodules() -> Any:
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    mixer = ModuleSpec(
        module=MambaMixer,
        submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
    )
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=DotProductAttention,
            linear_proj=RowParallelLinear,
        ),
    )
    mlp = functools.partial(
        MLP.as_mlp_submodule,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    # Transformer Engine holds each norm in the linear layer behind it.
    return HybridStackSubmodules(
        mamba_layer=ModuleSpec(
            module=MambaLayer,
            submodules=MambaLayerSubmodules(
                norm=WrappedTorchNorm,
                mixer=mixer,
                mamba_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
            ),
        ),
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=WrappedTorchNorm,
                self_attention=attention,
                self_attn_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={
                    "input_layernorm.": "self_attention.linear_qkv.layer_norm_"
                },
            ),
        ),
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=WrappedTorchNorm,
                mlp=mlp,
                mlp_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
            ),
        ),
    )


class GatedRMSNorm(torch.nn.Module):
    """The norm of a Mamba layer, of each group of channels, in the place of ``mamba_ssm``'s.

    weight: ``[channels]``. Computes in fp32, or in the dtype of its input if that is wider.
    """

    def __init__(
        self,
        channels: int,
        eps: float,
        group_size: int,
        norm_before_gate: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        if norm_before_gate:
            raise ValueError("norm_before_gate is True; Megatron's Mamba layers gate first.")
        self.weight = torch.nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.eps, self.group_size = eps, group_size

    def forward(self, values: Tensor) -> Tensor:
        """``values`` ``[..., channels]``, gated already."""
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        groups = wide.unflatten(-1, (-1, self.group_size))
        scale = (groups.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return ((groups * scale).flatten(-2) * self.weight).to(values.dtype)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """As Megatron's own says it: tensor-parallel ranks share out the channels."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


@functools.lru_cache(maxsize=8)
def _lineage(sequences: int, length: int, width: int) -> Lineage:
    return Lineage.of(straight(sequences, length), width)


def _mix_sequences(mixer: Any, projected: Tensor, packed_seq_params: Any = None) -> Tensor:
    """In the place of ``MambaMixer._ssm_training``: ``[sequence, batch, projected]`` to
    ``[sequence, batch, channels]``."""
    if packed_seq_params is not None:
        raise ValueError(
            "a Mamba layer on a CPU was given packed_seq_params; train with unpacked samples."
        )
    space = StateSpace.of(mixer)
    length, sequences, _ = projected.shape
    rows = projected.transpose(0, 1).flatten(0, 1)
    lineage = _lineage(sequences, length, space.width).to(rows.device)
    mixed, _ = mix(space, *space.split(rows), lineage, space.nothing_before())
    mixed = mixed.unflatten(0, (sequences, length)).transpose(0, 1)
    return mixer.norm(mixed) if mixer.rmsnorm else mixed
