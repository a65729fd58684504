"""The CPU's fused norm, rotary embedding and SwiGLU against the same in float64."""

import subprocess
import sys
import textwrap

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor

from megatron_rmt.cpu import layer_kernels
from megatron_rmt.cpu.layer_kernels import rms_norm, rotate, swiglu, swiglu_backward
from tests.distributed import REPOSITORY

pytestmark = pytest.mark.usefixtures("compiled")
# Relative: of fp32 arithmetic, and of one rounding to bf16.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float64: 1e-14}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


def _normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def _check(function, reference, inputs: list[Tensor]) -> None:
    """Values and gradients of ``function`` against ``reference`` in float64."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    output, expected = function(*inputs), reference(*exact)
    weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    gradients = torch.autograd.grad(output, inputs, weight.to(output.dtype))
    expected_gradients = torch.autograd.grad(expected, exact, weight)
    assert output.dtype == inputs[0].dtype
    for value, correct in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        error = (value.double() - correct).norm() / correct.norm()
        assert error < BOUNDS[value.dtype]


@DTYPES
def test_the_norm_is_that_of_the_formula(dtype):
    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    inputs = [_normal(7, 1, 48, dtype=dtype), _normal(48, dtype=dtype, seed=1)]
    _check(lambda x, weight: rms_norm(x, weight, 1e-5), reference, inputs)


def test_the_module_norms_as_torch_does_also_what_is_not_fused():
    for settings in ({}, {"eps": 1e-6}, {"elementwise_affine": False}):
        norm = torch.nn.RMSNorm(24, **settings)
        x = torch.randn(5, 24)
        torch.testing.assert_close(layer_kernels._norm_forward(norm, x), norm(x))


@DTYPES
def test_rotation_turns_each_pair_by_its_angle(dtype):
    angles = torch.rand(6, 4, dtype=torch.float64) * 6
    cosine, sine = (
        function(angles).repeat(1, 2)[:, None, None].to(dtype)
        for function in (torch.cos, torch.sin)
    )

    def reference(t: Tensor) -> Tensor:
        pairs = torch.complex(t[..., :4], t[..., 4:])
        turned = pairs * torch.complex(cosine[..., :4].double(), sine[..., :4].double())
        return torch.cat((turned.real, turned.imag), -1)

    _check(lambda t: rotate(t, cosine, sine), reference, [_normal(6, 1, 3, 8, dtype=dtype)])


@pytest.mark.parametrize(
    "options", [{}, {"rotary_interleaved": True}, {"mscale": 1.3}, {"part": 6}], ids=str
)
def test_the_replacement_of_megatrons_rotation_does_the_same(options):
    options = dict(options)
    freqs = torch.rand(5, 1, 1, options.pop("part", 8)) * 6
    t = torch.randn(5, 1, 2, 8)
    original = rope_utils._apply_rotary_pos_emb_bshd
    replacement = layer_kernels._rotating_in_one_loop(original)
    for _ in range(2):  # the second time with the cosines of the first
        torch.testing.assert_close(replacement(t, freqs, **options), original(t, freqs, **options))


def test_cosines_live_as_long_as_their_angles():
    layer_kernels._cosines_and_sines.clear()
    angles = torch.rand(3, 1, 1, 8)
    first = layer_kernels.cosine_and_sine(angles, torch.float32)
    assert layer_kernels.cosine_and_sine(angles, torch.float32) is first
    assert layer_kernels.cosine_and_sine(angles, torch.bfloat16)[0].dtype == torch.bfloat16
    scaled = layer_kernels.cosine_and_sine(angles, torch.float32, 2.0)
    assert torch.equal(scaled[1], first[1] * 2)
    layer_kernels.use_cosine_and_sine(angles, *scaled)
    assert layer_kernels.cosine_and_sine(angles, torch.float32) == scaled
    del angles
    assert len(layer_kernels._cosines_and_sines) == 0


@DTYPES
def test_swiglu_and_its_gradient(dtype):
    x = _normal(9, 32, dtype=dtype)
    exact = x.detach().double().requires_grad_()
    expected = exact[:, :16] * exact[:, :16].sigmoid() * exact[:, 16:]
    by_output = _normal(9, 16, dtype=dtype, seed=2).detach()
    (expected_gradient,) = torch.autograd.grad(expected, exact, by_output.double())
    for value, correct in (
        (swiglu(x.detach()), expected),
        (swiglu_backward(by_output, x.detach()), expected_gradient),
    ):
        assert value.dtype == dtype
        assert (value.double() - correct).norm() / correct.norm() < BOUNDS[dtype]


@pytest.mark.multiprocess
def test_a_megatron_with_another_rotation_is_refused():
    program = """
        import torch
        if torch.cuda.is_available():
            torch.cuda.is_available = lambda: False
        from megatron.core.models.common.embeddings import rope_utils
        rope_utils._apply_rotary_pos_emb_bshd = lambda t, freqs, sideways=False: t
        from megatron_rmt.cpu import layer_kernels
        try:
            layer_kernels.install()
        except RuntimeError as error:
            print(error)
        """
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert "takes ('t', 'freqs', 'sideways'), not" in result.stdout
    assert "TORCHDYNAMO_DISABLE=1" in result.stdout
