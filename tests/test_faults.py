"""Faults put into whole runs: each ends in one sentence, on all ranks, and costs no checkpoint."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_run import PRETRAIN, RMT, Run, TinyInputs, checkpoint_tensors, run

pytestmark = [pytest.mark.faults, pytest.mark.multiprocess]

TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
FP16 = ["--fp16", "--initial-loss-scale", "1024", "--hysteresis", "1"]
SAVING = ["--save-interval", "2", "--exit-interval", "4"]

# The example, with a fault in step ``STEP`` (1 for the first), whose lines see the model, its
# parameters by name, the rank and ``after`` (a list of what is called after the step).
PROGRAM = """
import os, runpy

os.environ["WANDB_MODE"] = "offline"
if __name__ == "__main__":
    import megatron_rmt

    megatron_rmt.patch()
    import torch
    from megatron_rmt.job import patches

    run_step = patches.run_step

    @torch.no_grad()
    def put_in(model, parameters, rank, after):
{fault}

    def step(original, call, run):
        after = []
        if call["iteration"] + 1 {when}:
            model = run.policy.model
            put_in(model, dict(model.named_parameters()), torch.distributed.get_rank(), after)
        result = run_step(original, call, run)
        for undo in after:
            undo()
        return result

    patches.run_step = step
    runpy.run_path({pretrain!r}, run_name="__main__")
