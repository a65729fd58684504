"""Transformer Engine's layers against the local ones: checkpoint keys, and training on a tree.

Its kernels need CUDA, so that nothing here runs without a GPU.
"""

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rmt.model.blocks import Block
from megatron_rmt.model.visibility import TreeVisibility, attach_tree_attention
from tests.tiny_model import build_model

pytest.importorskip(
    "transformer_engine.pytorch",
    reason="Transformer Engine is not installed; unverified on GPU",
    exc_type=(ImportError, OSError),
)

pytestmark = pytest.mark.usefixtures("single_process_megatron")

# Where the local layers hold what Transformer Engine fuses into the linear layer behind it.
FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def _fused(name: str) -> str:
    for local, fused in FUSED.items():
        name = name.replace(local, fused)
    return name


@pytest.fixture(params=[False, True], ids=["llama", "query and key norms"])
def models(request: pytest.FixtureRequest) -> tuple[GPTModel, GPTModel]:
    """One of local layers, one of Transformer Engine's, with the same weights, in fp32."""
    local = build_model(torch.float32, qk_layernorm=request.param).cuda()
    engine = build_model(
        torch.float32,
        make_spec=get_gpt_layer_with_transformer_engine_spec,
        qk_layernorm=request.param,
    ).cuda()
    weights = {_fused(name): value for name, value in local.state_dict().items()}
    # What is missing is Transformer Engine's own state, empty without FP8.
    assert all("_extra_state" in name for name in engine.load_state_dict(weights, False)[0])
    return local, engine


def test_checkpoints_have_the_same_keys_and_shapes(models: tuple[GPTModel, GPTModel]):
    local, engine = (
        {
            tensor.key: tuple(tensor.data.shape)
            for tensor in model.sharded_state_dict().values()
            if not tensor.key.endswith("_extra_state")
        }
        for model in models
    )
    assert engine == local


def _logits_and_gradients(model: GPTModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Of the packed tokens, everybody's squares as the loss."""
    tokens = torch.arange(1, 25).cuda()
    visibility = TreeVisibility(tokens=24, blocks=(Block(0, 24),))
    visibility.use_position_ids(torch.arange(24, device=tokens.device), 24)
    logits = model(tokens[None], visibility.position_ids[None], None, packed_seq_params=visibility)[
        0, :, :53
    ]
    logits.square().mean().backward()
    return logits.detach(), {_fused(n): p.grad for n, p in model.named_parameters()}


def test_trees_train_as_with_local_layers(models: tuple[GPTModel, GPTModel]):
    local, engine = models
    assert attach_tree_attention(engine) == attach_tree_attention(local) == 2
    expected, expected_gradients = _logits_and_gradients(local)
    logits, gradients = _logits_and_gradients(engine)
    # GPUs may multiply in TF32.
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-2
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        difference = (gradient - expected_gradients[name]).abs().max()
        assert float(difference / expected_gradients[name].abs().max()) < 2e-2, name
