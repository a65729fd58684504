"""The fused head against plain log_softmax in float64."""

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_rmt.cpu.compiled import is_available
from megatron_rmt.model import head, head_compiled, head_plain, head_products
from megatron_rmt.model.head import token_entropies, token_loss_sum
from megatron_rmt.model.head_products import multiply_scores, wide_copy
from tests.head_problem import (
    HIDDEN,
    LOSSES,
    PADDED,
    VOCAB,
    clipped,
    decode_scores,
    expected_results,
    linear,
    log_probs_and_entropies,
    make_problem,
    relative_error,
    results_of_the_head,
    top_k_entropy,
)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("chunk_size", [1, 4, 13, 100])
def test_values_and_gradients_equal_log_softmax(chunk_size, loss):
    problem = make_problem()
    for value, reference in zip(
        results_of_the_head(problem, chunk_size, loss_of=LOSSES[loss]),
        expected_results(problem, LOSSES[loss]),
        strict=True,
    ):
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, reference, rtol=1e-11, atol=1e-12)


def test_a_clipped_loss_is_clipped_in_some_rows_and_not_in_others():
    """So that the tests with it see both."""
    problem = make_problem()
    by_log_probs = expected_results(problem)[1].requires_grad_()
    loss = clipped(problem)(slice(None), by_log_probs)
    (gradient,) = torch.autograd.grad(loss.sum(), by_log_probs)
    assert 0 < int((gradient == 0).sum()) < len(gradient)


def test_padding_rows_of_the_weight_get_no_gradient_and_have_no_say():
    problem = make_problem()
    plain = results_of_the_head(problem)
    problem["weight"][VOCAB:] = 1e4
    for padded, value in zip(results_of_the_head(problem), plain, strict=True):
        assert torch.equal(padded, value)
    assert plain[4][VOCAB:].abs().max() == 0


# Scores of bf16 inputs are made in fp32: the values are as good as those of fp32 inputs. Gradients
# come back in bf16 (rounded by at most 2^-9), made from gradients of scores that bf16 units read in
# bf16 (the same again).
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("dtype", "value_bound", "gradient_bound"),
    [(torch.float32, 1e-6, 1e-6), (torch.bfloat16, 1e-6, 2.0**-8), (torch.float16, 1e-6, 2.0**-12)],
    ids=str,
)
def test_half_precision_inputs_lose_nothing_but_the_rounding_of_gradients(
    dtype, value_bound, gradient_bound
):
    problem = make_problem(rows=40, dtype=dtype)
    results = results_of_the_head(problem, 16)
    bounds = [1e-5, value_bound, value_bound, gradient_bound, gradient_bound]
    assert [value.dtype for value in results] == [*[torch.float32] * 3, dtype, dtype]
    for value, reference, bound in zip(results, expected_results(problem), bounds, strict=True):
        assert relative_error(value, reference) < bound