"""

FIRST = "decoder.layers.0.mlp.linear_fc1.weight"

# One of each kind, for every run of the suite; the others with -m faults or -m slow.
QUICK = {
    "NaN in a weight of one data-parallel rank",
    "NaN in a gradient",
    "norm of a tensor-parallel rank",
    "split weight of a data-parallel rank",
    "rewards of a pipeline stage",
    "TP2",
}

Start = Callable[..., Run]


def cases(of: Mapping[str, Any]) -> list[Any]:
    """``of`` as parameters of a test: those that are not ``QUICK`` marked slow."""
    return [
        pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, case in of.items()
    ]


@pytest.fixture
def start(inputs: TinyInputs, tmp_path: Path) -> Start:
    """``start(ranks, flags, fault, when)``: a run with the fault, that saves to ``saved``."""

    def start_run(ranks: int, flags: list[str], fault: str, when: str = "== 3") -> Run:
        program = tmp_path / "program.py"
        indented = "\n".join(f"        {line}" for line in fault.splitlines())
        program.write_text(PROGRAM.format(fault=indented, when=when, pretrain=str(PRETRAIN)))
        own = [*inputs.flags(), *RMT, *SAVING, "--save", str(tmp_path / "saved"), *flags]
        return run(tmp_path / "logs", ranks, own, program)

    return start_run


def assert_ended(start: Start, folder: Path, held: int, sentence: str, *run_of: object) -> None:
    """The run ends with the sentence on every rank, and the checkpoint before it is whole."""
    with pytest.raises(AssertionError, match=sentence) as failure:
        start(*run_of)
    assert "SystemExit: RMT" in str(failure.value), "one sentence"
    assert (folder / "saved/latest_checkpointed_iteration.txt").read_text() == str(held)
    assert not [path for path in (folder / "saved").glob("iter_*") if int(path.name[5:]) > held]
    tensors = checkpoint_tensors(folder / "saved", held)
    assert all(own.isfinite().all() for own in tensors.values() if own.is_floating_point())


NOT_FINITE = {
    "NaN in a weight": (
        1,
        [],
        f"parameters[{FIRST!r}].view(-1)[3] = torch.nan",
        r"iteration 3: \d+ entropies are not finite, the first of sample 8, document 0 in it, ",
    ),
    "NaN in a weight of one data-parallel rank": (
        2,
        [],
        f"if rank == 1:\n    parameters[{FIRST!r}].view(-1)[3] = torch.nan",
        r"iteration 3: \d+ entropies are not finite, the first of sample 9, document 0 in it, ",
    ),
    "infinite row of the embedding": (
        2,
        PP2,
        "if rank == 0:\n    parameters['embedding.word_embeddings.weight'][:] = torch.inf",
        r"iteration 3: \d+ entropies are not finite, the first of sample 8, document 0 in it, ",
    ),
    "NaN in a weight, in fp16": (
        1,
        FP16,
        f"parameters[{FIRST!r}].view(-1)[3] = torch.nan",
        r"iteration 3: \d+ entropies are not finite, the first of sample 8, document 0 in it, ",
    ),
    "NaN in a gradient": (
        2,
        ["--no-check-for-nan-in-loss-and-grad"],
        f"parameter = parameters[{FIRST!r}]\n"
        "hook = parameter.register_hook(lambda of: of * torch.nan if rank == 1 else of)\n"
        "after.append(hook.remove)",
        rf"iteration 3: the gradient of {FIRST} is not finite, though all log-probs are",
    ),
    "NaN in a gradient, where Megatron looks at it too": (
        2,
        ["--rerun-mode", "disabled"],
        f"parameter = parameters[{FIRST!r}]\n"
        "parameter.register_hook(lambda of: of * torch.nan if rank == 1 else of)",
        rf"iteration 3: the gradient of {FIRST} is not finite, though all log-probs are",
    ),
}


@pytest.mark.parametrize("case", cases(NOT_FINITE))
def test_a_number_that_is_not_finite_ends_the_run_before_the_step(start, tmp_path, case):
    ranks, flags, fault, sentence = case
    assert_ended(start, tmp_path, 2, sentence, ranks, flags, fault)


@pytest.mark.slow
def test_an_infinite_gradient_of_fp16_is_skipped_by_megatron_with_a_lower_scale(
    start: Start, tmp_path: Path
):
    fault = "after.append(parameters[{!r}].register_hook(lambda of: of * torch.inf).remove)"
    ended = start(1, FP16, fault.format(FIRST))
    assert [line["iteration"] for line in ended.metrics] == [1, 2, 3, 4]
    assert not any("skipped" in line for line in ended.metrics)
    printed = (tmp_path / "saved/megatron.log").read_text()
    assert re.findall(r"loss scale: (\S+) \| grad norm: \S+", printed) == [
        "1024.0",
        "1024.0",
        "512.0",
    ]
    assert re.findall(r"skipped iterations: +(\d)", printed) == ["0", "0", "1", "0"]


def test_weights_that_are_not_finite_are_not_saved(start: Start, tmp_path: Path):
    """Whatever Megatron checks: here they break after the last look at them."""
    fault = f"after.append(lambda: parameters[{FIRST!r}].detach().view(-1)[:1].fill_(torch.inf))"
    sentence = f"the checkpoint of iteration 4 is not written: {FIRST} of rank 0 holds"
    assert_ended(start, tmp_path, 2, sentence, 2, TP2, fault, "== 4")


def test_a_checkpoint_that_cannot_be_written_ends_all_ranks_and_the_last_one_stays(
    start: Start, tmp_path: Path
):
    """No file may become as large as theirs; a full disk ends alike."""
    fault = "import resource\n"
    fault += "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, resource.RLIM_INFINITY))"
    sentence = (
        r"checkpoint .*iter_0000004 is not written \(rank \d: .*; \S+ MB are free there\); make"
    )
    with pytest.raises(AssertionError, match=sentence) as failure:
        start(2, TP2, fault, "== 4")
    assert "SystemExit: RMT: the checkpoint" in str(failure.value)
    assert (tmp_path / "saved/latest_checkpointed_iteration.txt").read_text() == "2"
    assert checkpoint_tensors(tmp_path / "saved", 2)


HOOK = (
    f"parameter = parameters[{FIRST!r}]\n"
    "hook = parameter.register_hook(lambda of: of * torch.nan if rank == 1 else of)\n"
    "after.append(hook.remove)"
)


def test_a_bad_step_is_skipped_and_its_samples_are_put_aside(start: Start, tmp_path: Path):
    ended = start(2, ["--rmt-max-bad-steps", "2"], HOOK)
    assert [line["iteration"] for line in ended.metrics] == [1, 2, 3, 4]
    assert ended.metrics[2] == {"iteration": 3, "skipped": 1, "skipped in a row": 1}
    assert ended.metrics[3]["grad norm"] > 0
    assert "iteration 3: the gradient of" in ended.log
    lines = (tmp_path / "logs/rmt_quarantine.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["iteration"], row["sample"]) for row in rows] == [(3, s) for s in range(8, 12)]
    assert all("gradient" in row["not finite"] and row["text"] for row in rows)
    before, after = (checkpoint_tensors(tmp_path / "saved", step) for step in (2, 4))
    assert all(own.isfinite().all() for own in after.values() if own.is_floating_point())
    weight = "decoder.layers.mlp.linear_fc1.weight"
    assert not torch.equal(before[weight], after[weight])


@pytest.mark.slow
def test_bad_steps_with_a_good_one_between_are_not_in_a_row(start: Start):
    ended = start(1, ["--rmt-max-bad-steps", "2"], HOOK.replace("rank == 1", "True"), "in (1, 3)")
    assert [line["iteration"] for line in ended.metrics] == [1, 2, 3, 4]
    assert [line.get("skipped in a row") for line in ended.metrics] == [1, None, 1, None]


@pytest.mark.slow
def test_as_many_bad_steps_in_a_row_as_are_allowed_end_the_run(start: Start, tmp_path: Path):
    sentence = r"iteration 4: the gradient .* bad step 2 of --rmt-max-bad-steps 2 in a row"
    assert_ended(start, tmp_path, 2, sentence, 2, ["--rmt-max-bad-steps", "2"], HOOK, ">= 3")
    lines = (tmp_path / "logs/rmt_quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["sample"] for line in lines] == list(range(8, 16))


APART = {
    "norm of a tensor-parallel rank": (
        2,
        TP2,
        "if rank == 1:\n    parameters['decoder.final_layernorm.weight'].mul_(1.01)",
        r"tensor-parallel ranks hold alike \(decoder\.final_layernorm\.weight\): 0 against 1;",
    ),
    "split weight of a data-parallel rank": (
        4,
        TP2,
        f"if rank == 3:\n    parameters[{FIRST!r}].view(-1)[7] *= 1.01",
        rf"data-parallel ranks hold alike \({FIRST}\): 1 against 3;",
    ),
    "norm of a data-parallel rank, sharded optimizer": (
        2,
        ["--use-distributed-optimizer", "--no-save-optim"],
        "if rank == 1:\n    parameters['decoder.final_layernorm.weight'].mul_(1.01)",
        r"data-parallel ranks hold alike \(decoder\.final_layernorm\.weight\): 0 against 1;",
    ),
    "tied embedding of the last pipeline stage": (
        2,
        PP2,
        "if rank == 1:\n    model.shared_embedding_or_output_weight().mul_(1.01)",
        r"the embedding of two pipeline stages \(the tied embedding\): 0 against 1;",
    ),
    "tied embedding of the last of virtual stages": (
        2,
        [*PP2, "--num-virtual-stages-per-pipeline-rank", "2"],
        "if rank == 1:\n    model[-1].shared_embedding_or_output_weight().mul_(1.01)",
        r"the embedding of two pipeline stages \(the tied embedding\): 0 against 1;",
    ),
    "norm of a data-parallel rank, virtual stages": (
        4,
        [*PP2, "--num-virtual-stages-per-pipeline-rank", "2"],
        "if rank == 3:\n    parameters['1.decoder.final_layernorm.weight'].mul_(1.01)",
        r"data-parallel ranks hold alike \(1\.decoder\.final_layernorm\.weight\): 2 against 3;",
    ),
    "draws of a tensor-parallel rank": (
        2,
        TP2,
        "import dataclasses\n"
        "from megatron_rmt import step\n"
        "generate = step.generate\n"
        "def with_another_seed(policy, prompt, store, positions, how, *rest):\n"
        "    how = dataclasses.replace(how, seed=how.seed + rank)\n"
        "    return generate(policy, prompt, store, positions, how, *rest)\n"
        "step.generate = with_another_seed",
        r"tensor-parallel ranks 0, 1 draw different tokens at sample 8, document 0 in it, ",
    ),
    "rewards of a pipeline stage": (
        2,
        PP2,
        "from megatron_rmt import step\n"
        "score = step.score\n"
        "def unlike(positions, *rest, **named):\n"
        "    score(positions, *rest, **named)\n"
        "    positions[0].rewards[0] += rank\n"
        "step.score = unlike",
        r"ranks differ in rewards, over tensor and pipeline parallel: 0 against 1;",
    ),
    "seed of the choice": (
        2,
        TP2,
        "from megatron_rmt import step\n"
        "import dataclasses\n"
        "choose = step.choose\n"
        "step.choose = lambda run, *rest: choose(\n"
        "    dataclasses.replace(run, seed=run.seed + rank), *rest)",
        r"ranks differ in chosen positions, over tensor and pipeline parallel: 0 against 1;",
    ),
}


@pytest.mark.parametrize("case", cases(APART))
def test_ranks_that_have_come_apart_end_the_run_in_that_step(start, tmp_path, case):
    ranks, flags, fault, sentence = case
    assert_ended(start, tmp_path, 2, f"iteration 3: .*{sentence}", ranks, flags, fault)


LOGS = """
import os
from pathlib import Path
from megatron.training import global_vars, get_args
def gone(*args, **kwargs):
    raise OSError(28, "No space left on device")
