"""What the recipes for H100 ask of the host and of memory, counted on the null device: two tables.

    python -m tests.null_cuda.count [--only decode memory] [--samples 4 16] [--layers N]
        [--modules local|engine|fp8|fp8-kept]

The first: a decode step of Qwen3-14B on one rank of its recipe, TP 4, with ``--samples`` of 8
positions and 8 rollouts each. Operations are launches, products, copies and fills, and collectives
of one token of all rows, drawing and writing included; "replayed" is what the step is once it is
recorded as a graph.

The second: the most bytes that torch's allocator has given out in the second step of each recipe,
and what tools/plan.py says, its reserve left out on both sides. ``--layers`` takes the first layers
of each pipeline stage only.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rmt.rollout.memory import GIB
from tests.null_cuda import device, recipes

OPERATIONS = (
    "launch",
    "gemm",
    "pageable copy to device",
    "pinned copy to device",
    "pageable copy to host",
    "pinned copy to host",
    "copy on device",
    "memset",
    "collective",
)
Report = Mapping[str, Any]
DECODED, TP = "qwen3-14b", 4
# Few tokens, as a step of decoding is the same for all of them, and keys and values of 1,024
# rollouts of the recipe's length would not fit.
SHORT = ("--rmt-initial-budget", "16", "--train-iters", "1")
DECODE_TITLES = (
    *("samples", "rows", "launches", "products", "copies", "collectives", "all", "waits"),
    "replayed",
)
MEMORY_TITLES = ("recipe", "phase", "planned GiB", "allocated", "reserved", "off")


def operations(events: Mapping[str, int]) -> int:
    """Calls that hand the device something to do, graphs apart."""
    return sum(events.get(name, 0) for name in OPERATIONS)


def is_replayed(events: Mapping[str, int]) -> bool:
    """Whether a decode step was one launch of a graph and nothing else."""
    return events == {"graph launch": 1}


def largest_step(phases: Mapping[str, Sequence[Report]]) -> Report:
    """The decode step of a report, not replayed, with the most operations."""
    return max(phases["decode"], key=lambda own: operations(own["events"]))


def rehearsed(
    folder: Path, recipe: str, given: Sequence[str], options: Sequence[str], root: Path
) -> Report:
    """The phases of a run of ``recipe`` on the device in ``folder``. options: of the rehearsal."""
    report = root / "report.json"
    words = ["--world-size", str(recipes.RANKS[recipe]), *options, "--report", str(report), "--"]
    words += recipes.run_flags(recipe, given, root)
    device.run(folder, "tests.null_cuda.rehearsal", words)
    return json.loads(report.read_text(encoding="utf-8"))["phases"]


def decode_row(phases: Report) -> list[Any]:
    """Samples, rows, launches, products, copies, collectives, all of them, waits, replayed."""
    step = largest_step(phases)
    events, total = step["events"], operations(step["events"])
    launches, products, told = (events.get(name, 0) for name in ("launch", "gemm", "collective"))
    copies = total - launches - products - told
    waits = max(own["events"].get("wait", 0) for own in (*phases["take tokens"], *phases["decode"]))
    replayed = "1 launch" if any(is_replayed(own["events"]) for own in phases["decode"]) else "none"
    known = step["known"]
    counted = [launches, products, copies, told, total, waits, replayed]
    return [known["samples"], known["rows"], *counted]


@dataclass(frozen=True)
class Peak:
    """GiB of one phase. allocated, reserved: by torch's allocator. planned: without the reserve."""

    allocated: float
    reserved: float
    planned: float

    @property
    def off(self) -> float:
        """How far the plan is above what was allocated, in parts of it."""
        return self.planned / self.allocated - 1


def peaks(
    folder: Path, recipe: str, given: Sequence[str], stage: int, at_bound: bool, root: Path
) -> dict[str, Peak]:
    """Of rollouts and update of a recipe's second step, on a rank of pipeline ``stage``, all
    responses as long as the planner takes them to be."""
    plan = recipes.planned(recipe, given, stage, at_bound)
    rank = recipes.RANKS[recipe] - 1 if stage else 0
    options = ["--rank", rank, "--shortest", plan.response, "--longest", plan.response]
    phases = rehearsed(folder, recipe, given, [*map(str, options)], root)
    memory = plan.memory
    planned = {"rollouts and trees": memory.rollout_peak, "update": memory.update_peak}
    return {
        name: Peak(
            phases[name][-1]["allocated"] / GIB,
            phases[name][-1]["reserved"] / GIB,
            (bytes_ - memory.reserve) / GIB,
        )
        for name, bytes_ in planned.items()
    }


def _table(*titles: str) -> Callable[..., None]:
    """Print a table's head; what prints its rows."""

    def row(*cells: Any) -> None:
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)

    row(*titles)
    row(*["---"] * len(titles))
    return row


def main() -> None:
    """Run what is asked for, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", choices=["decode", "memory"], nargs="+", default=["decode", "memory"])
    add("--samples", type=int, nargs="+", default=[4, 16], help="of the rank (default 4 16)")
    add("--layers", type=int, help="of a pipeline stage (default: all)")
    add(
        "--modules",
        choices=[*recipes.LAYERS],
        default="local",
        help="whose layers: Megatron's (default), Transformer Engine's, those in FP8",
    )
    add("--recipes", nargs="+", default=[*recipes.RANKS], help="of the second table")
    add("--at-bound", action="store_true", help="every thought as long as it may be")
    add("--attention", default="auto", help="of the update (default auto: flex)")
    add("--cache", type=Path, default=device.REPOSITORY / ".pytest_cache/d/null_cuda")
    given = parser.parse_args()
    if lacking := device.lacking() or (given.modules != "local" and device.engine_lacking()):
        parser.error(lacking)
    folder = device.build(given.cache)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        recipes.write_tokenizer(root / "tokenizer")
        flags = recipes.given_flags(
            root / "tokenizer",
            "--rmt-attention",
            given.attention,
            layers=recipes.LAYERS[given.modules],
        )

        def layers(stages: int) -> list[str]:
            return ["--num-layers", str(given.layers * stages)] if given.layers else []

        if "decode" in given.only:
            row = _table(*DECODE_TITLES)
            for samples in given.samples:
                batch = ["--global-batch-size", str(samples * recipes.RANKS[DECODED] // TP)]
                own = [*flags, *SHORT, *batch, *layers(1)]
                row(*decode_row(rehearsed(folder, DECODED, own, [], root)))
            print()
        if "memory" in given.only:
            row = _table(*MEMORY_TITLES)
            for recipe in given.recipes:
                stages = recipes.STAGES.get(recipe, 1)
                for stage in range(stages):
                    own = [*flags, *layers(stages)]
                    found = peaks(folder, recipe, own, stage, given.at_bound, root)
                    for phase, peak in found.items():
                        cells = (peak.planned, peak.allocated, peak.reserved)
                        name = f"{recipe}, stage {stage}" if stages > 1 else recipe
                        row(name, phase, *(f"{x:.2f}" for x in cells), f"{peak.off:+.1%}")


if __name__ == "__main__":
    main()
