"""The loud end of a step whose log-probs differ from those of its rollouts."""

from argparse import Namespace

import pytest
import torch

from megatron_rmt.update.forward_step import Update
from megatron_rmt.update.logprob_check import check_log_probs, logprob_tolerance
from tests.distributed import run_distributed


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
