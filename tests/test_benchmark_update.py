"""The baselines of ``benchmark.py update`` compute what the tree computes."""

import importlib
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.distributed import REPOSITORY, run_distributed

pytestmark = pytest.mark.multiprocess

MOST = 40


def _benchmark() -> ModuleType:
    sys.path.insert(0, str(REPOSITORY / "tools"))
    return importlib.import_module("benchmarks.update")


def _gradients_of_all_layouts() -> dict[str, tuple[Tensor, dict[str, Tensor], list[int]]]:
    """Loss, gradients and sizes of the micro-batches of each layout, float64."""
    benchmark = _benchmark()
    problem = benchmark.make_problem(24, 4, 3, 7, 2, vocab_size=128)
    model = benchmark.build_model(1, problem.vocab_size, torch.float64, 64)
    trunk = benchmark.trunk_layouts(problem)
    layouts = {
        "tree": benchmark.tree_layouts(problem),
        "shared": trunk + benchmark.shared_layouts(problem, range(4), MOST),
        "packed": trunk + benchmark.packed_layouts(problem, range(12), MOST),
        "padded": trunk + benchmark.padded_layouts(problem, range(12), MOST),
    }
    results = {}
    for name, own in layouts.items():
        model.zero_grad()
        updates = [layout.update("auto", torch.device("cpu")) for layout in own]
        loss = benchmark.run_update(model, problem, updates)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        results[name] = loss, gradients, [layout.size for layout in own]
    return results


def test_all_layouts_give_one_loss_and_one_gradient():
    (results,) = run_distributed(1, _gradients_of_all_layouts)
    loss, gradients, sizes = results.pop("tree")
    assert sizes == [24 + 4 * (2 + 3 * 4)]
    for name, (other_loss, other_gradients, sizes) in results.items():
        assert len(sizes) > 3, name
        assert max(sizes) <= MOST, name
        torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=0)
        for parameter, expected in gradients.items():
            error = (other_gradients[parameter] - expected).norm() / expected.norm()
            assert error < 1e-6, (name, parameter)


def test_flops_count_tokens_pairs_and_predictions():
    benchmark = _benchmark()
    problem = benchmark.make_problem(8, 2, 2, 5, 2, vocab_size=64)
    (tree,) = benchmark.tree_layouts(problem)
    # 8 rows of the document, chosen rows 1 and 5; stems of 2, branches of 2 rows, 3 tokens each.
    tokens, predictions = 8 + 2 * (2 + 2 * 2), (8 - 3) + 2 * 2 * 3
    pairs = 36 + (2 + 6) * 6 + 2 * (3 + 2 * (2 * 2 + 3))
    linear = 576 * (9 + 3 + 3 + 9) * 64 + 3 * 576 * 1536
    expected = 2 * (6 * linear * tokens + 14 * 576 * pairs) + 6 * 576 * 64 * predictions
    assert benchmark.flops([tree], layers=2) == expected


@pytest.mark.parametrize("one_in", [1, 3, 8, 100])
def test_a_subset_is_spread_evenly(one_in):
    chosen = _benchmark().evenly(24, one_in)
    assert chosen == {1: [*range(24)], 3: [1, 4, 7, 10, 13, 16, 19, 22], 8: [4, 12, 20]}.get(
        one_in, [12]
    )
