"""Arguments of ``store_rotated`` that reach its edges, and how far what it did is from float64."""

from collections.abc import Callable

import torch
from torch import Tensor

# Of norms, rounding of the output included; Triton's interpreter cuts bf16 off and does not round.
BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 4e-4, torch.float32: 2e-7, torch.float64: 1e-7}


def problem(
    tokens: int, heads: int, kv_heads: int, dim: int, turned: int, copies: int, dtype: torch.dtype
) -> tuple:
    """Heads that lie apart in memory, as parts of one product, angles of up to 4,096, each token at
    some column of some tails, and tails that hold something already."""
    generator = torch.Generator().manual_seed(tokens + dim + copies)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    together = normal(tokens, kv_heads, heads // kv_heads + 2, dim + 1)[..., :dim]
    query = together[:, :, :-2].reshape(tokens, heads, dim)
    key, value = together[:, :, -2], together[:, :, -1]
    angles = 4096 * torch.rand(tokens, turned // 2, generator=generator, dtype=torch.float64)
    angles = angles.float().repeat(1, 2)
    capacity, count = 5, tokens * copies + 1
    tails = normal(count, kv_heads, capacity, dim), normal(count, kv_heads, capacity, dim)
    written = torch.randperm(count, generator=generator)[: tokens * copies]
    written = written.view(tokens, copies).t()
    columns = torch.randint(capacity, (tokens,), generator=generator)
    return query, key, value, (angles.cos(), angles.sin()), tails, written, columns


def rotated_exactly(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """``x`` ``[tokens, heads, dim]`` in float64: pairs as complex numbers, turned."""
    half = cosine.shape[-1] // 2
    turns = torch.complex(cosine.double(), sine.double())[:, None, :half]
    turned = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double()) * turns
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :].double()], -1)


def errors(store: Callable[..., Tensor], given: tuple) -> list[float]:
    """Of queries and of the whole tails after ``store``, whose rest must be as it was."""
    query, key, value, rotation, tails, written, columns = given
    expected = [of.double() for of in tails]
    news = rotated_exactly(key, *rotation), value.double()
    for stored, new in zip(expected, news, strict=True):
        for token, column in enumerate(columns.tolist()):
            for tail in written[:, token].tolist():
                stored[tail, :, column] = new[token]
    found = store(*given)
    assert found.dtype == query.dtype
    assert found.shape == query.shape
    pairs = zip((found, *tails), (rotated_exactly(query, *rotation), *expected), strict=True)
    return [float((own.double() - of).norm() / of.norm()) for own, of in pairs]