@pytest.fixture
def gpu_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 matrices are multiplied into fp32, as a GPU does, and their gradients read in fp16."""
    multiply = torch.mm

    def mm(left: Tensor, right: Tensor, out_dtype: torch.dtype | None = None, **named: Tensor):
        if out_dtype is not None:
            left, right = left.to(out_dtype), right.to(out_dtype)
        return multiply(left, right, **named)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(
        head_products,
        "_multiplies_into_fp32",
        lambda left, right: left.dtype == right.dtype == torch.float16,
    )


@pytest.mark.usefixtures("gpu_products")
@pytest.mark.parametrize("tokens", [1, 256, 65_536, 4_194_304])
def test_the_weight_of_a_token_in_a_large_batch_is_not_lost_in_fp16(tokens: int):
    """Gradients of scores are rounded to fp16 before Megatron's loss scale reaches them. Beside
    next tokens of little weight a chunk holds predictions of much."""
    loss_scale = 64.0 * tokens
    problem = make_problem(rows=40, dtype=torch.float16)
    problem["hidden"] *= 0.05  # many probabilities, each of them small
    problem["by_log_prob"] = torch.full((40,), -0.1 / tokens, dtype=torch.float64)
    problem["by_log_prob"][[3, 17]] *= 500
    scaled = problem | {"by_log_prob": problem["by_log_prob"] * loss_scale}
    references = expected_results(scaled)[3:]
    hidden, weight = (problem[name].clone().requires_grad_() for name in ("hidden", "weight"))
    total, _ = token_loss_sum(
        hidden,
        weight,
        problem["targets"],
        linear(problem),
        vocab_size=VOCAB,
        tp_group=None,
        chunk_size=16,
    )
    gradients = torch.autograd.grad(3 * loss_scale * total, [hidden, weight])
    for gradient, reference in zip(gradients, references, strict=True):
        assert gradient.dtype == torch.float16
        assert relative_error(gradient, reference) < 1e-3


@pytest.mark.parametrize("largest", [0.0, 1e-45, 2.4e-8, 1.0, 3e4, 1e30, float("nan")])
def test_weights_are_brought_into_the_range_of_fp16_by_a_power_of_two(largest: float):
    weights = torch.tensor([largest, -largest / 3])
    scaled, undo = head_products.in_range(weights, torch.float16)
    assert undo.isfinite()
    assert undo > 0
    assert torch.frexp(undo).mantissa == 0.5
    torch.testing.assert_close(scaled * undo, weights, rtol=0, atol=0, equal_nan=True)
    if largest > 1e-30:
        assert 2.0**13 <= scaled.abs().max() <= 2.0**14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_other_dtypes_have_the_range_of_fp32(dtype: torch.dtype):
    weights = torch.tensor([1e-20, 1.0])
    assert head_products.in_range(weights, dtype) == (weights, None)


@pytest.mark.usefixtures("compiled")
def test_conversion_in_blocks_covers_a_vocabulary_of_many_blocks(monkeypatch):
    monkeypatch.setattr("megatron_rmt.model.head_products._CONVERSION_BLOCK", 7)
    problem = make_problem(rows=6, dtype=torch.bfloat16)
    for value, reference in zip(
        results_of_the_head(problem, 4), expected_results(problem), strict=True
    ):
        assert relative_error(value, reference) < 2.0**-8


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_that_was_not_written_has_no_say(dtype):
    problem = make_problem(rows=40, dtype=dtype) | {"vocab_size": 101}
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        results = [*results_of_the_head(problem, 40), *results_of_the_head(problem)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(value.isfinite().all() for value in results)


def test_bf16_hidden_states_with_an_fp32_weight():
    problem = make_problem()
    problem["hidden"] = problem["hidden"].bfloat16()
    problem["weight"] = problem["weight"].float()
    results, references = results_of_the_head(problem, 16), expected_results(problem)
    assert [value.dtype for value in results[3:]] == [torch.bfloat16, torch.float32]
    bounds = [1e-5, 1e-6, 1e-6, 2**-9, 1e-6]
    for value, reference, bound in zip(results, references, bounds, strict=True):
        assert relative_error(value, reference) < bound


def test_inputs_are_not_modified():
    problem = make_problem(dtype=torch.float32)
    before = {name: value.clone() for name, value in problem.items()}
    hidden, weight = problem["hidden"].requires_grad_(), problem["weight"].requires_grad_()
    arguments = {"vocab_size": VOCAB, "tp_group": None, "chunk_size": 4}
    loss = linear(problem)
    total, _ = token_loss_sum(hidden, weight, problem["targets"], loss, **arguments)
    total.backward()
    token_entropies(hidden, weight, **arguments)
    decode_scores(hidden, weight)
    for name, value in before.items():
        assert torch.equal(problem[name], value), name


@pytest.mark.usefixtures("compiled")
def test_inputs_need_not_be_contiguous():
    problem = make_problem(rows=40, dtype=torch.float32)
    plain = results_of_the_head(problem, 16)
    strided = problem | {
        "hidden": torch.stack([problem["hidden"]] * 2, 1)[:, 0],
        "weight": problem["weight"].t().contiguous().t(),
        "targets": torch.stack([problem["targets"]] * 2, 1)[:, 0],
        "by_log_prob": torch.stack([problem["by_log_prob"]] * 2, 1)[:, 0],
    }
    for value, reference in zip(results_of_the_head(strided, 16), plain, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("compiled")
def test_extreme_scores_stay_finite_and_entropy_is_not_negative():
    hidden = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    weight = torch.arange(5.0)[:, None].requires_grad_()
    settings = {"vocab_size": 5, "tp_group": None, "chunk_size": 2}
    total, log_probs = token_loss_sum(
        hidden, weight, torch.tensor([4, 4, 2]), lambda _, log_probs: log_probs, **settings
    )
    entropies, _ = token_entropies(hidden, weight, **settings)
    torch.testing.assert_close(log_probs, torch.tensor([0.0, -4e4, -torch.tensor(5.0).log()]))
    torch.testing.assert_close(entropies, torch.tensor([0.0, 0.0, torch.tensor(5.0).log()]))
    assert entropies.min() >= 0
    total.backward()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_no_rows():
    total, log_probs, entropies, by_hidden, by_weight = results_of_the_head(make_problem(rows=0), 4)
    assert total == 0
    assert log_probs.shape == entropies.shape == (0,)
    assert by_hidden.shape == (0, HIDDEN)
    assert torch.equal(by_weight, torch.zeros(PADDED, HIDDEN, dtype=torch.float64))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient(frozen):
    problem = make_problem()
    trained = "weight" if frozen == "hidden" else "hidden"
    problem[trained].requires_grad_()
    total, _ = token_loss_sum(
        problem["hidden"],
        problem["weight"],
        problem["targets"],
        clipped(problem),
        vocab_size=VOCAB,
        tp_group=None,
        chunk_size=5,
    )
    (3 * total).backward()
    assert problem[frozen].grad is None
    expected = expected_results(problem, clipped)[3 if trained == "hidden" else 4]
    torch.testing.assert_close(problem[trained].grad, expected)


def test_without_grad_it_gives_the_same_numbers_and_differentiates_nothing():
    problem = make_problem()
    seen = []

    def loss(rows: slice, log_probs: Tensor) -> Tensor:
        seen.append(log_probs.requires_grad)
        return clipped(problem)(rows, log_probs)

    with torch.no_grad():
        values = token_loss_sum(
            problem["hidden"].requires_grad_(),
            problem["weight"],
            problem["targets"],
            loss,
            vocab_size=VOCAB,
            tp_group=None,
            chunk_size=5,
        )
    assert seen == [False] * 3
    assert not values[0].requires_grad
    for value, reference in zip(values, expected_results(problem, clipped)[:2], strict=True):
        torch.testing.assert_close(value, reference)


def test_gradients_are_given_once():
    problem = make_problem()
    hidden = problem["hidden"].requires_grad_()
    total, _ = token_loss_sum(
        hidden,
        problem["weight"],
        problem["targets"],
        linear(problem),
        vocab_size=VOCAB,
        tp_group=None,
        chunk_size=5,
    )
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran a second time"):
        total.backward()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2.0**-8)],
    ids=str,
)
def test_a_scale_of_each_row_is_a_temperature(dtype, bound):
    """Scores of bf16 hidden states are scaled after the product: nothing is rounded for it."""
    problem = make_problem(rows=40, dtype=dtype)
    problem["scale"] = torch.linspace(0.3, 1.7, 40, dtype=torch.float64)
    _, log_probs, _, *gradients = results_of_the_head(problem, 7)
    _, expected, _, *references = expected_results(problem)
    assert relative_error(log_probs, expected) < min(bound, 2e-6)
    for gradient, reference in zip(gradients, references, strict=True):
        assert relative_error(gradient, reference) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_summed_in_fp32_by_the_device_give_the_same_gradients(monkeypatch, dtype):
    """A GPU's tensor cores, for which here a product in fp64 stands in."""

    def wide(product: Callable) -> Callable:
        def emulated(*matrices: Tensor, out_dtype: torch.dtype, out: Tensor | None = None):
            assert {x.dtype for x in matrices[-2:]} == {dtype}
            result = product(*(x.double() for x in matrices)).to(out_dtype)
            return result if out is None else out.copy_(result)

        return emulated

    problem = make_problem(rows=40, dtype=dtype)
    _, expected_log_probs, _, *references = expected_results(problem)
    monkeypatch.setattr(head_products, "_multiplies_into_fp32", lambda left, right: True)
    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, wide(getattr(torch, name)))
    _, log_probs, _, *gradients = results_of_the_head(problem, 7)
    assert relative_error(log_probs, expected_log_probs) < 2e-6
    for gradient, reference in zip(gradients, references, strict=True):
        assert relative_error(gradient, reference) < 2.0**-8


