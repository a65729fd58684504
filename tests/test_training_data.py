"""Whole runs on blends, counted in samples, and with a batch that grows."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.tiny_run import PRETRAIN, RMT, STEPS, Run, TinyInputs, run
from tests.training_curves import PACKED, PP2, PP2_VP2, TP2, Start, assert_same_curve

pytestmark = pytest.mark.multiprocess


def _by_samples(flags: Sequence[str], samples: int) -> list[str]:
    """``flags`` of a run of so many samples instead of so many steps."""
    at = flags.index("--train-iters")
    return [*flags[:at], "--train-samples", str(samples), *flags[at + 2 :]]


def test_a_run_counted_in_samples_is_the_one_counted_in_steps(
    inputs: TinyInputs, reference: Run, tmp_path: Path
):
    flags = _by_samples(inputs.flags(), STEPS * 4)
    lines = run(tmp_path / "logs", 1, [*flags, *RMT, "--exit-interval", "2"]).metrics
    assert lines == reference.metrics[:2]


GROWING = ["--train-samples", "16", "--step-batch-size-schedule", "0:2 256:4"]


def _growing(inputs: TinyInputs, resume_from: Path | None = None) -> list[str]:
    """Flags of a run of 2 + 2 + 4 + 4 + 4 samples."""
    flags = inputs.flags(resume_from)
    for name in ("--train-iters", "--global-batch-size"):
        at = flags.index(name)
        del flags[at : at + 2]
    return [*flags, *GROWING]


@pytest.mark.slow
def test_a_growing_batch_trains_alike_in_every_layout_and_resumes_bitwise(
    inputs: TinyInputs, tmp_path: Path
):
    save = tmp_path / "saved"
    alone = run(
        tmp_path / "alone",
        1,
        [*_growing(inputs), *RMT, "--save", str(save), "--save-interval", "3"],
    )
    assert [line["trunk tokens"] for line in alone.metrics] == [128, 128, 256, 256, 256]
    # Schedules go by steps: 6 * 0.2 ** (t / 5).
    assert [line["budget"] for line in alone.metrics] == [6, 4, 3, 2, 1]
    for name, flags in {"data": [], "pipeline": PP2}.items():
        found = run(tmp_path / name, 2, [*_growing(inputs), *RMT, *flags]).metrics
        assert_same_curve(found, alone.metrics)
    (save / "latest_checkpointed_iteration.txt").write_text("3")
    resumed = run(tmp_path / "resumed", 1, [*_growing(inputs, save), *RMT]).metrics
    assert resumed == alone.metrics[3:]


@pytest.fixture(scope="session")
def blend(inputs: TinyInputs) -> list[str]:
    """Flags of a blend of two corpora, of which one trains on next tokens alone."""
    web = inputs.data.with_name("web")
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{inputs.data}{suffix}", f"{web}{suffix}")
    words = ["--data-path", "0.6", str(inputs.data), "0.4", str(web)]
    return [*words, "--rmt-skip-sources", "web"]


@pytest.fixture(scope="session")
def blended(start: Start, blend: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    save = tmp_path_factory.mktemp("blended")
    return start(1, [*RMT, *blend, "--save", str(save), "--save-interval", "3"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(2, TP2), (2, PP2), (2, PP2_VP2), (2, []), (1, ["--micro-batch-size", "2"]), (2, PACKED)],
    ids=["tensor", "pipeline", "virtual", "data", "micro-batches of 2", "packed"],
)
def test_a_blend_with_a_skipped_corpus_trains_alike_in_every_layout(
    start: Start, blend: list[str], blended: Run, ranks: int, flags: list[str]
):
    assert_same_curve(start(ranks, [*RMT, *blend, *flags]).metrics, blended.metrics)


@pytest.mark.slow
def test_samples_of_a_skipped_corpus_are_neither_asked_nor_rolled_out(
    start: Start, blend: list[str], blended: Run
):
    skipped = [line["skipped samples"] for line in blended.metrics]
    assert sum(skipped) * 4 == pytest.approx(0.4 * STEPS * 4, abs=1)
    every = start(1, [*RMT, *blend[:-2]]).metrics
    for line, share, whole in zip(blended.metrics, skipped, every, strict=True):
        assert line["stem tokens"] == pytest.approx((1 - share) * whole["stem tokens"])
        assert line["trunk tokens"] == whole["trunk tokens"]
    # Nothing is trained before the first step: its text is the same.
    assert blended.metrics[0]["entropy"] == every[0]["entropy"]
    # An instruction stands before the samples that are asked, and before no other.
    boxed = ["--rmt-template", "rpt", "--max-position-embeddings", "2048"]
    asked, told = (start(1, [*RMT, *own, *boxed]).metrics for own in (blend, blend[:-2]))
    head = told[0]["trunk tokens"] / 4 - 64
    assert head > 20
    assert [line["trunk tokens"] for line in asked] == pytest.approx(
        [4 * 64 + 4 * (1 - share) * head for share in skipped]
    )


@pytest.mark.slow
def test_a_job_that_does_not_tell_the_corpora_is_refused(
    start: Start, blend: list[str], tmp_path: Path
):
    """As a data set of the job's own."""
    script = tmp_path / "silent.py"
    script.write_text(
        "import runpy\n"
        "from megatron.core.datasets.blended_dataset import BlendedDataset\n"
        "read = BlendedDataset.__getitem__\n"
        "def silent(self, index):\n"
        "    sample = dict(read(self, index))\n"
        "    del sample['dataset_id']\n"
        "    return sample\n"
        "BlendedDataset.__getitem__ = silent\n"
        f"runpy.run_path({str(PRETRAIN)!r}, run_name='__main__')\n"
    )
    sentence = r"SystemExit: RMT, iteration 1: --rmt-skip-sources is given, but the batches of the"
    with pytest.raises(AssertionError, match=sentence):
        start(2, [*RMT, *blend], program=script)
