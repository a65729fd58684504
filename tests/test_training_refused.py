"""Whole runs that end with one sentence."""

from pathlib import Path

import pytest

from tests.distributed import REPOSITORY, run_torchrun
from tests.tiny_run import PRETRAIN, RMT, TinyInputs
from tests.training_curves import TP2, Start

pytestmark = pytest.mark.multiprocess


@pytest.mark.faults
def test_a_difference_above_the_tolerance_ends_every_rank_before_the_step(
    start: Start, tmp_path: Path
):
    flags = ["--rmt-logprob-tolerance", "1e-12", "--save", str(tmp_path), "--save-interval", "1"]
    sentence = (
        r"SystemExit: RMT, iteration 1: log-probs .* more than --rmt-logprob-tolerance 1e-12;"
    )
    with pytest.raises(AssertionError, match=sentence):
        start(2, [*RMT, *flags])
    assert not (tmp_path / "latest_checkpointed_iteration.txt").exists()


@pytest.mark.parametrize(
    ("flags", "sentences"),
    [
        (
            ["--rmt-group-size", "1", "--attention-dropout", "0.1"],
            [
                "--rmt-group-size is 1; pass a number in [2, inf): an advantage needs 2 or more",
                "--attention-dropout is 0.1; RMT needs 0.0: generation and update must agree.",
            ],
        ),
        (
            ["--rmt-initial-budget", "600"],
            ["--max-position-embeddings is 1024 but", "lower --rmt-initial-budget"],
        ),
    ],
    ids=["group and dropout", "budget"],
)
def test_bad_settings_end_the_job_with_one_clear_sentence(
    inputs: TinyInputs, flags: list[str], sentences: list[str]
):
    # Unbuffered, so that what comes last in the output was also printed last.
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONUNBUFFERED": "1"}
    with pytest.raises(AssertionError) as failure:
        run_torchrun(2, [PRETRAIN, *inputs.flags(), *RMT, *TP2, *flags], environment, timeout=240)
    output = str(failure.value)
    assert "exit code 1" in output
    for sentence in sentences:
        assert sentence in output


def test_a_rotary_factor_reaches_the_model_or_the_run_ends(start: Start, tmp_path: Path):
    """It does in examples/pretrain_rmt.py, and not where Megatron alone reads the flags."""
    llama32 = [*RMT, "--use-rope-scaling", "--rope-scaling-factor", "32", "--train-iters", "1"]
    assert len(start(1, llama32).metrics) == 1
    program = PRETRAIN.read_text(encoding="utf-8")
    line = "    config.rope_scaling_factor = args.rope_scaling_factor\n"
    assert program.count(line) == 1
    (tmp_path / "pretrain.py").write_text(program.replace(line, ""), encoding="utf-8")
    sentence = "--rope-scaling-factor 32 did not reach the model"
    with pytest.raises(AssertionError, match=sentence) as failure:
        start(1, llama32, program=tmp_path / "pretrain.py")
    assert "ValueError" not in str(failure.value), "the sentence, without a traceback"


EXISTING_JOB = REPOSITORY / "examples/existing_job/pretrain.py"
PREFIX_MASK = "torch.ones(64, 64).triu(1).bool()[None, None] & (torch.arange(64) > 9)"
WRAPPED = """
class Outer(torch.nn.Module):
    def __init__(self, **named):
        super().__init__()
        self.inner, self.config = GPTModel(**named), named["config"]
        self.pg_collection = self.inner.pg_collection

    def set_input_tensor(self, tensor):
        self.inner.set_input_tensor(tensor)


def model_provider("""
# How a job of one's own differs from examples/existing_job, and what is said of it.
JOBS = {
    "no labels": (
        {"        labels=labels,\n": ""},
        "RMT, iteration 1: forward_step_func gives GPTModel.forward no labels; pass labels= on",
    ),
    "prefix mask": (
        {"attention_mask=None": f"attention_mask={PREFIX_MASK}"},
        "RMT, iteration 1: forward_step_func gives GPTModel.forward an attention_mask that is not",
    ),
    "model in a model": (
        {"def model_provider(": WRAPPED, "    return GPTModel(": "    return Outer("},
        "RMT: the model is a Outer; RMT trains a GPTModel.",
    ),
}


@pytest.mark.parametrize("job", JOBS)
def test_a_job_that_trees_cannot_carry_ends_with_one_sentence(
    start: Start, tmp_path: Path, job: str
):
    changes, sentence = JOBS[job]
    program = EXISTING_JOB.read_text(encoding="utf-8")
    for old, new in changes.items():
        assert program.count(old) == 1
        program = program.replace(old, new)
    program = f"import megatron_rmt\n\nmegatron_rmt.patch()\n{program}"
    (tmp_path / "pretrain.py").write_text(program, encoding="utf-8")
    with pytest.raises(AssertionError) as failure:
        start(1, RMT, program=tmp_path / "pretrain.py")
    said = str(failure.value)
    assert f"SystemExit: {sentence}" in said
    assert "ValueError" not in said
    assert "BatchError" not in said
    # A model of another kind is not even loaded.
    assert ("loaded checkpoint from" in said) == (job != "model in a model")
