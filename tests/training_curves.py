"""What whole runs have in common: layouts, and what makes two curves the same."""

from collections.abc import Callable, Sequence

import pytest

from tests.tiny_run import RMT, Line, Run

# Layouts add the same fp32 numbers in another order: 1e-7 relative at first, which Adam, dividing
# by the gradient's own size, and six steps enlarge (largest seen: 5e-7).
TOLERANCE = 1e-5
# Sums of numbers that no weight enters, once positions and tokens are the same.
COUNTED = (
    "chosen easy",
    "chosen medium",
    "chosen hard",
    "match rate",
    "well-formed rate",
    "closed by itself",
    "thought length",
    "length reward",
    "reward",
    "zero-variance groups",
    "truncated",
    "trunk tokens",
    "stem tokens",
    "branch tokens",
    "budget",
)
COMPUTED = ("entropy", "next-token accuracy", "entropy of chosen", "ntp loss", "grad norm")
PACKED = ["--rmt-max-tokens", "600"]
TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
CP2 = ["--context-parallel-size", "2"]
# Four layers: two chunks of one on each of two stages.
PP2_VP2 = [*PP2, "--num-virtual-stages-per-pipeline-rank", "2"]
SHARDED_OPTIMIZER = ["--use-distributed-optimizer"]
OVERLAP = ["--overlap-param-gather", "--overlap-grad-reduce"]

Start = Callable[..., Run]


def assert_same_curve(lines: Sequence[Line], expected: Sequence[Line]) -> None:
    """The same positions and rollouts in every step, the same losses and rewards."""
    assert len(lines) == len(expected) > 0
    for line, reference_line in zip(lines, expected, strict=True):
        step = f"step {line['iteration']}"
        assert line.keys() == reference_line.keys()
        assert line["iteration"] == reference_line["iteration"]
        assert line["rollout checksum"] == reference_line["rollout checksum"], step
        for names, tolerance in ((COUNTED, 1e-6), (COMPUTED, TOLERANCE)):
            for name in names:
                expected_value = reference_line[name]
                if expected_value is not None:
                    expected_value = pytest.approx(expected_value, rel=tolerance, abs=1e-7)
                assert line[name] == expected_value, (step, name)
        # With the ratio at 1 the policy loss is the mean advantage: 0 but for rounding.
        assert abs(line["rl loss"]) < 1e-6, step
        assert line["largest logprob difference"] < 1e-4, step


SHARDED = [*SHARDED_OPTIMIZER, *OVERLAP]


TIERED = [*RMT, "--exit-interval", "3", "--rmt-tier-budgets", "0.5", "1", "2"]
