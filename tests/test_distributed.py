"""The harness itself: results in rank order, failures with their traceback, no hanging."""

import os
import time

import pytest
import torch

from tests.distributed import run_distributed, run_torchrun

pytestmark = pytest.mark.multiprocess


def _sum_of_ranks(offset: int) -> tuple[int, torch.Tensor]:
    rank = torch.distributed.get_rank()
    value = torch.tensor(rank + offset)
    torch.distributed.all_reduce(value)
    return rank, value


def _rank_one_raises() -> None:
    if torch.distributed.get_rank() == 1:
        raise KeyError("the one at fault")
    torch.distributed.barrier()


def _rank_one_dies() -> None:
    if torch.distributed.get_rank() == 1:
        os._exit(7)
    torch.distributed.barrier()


def _rank_zero_sleeps() -> None:
    if torch.distributed.get_rank() == 0:
        time.sleep(600)


def test_results_come_back_in_rank_order():
    results = run_distributed(2, _sum_of_ranks, 10)
    assert [rank for rank, _ in results] == [0, 1]
    assert [value.item() for _, value in results] == [21, 21]


def test_the_first_failing_rank_is_reported_and_the_others_are_killed():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 failed(.|\n)*_rank_one_raises") as caught:
        run_distributed(2, _rank_one_raises)
    assert isinstance(caught.value.__cause__, KeyError)
    assert time.monotonic() - start < 60


def test_a_rank_that_dies_without_a_word_does_not_hang():
    with pytest.raises(RuntimeError, match=r"1: 7|rank 0 of 2 failed"):
        run_distributed(2, _rank_one_dies)


def test_timeout_names_the_ranks_still_running():
    run_distributed(1, _sum_of_ranks, 0)  # the server that ranks are forked from is up now
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 2"):
        run_distributed(2, _rank_zero_sleeps, timeout=6)


def test_torchrun_returns_output_and_raises_with_its_tail(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import os, sys\n"
        "rank, ranks = os.environ['RANK'], os.environ['WORLD_SIZE']\n"
        # One write: where Python does not buffer, two ranks' prints end up in each other.
        "os.write(1, f'rank {rank} of {ranks} {sys.argv[1]}\\n'.encode())\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    output = run_torchrun(2, [script, "hello", "0"]).stdout
    assert "rank 0 of 2 hello" in output
    assert "rank 1 of 2 hello" in output
    with pytest.raises(AssertionError, match=r"exit code 1(.|\n)*rank . of 2 goodbye"):
        run_torchrun(2, [script, "goodbye", "3"])
