"""Passes through the stages: padding, and no gradient."""

from types import SimpleNamespace

import pytest
import torch

from megatron_rmt.model import pipeline
from megatron_rmt.model.blocks import Block
from megatron_rmt.model.pipeline import forward_through_stages, row_multiple
from megatron_rmt.model.visibility import TreeVisibility, attach_tree_attention
from tests.tiny_model import VOCAB, build_model, stock_logits


@pytest.mark.parametrize(
    ("fp8", "recipe", "sequence_parallel", "expected"),
    [
        (None, "tensorwise", False, 1),
        (None, "tensorwise", True, 4),
        ("e4m3", "blockwise", False, 16),
        ("hybrid", "tensorwise", True, 64),
        ("e4m3", "mxfp8", False, 32),
    ],
)
def test_rows_come_in_the_multiples_that_the_layout_wants(fp8, recipe, sequence_parallel, expected):
    config = SimpleNamespace(
        fp8=fp8,
        fp8_recipe=recipe,
        sequence_parallel=sequence_parallel,
        tensor_model_parallel_size=4,
    )
    assert row_multiple(config) == expected


@pytest.mark.usefixtures("single_process_megatron")
def test_padding_for_fp8_reaches_the_model_and_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    model = build_model()
    attach_tree_attention(model)
    tokens = torch.arange(1, 12)
    seen: list[int] = []
    model.embedding.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    modules = {name: module.forward for name, module in model.named_modules()}

    def logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return hidden @ weight.t()

    results = []
    for multiple in (1, 16):
        monkeypatch.setattr(pipeline, "row_multiple", lambda config, multiple=multiple: multiple)
        visibility = TreeVisibility(tokens=11, blocks=(Block(0, 11),))
        visibility.use_position_ids(torch.arange(11), 11)
        with torch.no_grad():
            results.append(forward_through_stages(model, tokens, visibility, logits))
    assert seen == [11, 16]
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        results[0][:, :VOCAB], stock_logits(model, tokens), rtol=1e-9, atol=1e-9
    )
    # No layer stays wrapped.
    assert {name: module.forward for name, module in model.named_modules()} == modules
