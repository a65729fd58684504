"""Transformer Engine's layers against the local ones: checkpoint keys, and training on a tree.

Its kernels need CUDA, so that nothing is trained here without a GPU.
"""

import pytest
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_rmt.cpu import platform as cpu_platform
from megatron_rmt.model.visibility import attach_tree_attention
from tests.tiny_engine import like_models, logits_and_gradients

pytest.importorskip(
    "transformer_engine.pytorch",
    reason="Transformer Engine is not installed; unverified on GPU",
    exc_type=(ImportError, OSError),
)

pytestmark = pytest.mark.usefixtures("single_process_megatron")


@pytest.fixture(params=[False, True], ids=["llama", "query and key norms"])
def models(request: pytest.FixtureRequest) -> tuple[GPTModel, GPTModel]:
    """One of local layers, one of Transformer Engine's, with the same weights, in fp32."""
    return like_models(qk_layernorm=request.param)


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


@pytest.mark.skipif(cpu_platform.is_installed(), reason="its kernels need CUDA")
def test_trees_train_as_with_local_layers(models: tuple[GPTModel, GPTModel]):
    local, engine = models
    assert attach_tree_attention(engine) == attach_tree_attention(local) == 2
    expected, expected_gradients = logits_and_gradients(local)
    logits, gradients = logits_and_gradients(engine)
    # GPUs may multiply in TF32.
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-2
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        difference = (gradient - expected_gradients[name]).abs().max()
        assert float(difference / expected_gradients[name].abs().max()) < 2e-2, name
