"""Ranks that must come to one end: the same error, or the same sentence on what differs."""

import pytest
import torch

from megatron_rmt.rollout.generate import StoppedError
from megatron_rmt.update import agreement
from megatron_rmt.update.agreement import Copy, NotFiniteError, RanksDifferError, agree, digest
from tests.distributed import run_distributed

pytestmark = pytest.mark.faults

CPU = torch.device("cpu")


def _rank() -> int:
    return torch.distributed.get_rank()


@pytest.mark.usefixtures("single_process_megatron")
def test_one_rank_agrees_with_itself_unless_something_is_wrong():
    agree([Copy("a", 3, 0), Copy("b", torch.tensor(4), 0)], CPU)
    with pytest.raises(NotFiniteError, match="broken"):
        agree([], CPU, error=NotFiniteError("broken"), stop=True)
    with pytest.raises(StoppedError):
        agree([Copy("a", 3, 0)], CPU, stop=True)


def _end(case: str) -> str:
    rank = _rank()
    error, stop, copies = None, False, []
    if case == "error of rank 1":
        error = NotFiniteError("number of rank 1", 5) if rank == 1 else None
        copies = [Copy("a", rank, 0)]
    if case == "errors of all":
        error = RanksDifferError(f"of rank {rank}")
    if case == "stop of rank 2":
        stop, copies = rank == 2, [Copy("a", 7, 0)]
    if case == "copies of pairs":
        # Ranks 0 and 1, 2 and 3 share; the other copy is equal.
        parts = {"same": 1, "weight": rank}
        group = rank // 2 * 2
        value = torch.tensor(2**60 + group + (rank == 3))
        copies = [Copy("a", 7, 0), Copy("weights", value, group, lambda: parts)]
    try:
        agree(copies, CPU, error=error, stop=stop)
    except Exception as found:
        position = getattr(found, "position", None)
        return f"{type(found).__name__}: {found} {position}"
    return ""


@pytest.mark.multiprocess
def test_all_ranks_come_to_the_same_end():
    ends = {case: run_distributed(4, _end, case) for case in ("error of rank 1", "copies of pairs")}
    assert ends["error of rank 1"] == ["NotFiniteError: number of rank 1 5"] * 4
    (apart,) = set(ends["copies of pairs"])
    assert apart.startswith("RanksDifferError: ranks differ in weights (weight): 2 against 3; no ")
    assert run_distributed(3, _end, "errors of all") == ["RanksDifferError: of rank 0 None"] * 3
    assert run_distributed(3, _end, "stop of rank 2") == ["StoppedError:  None"] * 3
    assert run_distributed(3, _end, "nothing") == [""] * 3


def test_sides_are_those_of_the_first_group_that_differs():
    assert agreement._sides([0, 0, 0, 0], [5, 5, 5, 5]) == []
    assert agreement._sides([0, 1, 0, 1], [5, 6, 5, 6]) == []
    assert agreement._sides([0, 1, 0, 1, 0, 1], [5, 6, 5, 7, 5, 6]) == [[1, 5], [3]]
    assert agreement._sides([0, 0], [1, 2]) == [[0], [1]]


def test_a_digest_tells_values_apart_and_fits_a_whole_number_of_the_device():
    values = [(), (1,), ("1",), (1, 2), (2, 1), (12,), (b"1",), ([],)]
    found = {digest(*of) for of in values}
    assert len(found) == len(values)
    assert digest(1, [0.5, 2]) == digest(1, [0.5, 2])
    assert all(0 <= of < 2**63 for of in found)
