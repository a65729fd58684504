"""Vocabulary-parallel sampling."""

import math

import pytest
import torch
from torch import Tensor

from megatron_rmt.algorithm.rng import uniforms
from megatron_rmt.rollout import sampling
from megatron_rmt.rollout.sampling import greedy_tokens, sample_tokens
from tests.distributed import run_distributed

LARGEST = 1 - 2.0**-53  # the largest uniform number there is


def reference_cdf(logits: Tensor, temperature: float) -> Tensor:
    return torch.softmax(logits.double() / temperature, 1).cumsum(1)


def sample(logits: Tensor, numbers: Tensor, temperature: float = 1.0) -> Tensor:
    return sample_tokens(logits, numbers, temperature=temperature, vocab_start=0, tp_group=None)[0]


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 1000, 5000])
@pytest.mark.parametrize("temperature", [0.3, 0.8, 2.0])
def test_sampling_inverts_the_cumulative_distribution(vocabulary, temperature):
    generator = torch.Generator().manual_seed(vocabulary)
    # More rows than one chunk of the working buffer for the larger vocabularies.
    logits = torch.randn(400, vocabulary, generator=generator) * 4
    numbers = uniforms(0, 0, 0, 0, 0, torch.arange(400))
    tokens = sample(logits, numbers, temperature)
    cdf = torch.cat(
        [torch.zeros(400, 1, dtype=torch.float64), reference_cdf(logits, temperature)], 1
    )
    low = cdf.gather(1, tokens[:, None])[:, 0]
    high = cdf.gather(1, tokens[:, None] + 1)[:, 0]
    assert (low - 3e-6 <= numbers).all()
    assert (numbers <= high + 3e-6).all()
    expected = torch.searchsorted(cdf[:, 1:].contiguous(), numbers[:, None], right=True)[:, 0]
    assert (tokens == expected).double().mean() > 0.99


@pytest.mark.usefixtures("compiled")
def test_sums_of_weights_are_exact_over_any_split():
    logits = torch.randn(20, 3000, generator=torch.Generator().manual_seed(3)) * 6
    maxima = logits.amax(1)
    # Blocks that lie elsewhere than those that are summed.
    padded = torch.nn.functional.pad(logits, (100, 484), value=-torch.inf)
    blocks = padded.unflatten(1, (-1, 256)).unbind(1)
    weights = torch.cat([sampling._weigh(block, maxima, 0.8) for block in blocks], 1)
    weights = weights.double().tolist()
    exact = [sum(map(int, row)) for row in weights]  # weights are whole numbers
    assert exact == [math.fsum(row) for row in weights]
    for cut in (1, 255, 1000, 2999):
        parts = [
            sampling._block_sums(sampling._Scores(part, maxima, 0.8, None)).sum(1)
            for part in (logits[:, :cut], logits[:, cut:])
        ]
        assert (parts[0] + parts[1]).tolist() == exact


def test_sampled_frequencies_follow_the_softmax():
    draws = 100_000
    logits = torch.tensor([[1.0, -1.0, 0.5, float("-inf"), 3.0, 2.0]])
    numbers = uniforms(3, 0, 0, 0, 0, torch.arange(draws))
    counts = torch.bincount(sample(logits.expand(draws, -1), numbers, 0.8), minlength=6)
    expected = torch.softmax(logits[0].double() / 0.8, 0) * draws
    assert counts[3] == 0
    positive = expected > 0
    chi_square = ((counts - expected)[positive] ** 2 / expected[positive]).sum()
    assert chi_square < 18.5  # 4 degrees of freedom, p = 0.001


def test_zero_probability_is_never_chosen_at_either_end():
    logits = torch.full((2, 700), float("-inf"))
    logits[:, 300:303] = torch.tensor([0.0, 1.0, 0.0])
    assert sample(logits, torch.tensor([0.0, LARGEST], dtype=torch.float64)).tolist() == [300, 302]
    # Vanishing, though finite, probabilities round to zero.
    logits = torch.zeros(2, 700).index_fill_(1, torch.tensor([0, 699]), -1e4)
    assert sample(logits, torch.tensor([0.0, LARGEST], dtype=torch.float64)).tolist() == [1, 698]


def test_the_largest_uniform_number_does_not_fall_off_the_end():
    generator = torch.Generator().manual_seed(1)
    for vocabulary in (1, 3, 256, 300, 49152):
        logits = torch.randn(4, vocabulary, generator=generator)
        numbers = torch.full((4,), LARGEST, dtype=torch.float64)
        assert sample(logits, numbers).tolist() == [vocabulary - 1] * 4
        assert sample(logits, torch.zeros(4, dtype=torch.float64)).tolist() == [0] * 4


def test_rows_that_hold_nan_or_nothing_finite_give_an_id_in_range():
    logits = torch.zeros(3, 300)
    logits[0] = float("-inf")
    logits[1, 7] = float("nan")
    logits[2, 7] = float("inf")
    tokens = sample(logits, torch.full((3,), 0.5, dtype=torch.float64))
    assert ((tokens >= 0) & (tokens < 300)).all()