def test_the_weights_gradient_is_added_to_main_grad_unrounded():
    problem = make_problem(rows=40, dtype=torch.bfloat16)
    weight = problem["weight"].requires_grad_()
    weight.main_grad = torch.zeros(weight.shape)
    weight.grad_added_to_main_grad = False
    *_, rounded = results_of_the_head(problem, 7)
    for count in (1, 2):
        total, _ = token_loss_sum(
            problem["hidden"],
            weight,
            problem["targets"],
            linear(problem),
            vocab_size=VOCAB,
            tp_group=None,
            chunk_size=7,
            into_main_grad=True,
        )
        (3 * total).backward()
        assert weight.grad_added_to_main_grad
        # That there is a gradient fires the hooks which wait for it.
        assert weight.grad.shape == weight.shape
        assert weight.grad.dtype == torch.bfloat16
        added = weight.main_grad / count
        assert torch.equal(added.bfloat16(), rounded)
        assert not torch.equal(added, rounded.float())


@pytest.mark.usefixtures("compiled")
def test_compiled_sweeps_take_fp32_scores_where_functions_can_be_compiled(monkeypatch):
    taken = []
    for name in ("statistics_", "gradient_"):
        plain, compiled = (getattr(sweeps, name) for sweeps in (head_plain, head_compiled))
        assert inspect.signature(plain) == inspect.signature(compiled)
        for sweeps, function in ((head_plain, plain), (head_compiled, compiled)):

            def taking(*args: object, function: Callable = function, sweeps: object = sweeps):
                taken.append(sweeps)
                return function(*args)

            monkeypatch.setattr(sweeps, name, taking)
    wanted = head_compiled if is_available() else head_plain
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        taken.clear()
        results_of_the_head(make_problem(dtype=dtype), 5)
        # Three chunks: statistics and gradients, then entropies.
        assert taken == [head_plain if dtype == torch.float64 else wanted] * 9