metrics = Path(get_args().rmt_metrics_file)
kept = metrics.rename(metrics.with_name("kept"))
metrics.mkdir()
after.append(lambda: (metrics.rmdir(), kept.rename(metrics)))
global_vars._GLOBAL_WANDB_WRITER._writer.log = gone
writer = global_vars._GLOBAL_TENSORBOARD_WRITER._writer
writer.file_writer.event_writer._async_writer._writer.write = gone
"""


def test_logs_that_cannot_be_written_do_not_end_the_run(start: Start, tmp_path: Path):
    flags = ["--wandb-project", "rmt", "--wandb-exp-name", "tiny", "--wandb-save-dir", "w"]
    flags[-1] = str(tmp_path / "wandb")
    flags += ["--tensorboard-dir", str(tmp_path / "board"), "--rmt-log-samples-interval", "1"]
    ended = start(1, flags, LOGS)
    assert [line["iteration"] for line in ended.metrics] == [1, 2, 4]
    for what in (tmp_path / "logs/metrics.jsonl", "wandb", "TensorBoard"):
        assert ended.log.count(f"RMT: {what} cannot be written (") == 1
    rows = (tmp_path / "logs/rmt_samples.jsonl").read_text().splitlines()
    assert {json.loads(row)["iteration"] for row in rows} == {1, 2, 3, 4}


def test_a_folder_that_cannot_be_written_is_refused_before_the_model(start: Start, tmp_path: Path):
    (tmp_path / "saved").write_text("a file")
    sentence = r"RMT cannot .*: --save is .*saved, which cannot be written to \(File exists\); pass"
    with pytest.raises(AssertionError, match=sentence) as failure:
        start(1, [], "pass")
    assert "building GPT model" not in str(failure.value)


# The signal comes with the second token, and each of the many that would follow takes a while.
STOP = """
import os, signal, time
from megatron_rmt.rollout.live_rollouts import LiveRollouts
write, tokens = LiveRollouts.write, []
def slowly(self, *drawn):
    tokens.append(1)
    if len(tokens) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    assert len(tokens) < 30, "generation goes on"
    time.sleep(0.05)
    write(self, *drawn)
