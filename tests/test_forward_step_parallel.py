"""The tree step over tensor- and pipeline-parallel ranks: gradients of the naive single process."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor

from megatron_rmt.model.context_parallel import RowSplit, balanced_bounds
from megatron_rmt.model.visibility import attach_tree_attention
from megatron_rmt.update.forward_step import Update, make_forward_step
from megatron_rmt.update.tree import pad_tree, part_of_tree
from tests import test_forward_step as step
from tests.distributed import run_distributed, single_process_megatron
from tests.tiny_model import build_model

pytestmark = pytest.mark.multiprocess

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How the ranks divide the model. context: ranks that share each tree. chunks: of a rank, with
    virtual pipeline stages. padding: rows appended to every tree, or to every part of one. nearby:
    windows and sinks. latent: latent attention."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    chunks: int = 1
    sequence_parallel: bool = False
    recompute: bool = False
    padding: int = 0
    nearby: bool = False
    latent: bool = False

    @property
    def ranks(self) -> int:
        return self.tensor * self.context * self.pipeline

    @property
    def attention(self) -> dict[str, Any]:
        """What the layers attend to, for ``build_model``."""
        if self.latent:
            return step.ARCHITECTURES["latents"]
        return step.ARCHITECTURES["windows and sinks"] if self.nearby else {}

    @property
    def layers(self) -> int:
        """Of the whole model."""
        return 2 * self.chunks


def _own_part(whole: Named, layout: Layout, tensor_rank: int, stage: int) -> Named:
    """What a chunk holds of the weights, or of the gradients, of the whole model.

    stage: of the whole pipeline, counted on through the chunks.
    """
    stages = layout.pipeline * layout.chunks
    layers = layout.layers // stages
    part = {}
    for name, value in whole.items():
        if name.startswith("decoder.layers."):
            _, _, layer, rest = name.split(".", 3)
            if int(layer) // layers != stage:
                continue
            name = f"decoder.layers.{int(layer) % layers}.{rest}"
        elif stage != (0 if name.startswith("embedding") else stages - 1):
            continue
        part[name] = _shard(name, value, layout.tensor, tensor_rank)
    return part


SPLIT_BY_ROWS = ("linear_q", "linear_kv", "embedding", "output_layer", "softmax_offset")


def _shard(name: str, value: Tensor, ranks: int, rank: int) -> Tensor:
    if "linear_proj" in name or "linear_fc2" in name:
        return value.chunk(ranks, dim=1)[rank]
    if "linear_fc1" in name:  # the gate, then what it gates, each divided
        return torch.cat([half.chunk(ranks)[rank] for half in value.chunk(2)])
    if any(of in name for of in SPLIT_BY_ROWS):
        return value.chunk(ranks)[rank]
    return value


def _rank_gradients(layout: Layout, attention: str, weights: Named) -> list[Named]:
    """This rank's gradients of one step of Megatron's schedule, of each of its chunks."""
    interleaved = layout.chunks > 1
    virtual = layout.chunks if interleaved else None
    parallel_state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        virtual,
        context_parallel_size=layout.context,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    if layout.sequence_parallel:
        # Megatron refuses torch's norm there, as it does not mark its weight for the sum over
        # ranks, which ``_expected`` does here.
        WrappedTorchNorm.__new__ = lambda cls, config, hidden_size, eps=1e-5, **_: torch.nn.RMSNorm(
            hidden_size, eps=eps
        )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    changes: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tensor,
        "context_parallel_size": layout.context,
        "pipeline_model_parallel_size": layout.pipeline,
        "pipeline_dtype": torch.float64,
        "sequence_parallel": layout.sequence_parallel,
        "num_layers": layout.layers,
        **layout.attention,
    }
    if interleaved:
        # Megatron wants it of two stages.
        changes |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
        changes["virtual_pipeline_model_parallel_size"] = virtual
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    chunks = []
    for number in range(layout.chunks):
        place = number * layout.pipeline + stage
        model = build_model(
            pre_process=place == 0,
            post_process=place == layout.pipeline * layout.chunks - 1,
            vp_stage=number if interleaved else None,
            **changes,
            **(step.FULL_RECOMPUTE if layout.recompute else {}),
        )
        model.load_state_dict(_own_part(weights, layout, tensor_rank, place), strict=False)
        attach_tree_attention(model)
        chunks.append(model.train())
    padding = 0 if layout.context > 1 else layout.padding
    updates = step._updates(_batches(attention, padding), torch.float64, warm_up=False)
    settings = step._loss_settings(updates)
    if layout.context > 1:
        updates = [_own_rows(update, layout) for update in updates]
    rows = len(updates[0].tree.tokens) * layout.context
    get_forward_backward_func()(
        forward_step_func=make_forward_step(settings),
        data_iterator=[iter(updates) for _ in chunks] if interleaved else iter(updates),
        model=chunks if interleaved or layout.pipeline == 1 else chunks[0],
        num_microbatches=len(updates),
        seq_length=rows,
        micro_batch_size=1,
        forward_only=False,
    )
    gradients = [{name: p.grad for name, p in of.named_parameters()} for of in chunks]
    if layout.sequence_parallel:
        for own in gradients:
            for name in own:
                if "norm" in name:
                    group = parallel_state.get_tensor_model_parallel_group()
                    torch.distributed.all_reduce(own[name], group=group)
    for own in gradients if layout.context > 1 else []:
        for gradient in own.values():
            group = parallel_state.get_context_parallel_group()
            torch.distributed.all_reduce(gradient, group=group)
    return gradients


def _own_rows(update: Update, layout: Layout) -> Update:
    """This context-parallel rank's part of one micro-batch. Pipeline stages want parts of one
    size."""
    group, tree = parallel_state.get_context_parallel_group(), update.tree
    costs = {"row_cost": 1000, "pair_cost": 10}
    split = RowSplit(balanced_bounds(tree.visibility.blocks, group.size(), **costs), group)
    part, held = part_of_tree(tree, split)
    rows = max(split.sizes) + layout.padding
    if layout.sequence_parallel:
        rows += -rows % layout.tensor
    return dataclasses.replace(
        update, tree=pad_tree(part, rows), predictions=update.predictions.at(held)
    )


def _batches(attention: str, padding: int = 0) -> list[step.MicroBatch]:
    batches = [step._micro_batch(seed, True, [11, 12], step.STEM, attention) for seed in (1, 2)]
    for batch in batches:
        batch.tree = pad_tree(batch.tree, len(batch.tree.tokens) + padding)
    return batches


def _weights_and_gradients(layout: Layout) -> tuple[Named, Named]:
    """Of the stock model in one process, each sequence by itself."""
    single_process_megatron()
    model: GPTModel = build_model(num_layers=layout.layers, **layout.attention).train()
    gradients = step._naive_step(model, _batches("sdpa"), step.STEM)[1]
    weights = {name: value for name, value in model.state_dict().items() if value is not None}
    return {n: w for n, w in weights.items() if isinstance(w, Tensor)}, gradients


LAYOUTS = {
    "TP2": Layout(tensor=2),
    "TP2, padding": Layout(tensor=2, padding=7),
    "TP2, sequence parallel, padding": Layout(tensor=2, sequence_parallel=True, padding=8),
    "PP2": Layout(pipeline=2),
    "PP2, full recompute": Layout(pipeline=2, recompute=True),
    "PP2, full recompute, padding": Layout(pipeline=2, recompute=True, padding=5),
    "CP2": Layout(context=2),
    "CP3, padding": Layout(context=3, padding=3),
    "CP2, full recompute": Layout(context=2, recompute=True),
    "TP2 x CP2, sequence parallel": Layout(tensor=2, context=2, sequence_parallel=True),
    "CP2 x PP2": Layout(context=2, pipeline=2, padding=4),
    "PP2 with two chunks": Layout(pipeline=2, chunks=2),
    "TP2, windows and sinks": Layout(tensor=2, nearby=True),
    "PP2, windows and sinks": Layout(pipeline=2, nearby=True),
    "TP2, latents": Layout(tensor=2, latent=True),
    "TP2, latents, sequence parallel": Layout(
        tensor=2, sequence_parallel=True, padding=8, latent=True
    ),
    "PP2, latents": Layout(pipeline=2, latent=True),
    "PP2 with two chunks, full recompute": Layout(pipeline=2, chunks=2, recompute=True),
}


SLOW = {"CP3, padding", "CP2, full recompute", "CP2 x PP2"}


@pytest.mark.parametrize("attention", ["lse", "sdpa"])
@pytest.mark.parametrize(
    "layout",
    [pytest.param(own, marks=[pytest.mark.slow] if own in SLOW else []) for own in LAYOUTS],
)
def test_gradients_equal_one_sequence_at_a_time_in_one_process(layout, attention):
    chosen = LAYOUTS[layout]
    weights, reference = _weights_and_gradients(chosen)
    # Sequence parallelism divides the rows.
    if chosen.sequence_parallel and chosen.context == 1:
        chosen = Layout(**{**vars(chosen), "padding": 8 + _rows() % 2})
    ranks = run_distributed(chosen.ranks, _rank_gradients, chosen, attention, weights)
    seen = 0
    for rank, gradients in enumerate(ranks):
        stage, tensor_rank = rank // (chosen.tensor * chosen.context), rank % chosen.tensor
        for number, own in enumerate(gradients):
            place = number * chosen.pipeline + stage
            expected = _own_part(reference, chosen, tensor_rank, place)
            assert own.keys() == expected.keys()
            for name, value in expected.items():
                error = float((own[name] - value).norm() / value.norm())
                assert error < 1e-12, (rank, number, name, error)
                seen += 1
    assert seen >= len(reference)


def _rows() -> int:
    return len(_batches("sdpa")[0].tree.tokens)