@pytest.mark.parametrize("rows_in_cache", [1, 2, 3, 100])
def test_sweeps_of_a_few_rows_at_a_time_cover_every_row(monkeypatch, rows_in_cache):
    monkeypatch.setattr("megatron_rmt.model.head_plain._CPU_BLOCK", rows_in_cache * VOCAB + 1)
    problem = make_problem()
    for value, reference in zip(
        results_of_the_head(problem, 7), expected_results(problem), strict=True
    ):
        torch.testing.assert_close(value, reference, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_entropies_and_argmax(chunk_size):
    problem = make_problem()
    hidden, weight = problem["hidden"], problem["weight"]
    arguments = {"vocab_size": VOCAB, "tp_group": None, "chunk_size": chunk_size}
    entropies, ids = token_entropies(hidden, weight, **arguments)
    torch.testing.assert_close(
        entropies, log_probs_and_entropies(hidden, weight, problem["targets"])[1]
    )
    assert torch.equal(ids, (hidden @ weight[:VOCAB].T).argmax(-1))
    for top_k in (1, 4, 16, VOCAB, 10 * VOCAB):
        entropies, same_ids = token_entropies(hidden, weight, top_k=top_k, **arguments)
        torch.testing.assert_close(entropies, top_k_entropy(hidden, weight, top_k))
        assert torch.equal(same_ids, ids)


@pytest.mark.usefixtures("compiled")
def test_argmax_of_equal_scores_is_the_first():
    _, ids = token_entropies(
        torch.ones(2, 3), torch.ones(6, 3), vocab_size=5, tp_group=None, chunk_size=2
    )
    assert ids.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_scores_for_decoding_are_the_same_by_a_wide_copy_of_the_weight(dtype):
    problem = make_problem(dtype=dtype)
    hidden, weight = problem["hidden"].detach(), problem["weight"].detach()
    assert (wide_copy(weight) is None) == (dtype == torch.float32)
    found = decode_scores(hidden, weight)
    expected = hidden.double() @ weight[:VOCAB].double().T
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    without_copy = torch.empty_like(found)
    multiply_scores(hidden, weight[:VOCAB], without_copy)
    torch.testing.assert_close(found, without_copy)


def test_scores_for_decoding_are_fp32_and_without_padding():
    problem = make_problem(dtype=torch.bfloat16)
    hidden, weight = problem["hidden"], problem["weight"]
    logits = decode_scores(hidden, weight)
    assert logits.shape == (13, VOCAB)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.float() @ weight[:VOCAB].float().T)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (VOCAB, r"targets holds 90, not in \[0, 90\)"),
        (-1, r"targets holds -1, not in \[0, 90\)"),
    ],
)
def test_targets_outside_the_vocabulary_are_named(target, message):
    problem = make_problem()
    arguments = {"vocab_size": VOCAB, "tp_group": None, "chunk_size": 4}
    targets = torch.full((13,), target)
    with pytest.raises(ValueError, match=message):
        token_loss_sum(problem["hidden"], problem["weight"], targets, linear(problem), **arguments)


@pytest.mark.parametrize("target", [-100, -1, VOCAB, 2 * VOCAB])
def test_where_nobody_looks_a_target_outside_the_vocabulary_is_not_a_number(target):
    problem = make_problem()
    targets = torch.arange(13)
    shard = head._Shard.of(problem["weight"], VOCAB, None, 4)
    inputs = problem["hidden"], problem["weight"]

    def log_probs(targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = linear(problem)
        return head._TokenLossSum.apply(*inputs, targets, loss, None, shard, False, False)

    _, right = log_probs(targets)
    targets[5] = target
    total, found = log_probs(targets)
    assert total.isnan()
    assert found[5].isnan()
    others = torch.arange(13) != 5
    assert torch.equal(found[others], right[others])


def test_no_rows_by_vocabulary_tensor_is_ever_allocated():
    rows, vocab, chunk_size = 512, 1024, 16
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight = torch.randn(vocab, 8, requires_grad=True)
    settings = {"vocab_size": vocab, "tp_group": None, "chunk_size": chunk_size}
    targets = torch.zeros(rows, dtype=torch.int64)
    with torch.profiler.profile(profile_memory=True) as profile:
        token_loss_sum(hidden, weight, targets, lambda _, x: x.square(), **settings)[0].backward()
        token_entropies(hidden, weight, **settings)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 2 * chunk_size * vocab * 4 + 1024
