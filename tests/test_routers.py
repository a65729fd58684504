"""Expert routers in an update over trees: their losses and their bias."""

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.router import Router
from torch import Tensor

from megatron_rmt.model.routers import check_routing, counting_trees, padding_mask
from megatron_rmt.update.tree import pad_tree
from tests import test_forward_step as step
from tests.tiny_model import build_model

pytestmark = pytest.mark.usefixtures("single_process_megatron")

EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
}
# Losses of the routers, which Megatron multiplies by a micro-batch's tokens.
LOSSES: dict[str, dict[str, Any]] = {
    **{
        kind: {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": 0.1}
        for kind in ("aux_loss", "seq_aux_loss", "global_aux_loss")
    },
    "several": {
        "moe_router_load_balancing_type": ["aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [0.1, 0.05],
    },
    "z loss": {"moe_z_loss_coeff": 0.1},
}
BIASED = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}


def _batches(padding: int = 0) -> list[step.MicroBatch]:
    """Two micro-batches whose trees differ in size: the first has no rollouts."""
    batches = [step._micro_batch(seed, True, [11], step.STEM) for seed in (1, 2)]
    first = batches[0]
    tree = step.grow_tree(
        first.trunk,
        [],
        step.STEM,
        None,
        longest_position=step.LONGEST_POSITION,
        device=torch.device("cpu"),
    )
    batches[0] = dataclasses.replace(first, rows=[], advantages=first.advantages[:0], tree=tree)
    for batch in batches:
        batch.tree = pad_tree(batch.tree, batch.tree.tokens.shape[0] + padding)
    return batches


def _gradients(model: GPTModel) -> dict[str, Tensor]:
    """Of a step, divided by the reported tokens where Megatron does that."""
    tokens = []
    model.config.finalize_model_grads_func = lambda models, count, **_: tokens.append(count)
    gradients = step._tree_step(model, _batches(padding=9), torch.float64)[1]
    return {name: value / (tokens[0] or 1) for name, value in gradients.items()}


def _model(per_token: bool, weights: dict[str, Any], **options: Any) -> GPTModel:
    model = step._models(torch.float64, **EXPERTS | options, calculate_per_token_loss=per_token)[1]
    model.load_state_dict(weights)
    return model


def _error(
    gradients: dict[str, Tensor], expected: dict[str, Tensor], part: str = "router"
) -> float:
    names = [name for name in expected if part in name]
    assert names
    return max(
        float((gradients[name] - expected[name]).norm() / expected[name].norm()) for name in names
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_the_losses_of_routers_weigh_the_same_with_and_without_a_loss_per_token(loss: str):
    weights = build_model(**EXPERTS).state_dict()
    with counting_trees(model := _model(False, weights, **LOSSES[loss])):
        expected = _gradients(model)
    unbalanced = _gradients(_model(False, weights))
    assert _error(expected, unbalanced) > 1e-3, "the loss acts"
    model = _model(True, weights, **LOSSES[loss])
    with counting_trees(model):
        gradients = _gradients(model)
    # Megatron's routers compute in fp32.
    assert _error(gradients, expected, "") < 1e-6
    assert _error(_gradients(model), expected) > 0.1, "as Megatron would have it"


def test_padding_is_no_token_for_the_expert_bias():
    model = build_model(**EXPERTS | BIASED)
    step.attach_tree_attention(model)
    model.train()
    routers = [module for module in model.modules() if isinstance(module, Router)]
    counts = []
    for padding in (0, 9):
        for router in routers:
            router.local_tokens_per_expert.zero_()
        with counting_trees(model):
            step._tree_step(model, _batches(padding), torch.float64)
        counts.append(torch.stack([router.local_tokens_per_expert for router in routers]))
    tokens = sum(batch.tree.visibility.tokens for batch in _batches())
    assert counts[0].sum(1).tolist() == [2.0 * tokens] * len(routers)
    assert torch.equal(*counts)


def test_routers_are_themselves_again_also_after_an_error():
    model = build_model(**EXPERTS | BIASED, calculate_per_token_loss=True)
    routers = [module for module in model.modules() if isinstance(module, Router)]
    assert len(routers) == 2

    def fail() -> None:
        with counting_trees(model):
            assert not any(router.calculate_per_token_loss for router in routers)
            assert all("_apply_expert_bias" in vars(router) for router in routers)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert all(router.calculate_per_token_loss for router in routers)
    assert not any("_apply_expert_bias" in vars(router) for router in routers)


def test_the_mask_is_that_of_the_rows_that_a_stages_layers_hold(monkeypatch):
    """What has the embedding divides it itself."""
    config = build_model(**EXPERTS).config
    assert padding_mask(8, 8, config, embeds=True) is None
    assert padding_mask(8, 5, build_model().config, embeds=True) is None
    whole = [False] * 5 + [True] * 3
    assert padding_mask(8, 5, config, embeds=False).tolist() == [whole]
    config.sequence_parallel = True
    assert padding_mask(8, 5, config, embeds=True).tolist() == [whole]
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: 2)
    for rank, rows in enumerate((whole[:4], whole[4:])):
        monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda own=rank: own)
        assert padding_mask(8, 5, config, embeds=False).tolist() == [rows]


def test_a_model_that_the_job_gave_another_router_is_refused():
    """Its arguments say nothing of it."""
    check_routing(build_model(moe_input_jitter_eps=0.1).config)
    config = build_model(**EXPERTS).config
    check_routing(config)
    config.moe_input_jitter_eps = 0.1
    config.moe_router_load_balancing_type = "sinkhorn"
    sentences = r"^RMT cannot train this model: --moe-input-jitter-eps is 0.1; .* sinkhorn; it bal"
    with pytest.raises(ValueError, match=sentences):
        check_routing(config)
