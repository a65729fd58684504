"""Each backend of the tree's attention against dense masked attention in float64."""

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from megatron_rmt.model import tree_attention
from megatron_rmt.model.blocks import Block, ancestry, longest_path, position_block
from megatron_rmt.model.layer_attention import LayerAttention
from megatron_rmt.model.lse_attention import LseAttention
from megatron_rmt.model.tree_attention import (
    BACKENDS,
    FlexAttention,
    SdpaAttention,
    backend_for,
    check_backend,
)
from megatron_rmt.model.visibility import TreeVisibility

HEADS, KV_HEADS, WIDTH = 4, 2, 8
SCALE = 0.3
LAYER = LayerAttention(1, SCALE)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def _blocks(
    documents: Sequence[int], positions: Sequence[tuple[int, int, int, Sequence[int]]]
) -> tuple[Block, ...]:
    """Documents of these lengths, then (trunk_first, trunk_limit, stem, branches) in order."""
    blocks, size = [], 0
    for length in documents:
        blocks.append(Block(size, size + length))
        size += length
    for trunk_first, trunk_limit, stem, branches in positions:
        blocks.append(position_block(size, trunk_first, trunk_limit, stem, branches))
        size = blocks[-1].limit
    return tuple(blocks)


TREES: dict[str, tuple[Block, ...]] = {
    "ragged": _blocks([9], [(0, 3, 2, [3, 1, 5]), (0, 7, 2, [2, 2, 4])]),
    "uniform": _blocks([9], [(0, 3, 2, [4, 4, 4]), (0, 7, 2, [4, 4, 4])]),
    "stems as long as branches": _blocks([9], [(0, 3, 4, [4, 4]), (0, 7, 4, [4, 4])]),
    "both ends": _blocks([6], [(0, 1, 2, [3, 2]), (0, 6, 2, [1, 3])]),
    "empty branches": _blocks([6], [(0, 2, 1, [0, 4, 0]), (0, 3, 3, [0, 0]), (0, 4, 2, [])]),
    "no positions": _blocks([7], []),
    "single branches": _blocks([6], [(0, 2, 2, [3]), (0, 5, 2, [4]), (0, 6, 3, [1, 2])]),
    "one row": _blocks([1], [(0, 1, 1, [1, 1])]),
    "packed documents": _blocks([5, 1, 5, 5], [(0, 4, 2, [2, 3]), (11, 16, 1, [1, 1])]),
    "prefix shared per position": _blocks([3], [(0, 3, 2, [4, 4])])
    + tuple(
        Block(b.first + 13, b.limit + 13, 13 * bool(b.trunk_limit), 13 + b.trunk_limit, b.branches)
        if b.trunk_limit
        else Block(13, 13 + b.limit)
        for b in _blocks([5], [(0, 5, 2, [4, 1])])
    ),
    # Longer than the blocks in which flash attention goes through queries (32 to 256) and keys.
    "long": _blocks([610], [(0, 1, 3, [40, 70]), (0, 513, 33, [20] * 9), (0, 610, 5, [270, 3])]),
}


def _tokens(blocks: Sequence[Block]) -> int:
    return blocks[-1].limit


@functools.cache
def _brute_force(blocks: tuple[Block, ...]) -> Tensor:
    """``[tokens, tokens]`` bool, written out row by row."""
    visible = torch.zeros(_tokens(blocks), _tokens(blocks), dtype=torch.bool)
    for block in blocks:
        owners = [-1] * (block.limit - block.first - sum(block.branches))
        for branch, length in enumerate(block.branches):
            owners += [branch] * length
        for index, mine in enumerate(owners):
            row = block.first + index
            visible[row, block.trunk_first : block.trunk_limit] = True
            seen = [theirs in (-1, mine) for theirs in owners[: index + 1]]
            visible[row, block.first : row + 1] = torch.tensor(seen)
    return visible


@functools.cache
def _brute_force_within(blocks: tuple[Block, ...], window: int) -> Tensor:
    """The same, of every row only the last ``window`` that it sees, and itself."""
    visible = torch.zeros_like(_brute_force(blocks))
    for row, seen in enumerate(_brute_force(blocks)):
        # A row's ancestors are packed in the order in which they follow each other.
        visible[row, seen.nonzero()[-(window + 1) :, 0]] = True
    return visible


