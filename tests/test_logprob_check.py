"""The loud end of a step whose log-probs differ from those of its rollouts."""

from argparse import Namespace

import pytest
import torch

from megatron_rmt.update.agreement import NotFiniteError
from megatron_rmt.update.forward_step import Update
from megatron_rmt.update.logprob_check import check_log_probs, logprob_tolerance
from megatron_rmt.update.tree import grow_tree
from tests.distributed import run_distributed
from tests.tiny_step import scored

pytestmark = pytest.mark.faults


class _Tree:
    tokens = torch.zeros(3)


def _update(total: float, tokens: float) -> Update:
    update = Update(_Tree(), None, {})
    update.difference = torch.tensor([total, tokens])
    return update


def test_the_default_follows_the_precision():
    args = Namespace(rmt_logprob_tolerance=None, params_dtype=torch.float32)
    assert logprob_tolerance(args) == 1e-3
    args.params_dtype = torch.bfloat16
    assert logprob_tolerance(args) == 0.2
    args.rmt_logprob_tolerance = 0.05
    assert logprob_tolerance(args) == 0.05


@pytest.mark.usefixtures("single_process_megatron")
def test_the_mean_over_all_micro_batches_counts():
    check_log_probs([_update(3.0, 10.0), _update(0.0, 20.0)], tolerance=0.11)
    check_log_probs([_update(0.0, 0.0)], tolerance=0.1)
    expected = r"by 0\.1 nats on average, more than .* 0\.09;"
    with pytest.raises(RuntimeError, match=expected) as error:
        check_log_probs([_update(3.0, 10.0), _update(0.0, 20.0)], tolerance=0.09)
    for look_at in ("dropout", "position ids", "quantized", "optimizer's step was not taken"):
        assert look_at in str(error.value)


@pytest.mark.usefixtures("single_process_megatron")
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_refused_at_any_tolerance(broken):
    with pytest.raises(RuntimeError, match="weights are not finite"):
        check_log_probs([_update(0.0, 5.0), _update(broken, 5.0)], tolerance=1e9)


@pytest.mark.usefixtures("single_process_megatron")
def test_where_nothing_was_drawn_there_is_nothing_to_compare_but_numbers_must_be_finite():
    update = _update(0.0, 0.0)
    update.output = torch.tensor([1.0, -2.0])
    check_log_probs([update], tolerance=1e-9)
    update.output = torch.tensor([torch.nan, -2.0])
    with pytest.raises(NotFiniteError, match="the loss is not finite, though all log-probs are"):
        check_log_probs([update], tolerance=torch.inf)


@pytest.mark.usefixtures("single_process_megatron")
@pytest.mark.parametrize(("prediction", "kind"), [(5, "sample 7"), (-1, "a response to sample 7")])
def test_a_log_prob_that_is_not_finite_is_named_with_its_sample(prediction, kind):
    of = scored()
    tree = grow_tree(of.reasoned, longest_position=200, device=torch.device("cpu"))
    update = Update(tree, None, {}, reasoned=of.reasoned)
    update.output = torch.zeros(1 + len(tree.targets))
    check_log_probs([update], tolerance=0.0)
    update.output[1:][prediction] = -torch.inf
    sentence = rf"the log-prob of {kind}, document \d in it, token \d+ is not finite in the update"
    with pytest.raises(NotFiniteError, match=sentence):
        check_log_probs([update], tolerance=torch.inf)


@pytest.mark.usefixtures("single_process_megatron")
@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (torch.nan, "the gradient of b is not finite, though all log-probs are"),
        (1e30, "the norm of the gradients is not finite, though all log-probs and gradients are"),
    ],
)
def test_a_gradient_that_is_not_finite_is_named_by_its_parameter(value, sentence):
    gradients = {"a": torch.ones(3), "b": torch.ones(2)}
    check_log_probs([_update(1.0, 10.0)], 0.2, gradients)
    gradients["b"][1] = value
    with pytest.raises(NotFiniteError, match=sentence):
        check_log_probs([_update(1.0, 10.0)], 0.2, gradients)


def _message_of_rank(differences: list[float]) -> str:
    try:
        check_log_probs([_update(differences[torch.distributed.get_rank()], 10.0)], 0.1)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.multiprocess
def test_all_ranks_raise_or_none():
    first, second = run_distributed(2, _message_of_rank, [0.0, 2.4])
    assert "by 0.12 nats" in first == second
    assert run_distributed(2, _message_of_rank, [0.0, 1.6]) == ["", ""]
