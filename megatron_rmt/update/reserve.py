"""Which of the positions that were rolled out are trained, where a selection draws a reserve."""

from collections.abc import Sequence

from megatron_rmt.algorithm.curriculum import first_that_differ
from megatron_rmt.algorithm.rewards import Metric
from megatron_rmt.algorithm.schedules import Schedule
from megatron_rmt.update.tree import ReasonedSample


def keep_differing(reasoned: Sequence[ReasonedSample], schedule: Schedule) -> dict[str, Metric]:
    """Leave each sample the positions that are trained; the others bear the next-token loss again.

    Returns what is logged: the share of the kept positions that came from the reserve, and of those
    whose groups all earn the same. A pure function of the rewards.
    """
    count, kept = schedule.positions_per_sample, []
    for of in reasoned:
        in_order = sorted(of.positions, key=lambda position: position.place)
        places = first_that_differ([position.differs for position in in_order], count)
        of.positions = sorted((in_order[place] for place in places), key=lambda own: own.row)
        kept += of.positions
    sums = {
        "rmt replaced": sum(position.place >= count for position in kept),
        "rmt kept without variance": sum(not position.differs for position in kept),
    }
    # In the warm-up there is no reserve, and nothing is earned but by the length.
    total = 0.0 if schedule.warm_up else float(len(kept))
    return {name: (float(of) if total else 0.0, total) for name, of in sums.items()}
