"""Transformer Engine's layers against the local ones, and its FP8 weights in rollouts."""

import importlib.util
from unittest import mock

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from acceptance.check import Found, Machine, relative
from megatron_rmt.model.blocks import Block
from megatron_rmt.model.gpt import generating
from megatron_rmt.model.visibility import TreeVisibility, attach_tree_attention
from tests.distributed import single_process_megatron

# Widths that the products of all recipes take, blocks of 128 included.
WIDE = {"hidden_size": 256, "ffn_hidden_size": 256, "kv_channels": 64, "init_method_std": 0.05}
TOKENS = 128


def lacking(machine: Machine) -> Found | None:
    """Why Transformer Engine cannot be used here, if it cannot."""
    if not machine.on_gpu:
        return Found(None, "needs a GPU")
    if importlib.util.find_spec("transformer_engine_torch") is None:
        return Found(None, "needs transformer_engine")
    return None


def layers(machine: Machine) -> Found:
    """Scores and gradients of a tree, the same weights in fp32 (products may be TF32)."""
    if (reason := lacking(machine)) is not None:
        return reason
    from tests.tiny_engine import like_models, logits_and_gradients

    single_process_megatron()
    local, engine = like_models()
    for model in (local, engine):
        attach_tree_attention(model)
    expected, by_weight = logits_and_gradients(local)
    logits, gradients = logits_and_gradients(engine)
    errors = {"scores": relative(logits, expected)}
    for name, gradient in gradients.items():
        errors[name] = relative(gradient, by_weight[name])
    return Found.below(errors, 2e-2)


def fp8_weights(machine: Machine, recipe: str) -> Found:
    """Rollouts after a change of the weights: those of a model that never had others, and, as the
    control, others where nothing says that the weights are new."""
    if (reason := lacking(machine)) is not None:
        return reason
    from tests.tiny_engine import engine_model

    single_process_megatron()
    changes = WIDE | {"fp8": "e4m3", "fp8_recipe": recipe, "bf16": True}
    fresh, trained, stale = models = [engine_model(torch.bfloat16, **changes) for _ in range(3)]
    for model in models:
        attach_tree_attention(model)
        if model is not fresh:
            model.load_state_dict(fresh.state_dict(), strict=False)
            _train(model)
    for model in models:
        _change(model)
    expected, found = (_rollout_scores(model) for model in (fresh, trained))
    with mock.patch.object(GPTModel, "set_is_first_microbatch"):
        control = _rollout_scores(stale)
    numbers = {"rollouts": relative(found, expected), "control": relative(control, expected)}
    passed = numbers["rollouts"] < 1e-3 and numbers["control"] > 1e-2
    value = f"{numbers['rollouts']:.2g}, control {numbers['control']:.2g}"
    return Found(passed, value, "< 0.001, control > 0.01", numbers)


def _rollout_scores(model: GPTModel) -> Tensor:
    with generating(model), torch.no_grad():
        return _scores(model)


def _scores(model: GPTModel) -> Tensor:
    visibility = TreeVisibility(tokens=TOKENS, blocks=(Block(0, TOKENS),))
    visibility.use_position_ids(torch.arange(TOKENS, device="cuda"), TOKENS)
    tokens = (torch.arange(TOKENS, device="cuda") % 50 + 1)[None]
    return model(tokens, visibility.position_ids[None], None, packed_seq_params=visibility)[
        0, :, :53
    ].float()


def _train(model: GPTModel) -> None:
    """A forward and backward pass, which leaves Transformer Engine's copies of the weights."""
    model.train()
    model.set_is_first_microbatch()
    _scores(model).square().mean().backward()


@torch.no_grad()
def _change(model: GPTModel) -> None:
    """What an optimizer step does, only more of it."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "layers" in name:
            weight.mul_(1.5)