def test_sampling_leaves_the_logits_alone_and_adds_the_vocabulary_offset():
    logits = torch.randn(30, 500, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    numbers = uniforms(0, 0, 0, 0, 0, torch.arange(30))
    tokens = sample(logits, numbers)
    moved, _ = sample_tokens(logits, numbers, temperature=1.0, vocab_start=1000, tp_group=None)
    assert torch.equal(moved, tokens + 1000)
    greedy = greedy_tokens(logits, vocab_start=1000, tp_group=None)
    assert torch.equal(greedy, before.argmax(1) + 1000)
    assert torch.equal(logits, before)


def test_log_probs_are_those_of_the_whole_softmax():
    logits = torch.randn(40, 3000, generator=torch.Generator().manual_seed(4)) * 4
    numbers = uniforms(0, 0, 0, 0, 0, torch.arange(40))
    exact = (logits.double() / 0.7).log_softmax(1)
    for truncation in ({}, {"top_k": 3}, {"top_p": 0.5}):
        tokens, log_probs = sample_tokens(
            logits, numbers, temperature=0.7, vocab_start=0, tp_group=None, **truncation
        )
        expected = exact.gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=2e-5)


def reference_kept(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """bool [rows, vocab]: what ``top_k`` and ``top_p`` leave, by sorting."""
    kept = torch.ones_like(logits, dtype=torch.bool)
    if top_k is not None:
        kept &= logits >= logits.sort(1, descending=True).values[:, [top_k - 1]]
    if top_p is not None:
        probs = logits.double().masked_fill(~kept, -math.inf).softmax(1)
        falling = probs.sort(1, descending=True).values
        last = (falling.cumsum(1) < top_p).sum(1, keepdim=True).clamp(max=logits.shape[1] - 1)
        kept &= probs >= falling.gather(1, last)
    return kept


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, None), (7, None), (None, 0.3), (None, 0.95), (20, 0.6), (500, 1.0)]
)
def test_truncated_draws_follow_the_renormalised_softmax(top_k, top_p):
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(5)) * 2
    logits[1, [3, 400]] = 9.0  # a tie at the top
    kept = reference_kept(logits, top_k, top_p)
    draws = 20000
    numbers = uniforms(0, 0, 0, 0, torch.arange(3)[:, None], torch.arange(draws))
    for row in range(3):
        tokens, _ = sample_tokens(
            logits[row].expand(draws, -1),
            numbers[row],
            temperature=1.0,
            vocab_start=0,
            tp_group=None,
            top_k=top_k,
            top_p=top_p,
        )
        assert kept[row, tokens].all()
        expected = logits[row].double().masked_fill(~kept[row], -math.inf).softmax(0)
        frequency = torch.bincount(tokens, minlength=500) / draws
        assert (frequency - expected).abs().max() < 0.02
        likely = expected * draws > 20
        assert (frequency[likely] > 0).all()


def test_no_rows_give_no_tokens():
    empty = torch.empty(0, 10)
    assert sample(empty, torch.empty(0, dtype=torch.float64)).shape == (0,)
    assert greedy_tokens(empty, vocab_start=0, tp_group=None).shape == (0,)


def test_greedy_takes_the_lowest_id_among_ties():
    logits = torch.zeros(2, 600)
    logits[0, [599, 17, 300]] = 5.0
    assert greedy_tokens(logits, vocab_start=0, tp_group=None).tolist() == [17, 0]


def test_a_vocabulary_whose_weights_cannot_be_summed_exactly_is_refused():
    arguments = torch.zeros(2, 3), torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="the vocabulary has 524291 columns or more"):
        sample_tokens(*arguments, temperature=1.0, vocab_start=2**19, tp_group=None)


def parallel_logits() -> Tensor:
    logits = torch.randn(2000, 1000, generator=torch.Generator().manual_seed(2)) * 3
    logits[:5, :400] = float("-inf")  # all the mass lies on the later ranks
    logits[5:10, 300:] = float("-inf")  # and on the first
    logits[10, [100, 333, 900]] = 50.0  # ties across shards
    logits[11, [400, 999]] = 50.0
    return logits


def parallel_numbers() -> Tensor:
    numbers = uniforms(0, 0, 0, 0, 0, torch.arange(2000))
    numbers[0:10:2] = 0.0
    numbers[1:10:2] = LARGEST
    return numbers


TRUNCATION = {"top_k": 30, "top_p": 0.7}


def _sample_shard(bounds: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rank = torch.distributed.get_rank()
    start, stop = bounds[rank : rank + 2]
    shard = parallel_logits()[:, start:stop].contiguous()
    group = torch.distributed.group.WORLD
    tokens, _ = sample_tokens(
        shard, parallel_numbers(), temperature=0.8, vocab_start=start, tp_group=group
    )
    truncated, log_probs = sample_tokens(
        shard[:200],
        parallel_numbers()[:200],
        temperature=0.8,
        vocab_start=start,
        tp_group=group,
        **TRUNCATION,
    )
    return tokens, greedy_tokens(shard, vocab_start=start, tp_group=group), truncated, log_probs


@pytest.mark.multiprocess
@pytest.mark.parametrize("bounds", [[0, 500, 1000], [0, 333, 334, 1000]])
def test_tokens_do_not_depend_on_the_split_of_the_vocabulary(bounds):
    drawn = sample(parallel_logits(), parallel_numbers(), 0.8)
    greedy = parallel_logits().argmax(1)
    assert greedy[10:12].tolist() == [100, 400]
    truncated, log_probs = sample_tokens(
        parallel_logits()[:200],
        parallel_numbers()[:200],
        temperature=0.8,
        vocab_start=0,
        tp_group=None,
        **TRUNCATION,
    )
    assert not torch.equal(truncated, drawn[:200])
    for result in run_distributed(len(bounds) - 1, _sample_shard, bounds):
        assert torch.equal(result[0], drawn)
        assert torch.equal(result[1], greedy)
        assert torch.equal(result[2], truncated)
        assert torch.equal(result[3], log_probs)