LiveRollouts.write = slowly
after.append(lambda: setattr(LiveRollouts, "write", write))
"""
LONG = ["--rmt-initial-budget", "40", "--rmt-rollout-kv-gib", "8e-4", "--save-interval", "100"]
TOLD = "RMT: told to stop in step 3, which is left to the run that resumes."


AVERAGE = ["--rmt-reward", "information-gain", "--rmt-baseline-decay", "0.5"]


@pytest.mark.parametrize("options", [[], pytest.param(AVERAGE, marks=pytest.mark.slow)])
def test_a_signal_in_a_long_rollout_saves_the_step_before_and_the_rest_is_as_ever(
    start: Start, inputs: TinyInputs, tmp_path: Path, options: list[str]
):
    stopped = start(1, [*LONG, *options, "--exit-signal-handler"], STOP)
    assert [line["iteration"] for line in stopped.metrics] == [1, 2]
    assert TOLD in stopped.log
    assert (tmp_path / "saved/latest_checkpointed_iteration.txt").read_text() == "2"
    flags = [*RMT, *LONG, *options, "--exit-interval", "3"]
    resumed = run(tmp_path / "on", 1, [*inputs.flags(tmp_path / "saved"), *flags])
    whole = run(tmp_path / "whole", 1, [*inputs.flags(), *flags])
    assert [*stopped.metrics, *resumed.metrics] == whole.metrics


TOLD_BY = {"TP2": (TP2, STOP), "PP2": (PP2, STOP), "DP2": ([], STOP)}
TOLD_BY["Ctrl-C, TP2"] = TP2, STOP.replace("SIGTERM", "SIGINT")
# Twice: the second one changes nothing.
TOLD_BY["twice, DP2"] = [], STOP.replace("== 2:", "in (2, 3):")


@pytest.mark.parametrize("told", cases(TOLD_BY))
def test_ranks_cut_a_long_rollout_short_together(
    start: Start, tmp_path: Path, told: tuple[list[str], str]
):
    layout, signal = told
    stopped = start(2, [*LONG, *layout, "--exit-signal-handler"], signal)
    assert TOLD in stopped.log
    assert (tmp_path / "saved/latest_checkpointed_iteration.txt").read_text() == "2"


@pytest.mark.slow
def test_a_step_that_disk_holds_is_not_saved_again_for_a_signal(start: Start, tmp_path: Path):
    fault = """
import os, signal
os.kill(os.getpid(), signal.SIGTERM)
from megatron.training import get_args
from pathlib import Path
mark = Path(get_args().save) / "iter_0000002/mark"
mark.touch()
"""
    stopped = start(2, ["--exit-signal-handler"], fault)
    assert [line["iteration"] for line in stopped.metrics] == [1, 2]
    assert (tmp_path / "saved/iter_0000002/mark").exists()
    saved = (tmp_path / "saved/megatron.log").read_text().count("successfully saved checkpoint")
    assert saved == 1
