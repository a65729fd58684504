"""What is stored of latent attention, and what stands in for Transformer Engine's norm."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from megatron_rmt.model import latent_attention
from megatron_rmt.model.gpt import Policy
from megatron_rmt.model.visibility import attach_tree_attention
from megatron_rmt.rollout.kv_cache import KeyValueStore, TailCache
from megatron_rmt.rollout.memory import key_value_bytes
from megatron_rmt.rollout.prefill import read_trunk
from megatron_rmt.rollout.step_graph import is_recordable
from tests.test_prefill import _trunk
from tests.tiny_model import LATENT, LATENT_YARN, LONGEST_POSITION, VOCAB, build_model

pytestmark = pytest.mark.usefixtures("single_process_megatron")

WIDTH = LATENT["kv_lora_rank"] + LATENT["qk_pos_emb_head_dim"]


def _first_attention(model: torch.nn.Module) -> MLASelfAttention:
    return next(own for own in model.modules() if isinstance(own, MLASelfAttention))


def test_of_each_token_its_latent_and_its_rotated_key_are_stored_once():
    model = build_model(torch.float32, **LATENT).eval()
    attach_tree_attention(model)
    assert key_value_bytes(model) == 2 * WIDTH * 4
    trunk = _trunk(1, [11])
    rows = sum(map(len, trunk))
    store = KeyValueStore(rows)
    read_trunk(Policy(model, VOCAB, LONGEST_POSITION, head_chunk_size=7), trunk, store, 0)
    assert store.trunk.keys() == {1, 2}
    for key, value in store.trunk.values():
        assert key is value
        assert key.shape == (1, rows, WIDTH)


def test_tails_of_latents_are_one_tensor_and_move_once():
    tails = TailCache(capacity=3)
    stem = torch.arange(4.0).view(4, 1, 1, 1)
    tails.start(1, stem, stem, group=1)
    new = torch.arange(10.0, 14.0).view(4, 1, 1)
    tails.write(1, 1, new, new)
    tails.keep([3, 0, 2])
    key, value = tails.stored[1]
    assert key is value
    assert key[:, 0, :2, 0].tolist() == [[3, 13], [0, 10], [2, 12]]


@pytest.mark.parametrize("rope", [{}, LATENT_YARN], ids=["rope", "YaRN"])
def test_latents_read_in_the_absorbed_form_give_the_scores_and_values_of_all_heads(rope):
    attention = _first_attention(build_model(**LATENT | rope))
    hidden = torch.randn(5, 1, 32, dtype=torch.float64)
    positions = torch.tensor([3, 0, 7, 7, 100])
    with latent_attention.rotating_by(attention, positions, 128):
        query, key, value, _, compressed = attention.get_query_key_value_tensors(hidden)
    latents = latent_attention.latents(attention, key, compressed)
    assert latents.shape == (5, 1, WIDTH)
    absorbed = latent_attention.absorbed(attention, query[:, 0])
    scores = torch.einsum("qhd,khd->hqk", query[:, 0], key[:, 0])
    torch.testing.assert_close(torch.einsum("qhd,kd->hqk", absorbed, latents[:, 0]), scores)
    weights = scores.softmax(-1)
    means = torch.einsum("hqk,kd->qhd", weights, latents[:, 0])
    expected = torch.einsum("hqk,khd->qhd", weights, value[:, 0])
    torch.testing.assert_close(latent_attention.values_of(attention, means), expected)


def test_positions_decide_the_angles_within_and_places_again_behind():
    attention = _first_attention(build_model(**LATENT))
    hidden = torch.randn(3, 1, 32, dtype=torch.float64)
    plain = attention.get_query_key_value_tensors(hidden)[0]
    with latent_attention.rotating_by(attention, torch.tensor([0, 1, 2]), 128):
        assert torch.equal(attention.get_query_key_value_tensors(hidden)[0], plain)
    with latent_attention.rotating_by(attention, torch.tensor([0, 1, 9]), 128):
        other = attention.get_query_key_value_tensors(hidden)[0]
    assert torch.equal(other[:2], plain[:2])
    assert not torch.equal(other[2], plain[2])
    assert torch.equal(attention.get_query_key_value_tensors(hidden)[0], plain)


class _NormedProjection(torch.nn.Module):
    """Norm and up projection in one, as Transformer Engine has them."""

    def __init__(self, norm: Tensor, bias: Tensor | None, weight: Tensor) -> None:
        super().__init__()
        self.layer_norm_weight, self.layer_norm_bias, self.weight = norm, bias, weight


@pytest.mark.parametrize("centred", [False, True], ids=["plain", "zero-centred"])
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_a_norm_inside_the_up_projection_is_applied_to_what_is_stored(normalization, centred):
    attention = _first_attention(build_model(**LATENT, normalization=normalization))
    compressed = torch.randn(3, 1, LATENT["kv_lora_rank"], dtype=torch.float64)
    key = torch.randn(3, 1, 4, 10, dtype=torch.float64)
    weight, bias = torch.randn(2, LATENT["kv_lora_rank"], dtype=torch.float64)
    eps, shape = attention.config.layernorm_epsilon, weight.shape
    if normalization == "RMSNorm":
        expected = F.rms_norm(compressed, shape, weight, eps)
    else:
        expected = F.layer_norm(compressed, shape, weight, bias, eps)
    plain = latent_attention.latents(attention, key, expected)
    attention.config.layernorm_zero_centered_gamma = centred
    up = attention.linear_kv_up_proj.weight
    attention.linear_kv_up_proj = _NormedProjection(weight - float(centred), bias, up)
    found = latent_attention.latents(attention, key, compressed)
    torch.testing.assert_close(found, plain)


def test_its_steps_of_decoding_are_not_recorded():
    cuda = torch.device("cuda")
    assert is_recordable(build_model().config, cuda)
    assert not is_recordable(build_model(**LATENT).config, cuda)
