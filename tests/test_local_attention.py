"""Megatron's attention of local layers on a CPU, where context-parallel ranks share a sequence."""

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention

from megatron_rmt.model.blocks import Block
from megatron_rmt.model.visibility import TreeVisibility, attach_tree_attention
from tests.tiny_model import VOCAB, build_model, stock_logits

TOKENS = torch.arange(1, 9)


@pytest.mark.usefixtures("single_process_megatron")
def test_it_is_built_and_refuses_to_run_by_itself():
    model = build_model(position_embedding="none", context_parallel_size=2)
    built = [own for own in model.modules() if isinstance(own, DotProductAttention)]
    assert [own.config.context_parallel_size for own in built] == [2, 2]
    with pytest.raises(RuntimeError, match=r"train with --rmt, and with --eval-iters 0\.$"):
        stock_logits(model, TOKENS)


@pytest.mark.usefixtures("single_process_megatron")
def test_trees_pass_it_by():
    model = build_model(context_parallel_size=2)
    alone = build_model()
    alone.load_state_dict(model.state_dict())
    attach_tree_attention(model)
    visibility = TreeVisibility(tokens=len(TOKENS), blocks=(Block(0, len(TOKENS)),))
    visibility.use_position_ids(torch.arange(len(TOKENS)), len(TOKENS))
    logits = model(TOKENS[None], visibility.position_ids[None], None, packed_seq_params=visibility)
    torch.testing.assert_close(logits[0, :, :VOCAB], stock_logits(alone, TOKENS))