@pytest.mark.parametrize("length", [0, 1, 4])
def test_a_single_branch_sees_what_it_would_beside_others(length: int):
    alone = (Block(0, 9), position_block(9, 2, 7, 3, [length]))
    beside = (Block(0, 9), Block(9, 12 + length, 2, 7, (length,)))
    assert not alone[1].branches
    assert torch.equal(_brute_force(alone), _brute_force(beside))


def _inputs(tokens: int, seed: int = 0) -> list[Tensor]:
    """Query, key, value as Megatron gives them: value is a slice of the fused projection."""
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(tokens, KV_HEADS, 4 * WIDTH, generator=generator, dtype=torch.float64)
    query = fused[..., : 2 * WIDTH].reshape(tokens, HEADS, WIDTH)
    return [query, fused[..., 2 * WIDTH : 3 * WIDTH].contiguous(), fused[..., 3 * WIDTH :]]


def _dense(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * SCALE
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _with_gradients(attend: Attend, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients by query, key and value, for a random gradient of the output.

    Inputs are rounded to bf16 first, so that every dtype computes the same.
    """
    inputs = [x.bfloat16().to(dtype).requires_grad_() for x in inputs]
    output = attend(*inputs)
    generator = torch.Generator().manual_seed(99)
    by_output = torch.randn(output.shape, generator=generator, dtype=torch.float64).bfloat16()
    return [output.detach(), *torch.autograd.grad(output, inputs, by_output.to(dtype))]


def _errors(results: Sequence[Tensor], references: Sequence[Tensor]) -> list[float]:
    return [
        float((result.double() - reference.double()).norm() / reference.double().norm())
        for result, reference in zip(results, references, strict=True)
    ]


def _reference(blocks: Sequence[Block], inputs: Sequence[Tensor]) -> list[Tensor]:
    visible = _brute_force(blocks)
    return _with_gradients(lambda *x: _dense(*x, visible), inputs, torch.float64)


@pytest.mark.parametrize("tree", TREES)
def test_visibility_is_that_of_every_row_written_out(tree):
    blocks, rows = TREES[tree], torch.arange(_tokens(TREES[tree]))
    visible = _brute_force(blocks)
    assert torch.equal(ancestry(blocks)(rows[:, None], rows), visible)
    assert longest_path(blocks) == visible.sum(1).max()


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("window", [0, 1, 4, 40, 700])
def test_a_window_leaves_the_nearest_ancestors(tree, window: int):
    blocks, rows = TREES[tree], torch.arange(_tokens(TREES[tree]))
    within = ancestry(blocks, window=window)(rows[:, None], rows)
    assert torch.equal(within, _brute_force_within(blocks, window))


@pytest.mark.parametrize(
    ("tree", "window"),
    [(tree, window) for tree in TREES for window in ((40, 300) if tree == "long" else (0, 1, 4))],
)
@pytest.mark.parametrize("attention", ["auto", "flex"])
def test_layers_with_windows_equal_dense_attention(attention, tree, window: int, monkeypatch):
    """Between layers without, of one micro-batch; documents in several pieces of few rows."""
    monkeypatch.setattr(tree_attention, "_PIECE_ROWS", 7)
    blocks = TREES[tree]
    inputs = _inputs(_tokens(blocks))
    visibility = TreeVisibility(tokens=_tokens(blocks), blocks=blocks, attention=attention)
    for layer in (LAYER, LayerAttention(2, SCALE, window), LAYER, LayerAttention(4, SCALE, 2)):
        visible = _brute_force(blocks)
        if layer.window is not None:
            visible = _brute_force_within(blocks, layer.window)
        if attention == "flex":
            output = visibility.attend(layer, *inputs)
            assert max(_errors([output], [_dense(*inputs, visible)])) < 1e-14
            continue
        attend = functools.partial(visibility.attend, layer)
        ours = _with_gradients(attend, inputs, torch.float64)
        dense = _with_gradients(lambda *x, seen=visible: _dense(*x, seen), inputs, torch.float64)
        assert max(_errors(ours, dense)) < 1e-13


def _with_sink(visible: Tensor, sink: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``_dense`` with one more column of scores, written out."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * SCALE
    column = sink[:, None, None].expand(-1, len(query), -1)
    scores = torch.cat([scores.masked_fill(~visible, -math.inf), column], dim=-1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :-1], value)


SINK = torch.tensor([-1.5, 0.25, 3.0, 40.0], dtype=torch.float64)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("attention", ["lse", "sdpa", "flex"])
def test_sinks_are_one_more_column_of_the_softmax(attention, tree, window: int | None):
    """Scores of sinks that are small beside the others, and all but everything."""
    blocks = TREES[tree]
    visible = _brute_force(blocks) if window is None else _brute_force_within(blocks, window)
    inputs = [*_inputs(_tokens(blocks)), SINK]
    visibility = TreeVisibility(tokens=_tokens(blocks), blocks=blocks, attention=attention)

    def attend(query: Tensor, key: Tensor, value: Tensor, sink: Tensor) -> Tensor:
        return visibility.attend(LayerAttention(1, SCALE, window, sink), query, key, value)

    def dense(query: Tensor, key: Tensor, value: Tensor, sink: Tensor) -> Tensor:
        return _with_sink(visible, sink, query, key, value)

    if attention == "flex":
        assert max(_errors([attend(*inputs)], [dense(*inputs)])) < 1e-14
        return
    errors = _errors(*(_with_gradients(x, inputs, torch.float64) for x in (attend, dense)))
    assert len(errors) == 5
    assert max(errors) < 1e-13


@pytest.mark.parametrize("attention", ["lse", "sdpa"])
def test_sinks_in_bf16_are_close_to_float64(attention):
    blocks = TREES["long"]
    inputs = [*_inputs(_tokens(blocks)), SINK / 13]
    visible = _brute_force(blocks)
    attend = BACKENDS[attention](blocks)
    ours = _with_gradients(lambda *x: attend(*x[:3], SCALE, None, x[3]), inputs, torch.bfloat16)
    dense = _with_gradients(lambda *x: _with_sink(visible, x[3], *x[:3]), inputs, torch.float64)
    *errors, of_sink = _errors(ours, dense)
    assert max(errors) < 6e-3
    assert of_sink < 1.5e-2


def test_bf16_does_not_round_the_score_of_a_sink_once_more():
    sink = SINK.float()
    inputs = [x.bfloat16() for x in _inputs(3)]
    query, key, value = tree_attention._with_sink(*inputs, sink, SCALE)
    scores = (
        torch.einsum("qhd,hd->qh", query.float(), key[-1, :1].float().expand(HEADS, -1)) * SCALE
    )
    torch.testing.assert_close(scores, sink.expand(3, -1), rtol=2e-5, atol=0)
    assert not value[-1].any()


def test_no_mask_of_a_window_is_as_large_as_the_document():
    blocks = (Block(0, 3000),)
    visibility = TreeVisibility(tokens=3000, blocks=blocks)
    visibility.attend(LayerAttention(1, SCALE, 500), *_inputs(3000))
    masks = visibility._backends[True]._masks.values()
    assert [[*mask.shape] for mask in masks] == [[500, 500], *[[500, 1000]] * 5]


@pytest.mark.parametrize("branches", [[3, 2], [0, 1, 4], [0, 0], []])
def test_block_of_a_position(branches):
    block = position_block(20, 4, 9, 3, branches)
    assert (block.first, block.limit) == (20, 23 + sum(branches))
    assert (block.trunk_first, block.trunk_limit, block.stem_limit) == (4, 9, 23)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("backend", ["sdpa", "lse"])
def test_output_and_gradients_equal_dense_attention(backend, tree, dtype):
    blocks, inputs = TREES[tree], _inputs(_tokens(TREES[tree]))
    attention = BACKENDS[backend](blocks)
    # Twice: what a backend keeps between layers must serve the next one.
    for _ in range(2):
        result = _with_gradients(lambda *x: attention(*x, SCALE), inputs, dtype)
        assert [x.dtype for x in result] == [dtype] * 4
        errors = _errors(result, _reference(blocks, inputs))
        assert max(errors) < {torch.float32: 1e-6, torch.float64: 1e-14}[dtype], errors


@pytest.mark.parametrize("tree", TREES)
def test_the_forward_of_flex_equals_dense_attention(tree):
    blocks, inputs = TREES[tree], _inputs(_tokens(TREES[tree]))
    output = FlexAttention(blocks)(*inputs, SCALE)
    assert max(_errors([output], [_dense(*inputs, _brute_force(blocks))])) < 1e-14


@pytest.mark.parametrize("tree", ["ragged", "long"])
@pytest.mark.parametrize("backend", ["sdpa", "lse"])
def test_bf16_is_as_close_to_float64_as_one_sequence_at_a_time(backend, tree):
    blocks, inputs = TREES[tree], _inputs(_tokens(TREES[tree]))
    reference = _reference(blocks, inputs)
    visible = _brute_force(blocks)

    def one_at_a_time(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Every leaf's path as a sequence of its own; a row is taken from the first path it is in,
        whose weights are the same in all of them."""
        paths = [visible[block.limit - 1].nonzero()[:, 0] for block in blocks]
        for block in blocks:
            ends = [block.stem_limit + sum(block.branches[:n]) for n in range(len(block.branches))]
            paths += [visible[end - 1].nonzero()[:, 0] for end in ends if end > block.first]
        rows = torch.zeros_like(query)
        for path in paths:
            rows = rows.index_copy(0, path, _causal(query[path], key[path], value[path]))
        return rows

    naive = _errors(_with_gradients(one_at_a_time, inputs, torch.bfloat16), reference)
    attention = BACKENDS[backend](blocks)
    ours = _errors(
        _with_gradients(lambda *x: attention(*x, SCALE), inputs, torch.bfloat16), reference
    )
    # Two partial outputs are rounded where one sequence rounds one: a little is granted for that.
    assert all(mine < 1.3 * its for mine, its in zip(ours, naive, strict=True)), (ours, naive)
    assert max(ours) < 6e-3


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return SdpaAttention((Block(0, len(query)),))(query, key, value, SCALE)


PERTURBATIONS: dict[str, Callable[[Block], Block]] = {
    "trunk one row longer": lambda b: Block(
        b.first, b.limit, b.trunk_first, b.trunk_limit + 1, b.branches
    ),
    "trunk one row shorter": lambda b: Block(
        b.first, b.limit, b.trunk_first, b.trunk_limit - 1, b.branches
    ),
    "trunk starts late": lambda b: Block(
        b.first, b.limit, b.trunk_first + 1, b.trunk_limit, b.branches
    ),
    "a branch sees its sibling": lambda b: Block(
        b.first, b.limit, b.trunk_first, b.trunk_limit, (b.branches[0], sum(b.branches[1:]))
    ),
    "stem taken for a branch": lambda b: Block(
        b.first, b.limit, b.trunk_first, b.trunk_limit, (1, *b.branches)
    ),
}


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_comparison_notices(backend, perturbation):
    """Negative controls: one block told a little wrong is far outside every tolerance."""
    blocks = TREES["ragged"]
    inputs = _inputs(_tokens(blocks))
    wrong = (*blocks[:-1], PERTURBATIONS[perturbation](blocks[-1]))
    output = BACKENDS[backend](wrong)(*inputs, SCALE)
    assert max(_errors([output], [_dense(*inputs, _brute_force(blocks))])) > 1e-3


@pytest.mark.parametrize("backend", ["sdpa", "lse"])
def test_gradients_of_expanded_and_transposed_tensors(backend):
    """A sum's gradient has stride 0; a query that a caller transposed is not contiguous."""
    blocks = TREES["ragged"]
    query, key, value = _inputs(_tokens(blocks))
    query = query.transpose(0, 2).contiguous().transpose(0, 2)
    attention, visible = BACKENDS[backend](blocks), _brute_force(blocks)
    results = []
    for attend in (lambda *x: attention(*x, SCALE), lambda *x: _dense(*x, visible)):
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        results.append(torch.autograd.grad(attend(*inputs).sum(), inputs))
    assert max(_errors(results[0][2:], results[1][2:])) < 1e-14


def test_a_plan_is_positions_and_a_few_integers():
    """No mask, whichever layer has attended: lse keeps only how rows are divided."""
    blocks = TREES["long"]
    visibility = TreeVisibility(tokens=_tokens(blocks), blocks=blocks)
    visibility.use_position_ids(torch.arange(visibility.tokens), visibility.tokens)
    visibility.attend(LAYER, *_inputs(visibility.tokens))

    def tensors(value: object) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        inside = vars(value).values() if hasattr(value, "__dict__") else ()
        inside = value.values() if isinstance(value, dict) else inside
        inside = value if isinstance(value, (tuple, list)) else inside
        return [tensor for item in inside for tensor in tensors(item)]

    assert [tensor.numel() for tensor in tensors(visibility)] == [visibility.tokens]


def test_layers_share_what_a_backend_prepares_and_other_blocks_do_not():
    blocks = TREES["ragged"]
    inputs = _inputs(_tokens(blocks))
    visibility = TreeVisibility(tokens=_tokens(blocks), blocks=blocks, attention="sdpa")
    visibility.attend(LAYER, *inputs)
    backend = visibility._backends[False]
    visibility.attend(LayerAttention(2, SCALE), *inputs)
    assert visibility._backends[False] is backend
    assert isinstance(backend, SdpaAttention)
    visibility.blocks = (*blocks[:-1], PERTURBATIONS["trunk one row shorter"](blocks[-1]))
    output = visibility.attend(LAYER, *inputs)
    assert max(_errors([output], [_dense(*inputs, _brute_force(visibility.blocks))])) < 1e-14


@pytest.fixture
def _compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither of torch's two switches is off, of which its configuration shows one."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    with torch._dynamo.config.patch(disable=False):
        yield


@pytest.mark.usefixtures("_compiling")
def test_auto_is_the_fastest_that_runs():
    assert backend_for("auto", CPU) is LseAttention
    compiles = importlib.util.find_spec("triton") is not None
    assert backend_for("auto", CUDA) is (FlexAttention if compiles else SdpaAttention)


@pytest.mark.usefixtures("_compiling")
@pytest.mark.parametrize("switch", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_flex_without_a_compiler_is_neither_taken_nor_allowed(monkeypatch, switch: str):
    monkeypatch.setenv(switch, "1")
    # The second is read when torch is imported.
    with torch._dynamo.config.patch(disable=switch == "TORCH_COMPILE_DISABLE"):
        assert backend_for("auto", CUDA) is SdpaAttention
        with pytest.raises(ValueError, match=r"^--rmt-attention is flex, .* TORCHDYNAMO_DISABLE"):
            check_backend("flex", CUDA)


def test_kernels_that_plan_for_each_shape_are_left_out_on_a_gpu():
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    with tree_attention._kernels(CUDA):
        assert not enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    with tree_attention._kernels(CPU):
        assert enabled()


@pytest.mark.parametrize("tokens", [1, 127, 128, 300])
def test_flex_sees_whole_blocks_of_rows_alone(monkeypatch, tokens: int):
    seen = []
    plain = tree_attention.flex_attention

    def attend(query: Tensor, *others: Tensor, **named: object) -> Tensor:
        seen.append(query.shape[2])
        return plain(query, *others, **named)

    monkeypatch.setattr(tree_attention, "flex_attention", attend)
    inputs = _inputs(tokens)
    output = FlexAttention([Block(0, tokens)])(*inputs, SCALE)
    assert seen == [-(-tokens // 128) * 128]
    assert max(_errors([output], [_dense(*inputs, _brute_force((Block(0, tokens),)))])) < 1e-14


@pytest.mark.usefixtures("_compiling")
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_what_cannot_train_is_refused_before_the_first_step(device):
    for name in ("auto", "sdpa"):
        check_backend(name, device)
    other = {"cpu": "flex", "cuda": "lse"}[device.type]
    with pytest.raises(ValueError, match=f"^--rmt-attention is {other}, .*; pass auto, "):
        check_backend(other, device)
    check_backend({"cpu": "lse", "cuda": "flex"}[device.type], device)
