"""Compiled functions of CPU tensors, and what happens where nothing can be compiled."""

import pytest
import torch
from torch import Tensor

from megatron_rmt.cpu import compiled as cpu_compiled
from megatron_rmt.cpu.compiled import fused, wide


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("compiling")
def test_few_compilations_serve_all_numbers_of_rows_and_both_numbers_of_threads():
    @fused
    def softplus(x: Tensor, shift: Tensor) -> Tensor:
        return (x.exp() + 1).log() + shift

    before = _graphs()
    # The last are long enough for all threads.
    for rows in (3, 5, 7, 11, 2, 9, 9000, 10000, 11000):
        x, shift = torch.randn(rows, 64), torch.randn(64)
        torch.testing.assert_close(softplus(x, shift), torch.nn.functional.softplus(x) + shift)
    # Of each number of threads at most two: the first number of rows alone, then all others.
    assert 2 <= _graphs() - before <= 4


@pytest.mark.usefixtures("compiling")
def test_gradients_flow_through_a_compiled_function():
    @fused
    def product_of_sines(x: Tensor, y: Tensor) -> Tensor:
        return x.sin() * y.sin()

    x, y = (torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in "xy")
    by_x, by_y = torch.autograd.grad(product_of_sines(x, y).sum(), [x, y])
    torch.testing.assert_close(by_x, x.cos() * y.sin())
    torch.testing.assert_close(by_y, x.sin() * y.cos())


@pytest.mark.usefixtures("compiling")
def test_inside_another_compiled_function_it_is_a_part_of_that():
    @fused
    def double(x: Tensor) -> Tensor:
        return x * 2

    before = _graphs()
    compiled = torch.compile(lambda x: double(x) + 1, fullgraph=True)
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 3.0))
    assert _graphs() - before == 1


def test_a_function_that_cannot_be_compiled_runs_as_it_is_and_says_so_once(monkeypatch):
    attempts = []

    def refuse(function, **_):
        attempts.append(function)

        def call(*_):
            raise torch._dynamo.exc.TorchDynamoException("no such instruction")

        return call

    @fused
    def triple(x: Tensor) -> Tensor:
        return x * 3

    monkeypatch.setattr(cpu_compiled, "is_available", lambda: True)
    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.warns(UserWarning, match="triple runs uncompiled.*no such instruction"):
        assert torch.equal(triple(torch.ones(2)), torch.full((2,), 3.0))
    assert torch.equal(triple(torch.ones(2)), torch.full((2,), 3.0))
    assert len(attempts) == 1


@pytest.mark.usefixtures("compiling")
def test_nothing_is_compiled_where_torch_is_told_not_to_or_has_no_compiler(monkeypatch):
    # Without what it has found out before.
    is_available = cpu_compiled.is_available.__wrapped__
    assert is_available()
    with torch._dynamo.config.patch(disable=True):
        assert not is_available()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert not is_available()
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert not is_available()


def test_a_tensor_on_another_device_is_left_to_that_device(monkeypatch):
    monkeypatch.setattr(cpu_compiled, "is_available", lambda: pytest.fail("asked"))

    @fused
    def negative(x: Tensor) -> Tensor:
        return -x

    assert negative(torch.ones(2, device="meta")).shape == (2,)


def test_wide_is_fp32_at_least():
    for dtype, expected in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        assert wide(torch.zeros(1, dtype=dtype)).dtype == expected
