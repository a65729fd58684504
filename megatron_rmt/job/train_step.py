"""One training step as Megatron calls it: the batch, rollouts, Megatron's own ``train_step`` on the
trees, logs. A step that cannot be taken ends here, on all ranks alike.
"""

import contextlib
import functools
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.rerun_state_machine import RerunDataIterator

from megatron_rmt.algorithm.doors import DoorError
from megatron_rmt.algorithm.schedules import schedule_of_step
from megatron_rmt.job.data_files import marks_of_data
from megatron_rmt.job.held_out import (
    is_measured,
    log_held_out,
    measure_held_out,
    tokenize_held_out,
)
from megatron_rmt.job.idle_steps import note_idle_step
from megatron_rmt.job.metrics import metrics_path, write_metrics
from megatron_rmt.job.not_taken import Progress, left_to_the_next_run, skipped
from megatron_rmt.job.resume import behind_doors, rendering
from megatron_rmt.job.samples import (
    is_shown,
    read_samples,
    read_text,
    write_samples,
    write_text,
)
from megatron_rmt.job.sources import Sources, noting, sources_of_run, with_sources
from megatron_rmt.job.user_batch import BatchError, foreign_token_problem, take_batches
from megatron_rmt.mid_training import MidTraining, prepare
from megatron_rmt.model.gpt import (
    Model,
    chunks_of,
    generating,
    named_parameters,
    whole_parameters,
)
from megatron_rmt.model.routers import counting_trees
from megatron_rmt.probe import HeldOut
from megatron_rmt.rollout.generate import StoppedError
from megatron_rmt.rollout.memory import CacheError
from megatron_rmt.step import collect
from megatron_rmt.update.agreement import NotFiniteError, RanksDifferError
from megatron_rmt.update.baseline import Baseline
from megatron_rmt.update.forward_step import Update, make_forward_step
from megatron_rmt.update.logprob_check import (
    LogProbsDifferError,
    check_log_probs,
    logprob_tolerance,
)

# Of this process: what it knows of the steps behind it, and those that taught nothing, by reason.
PROGRESS = Progress()
IDLE_STEPS: Counter[str] = Counter()


@functools.lru_cache(maxsize=1)
def prepared(model: Model) -> MidTraining:
    """What the run of ``model`` needs, built at its first step.

    Raises:
        ValueError: see ``mid_training.prepare``.
    """
    from megatron.training import get_args, get_tokenizer

    args = get_args()
    run = prepare(args, model, get_tokenizer())
    # Megatron stores all arguments with each checkpoint.
    args.rmt_prompt_rendering = rendering(run.prompt)
    args.rmt_doors = behind_doors(run.settings)
    args.rmt_data = marks_of_data(args)
    if run.baseline is not None and args.iteration > 0:
        _resume_baseline(run.baseline, args)
    return run


@functools.lru_cache(maxsize=1)
def held_out_of(model: Model) -> HeldOut:
    """The documents that the run of ``model`` is measured on, tokenized once."""
    from megatron.training import get_tokenizer

    return tokenize_held_out(prepared(model), get_tokenizer())


@functools.lru_cache(maxsize=1)
def _sources_of(model: Model) -> Sources | None:
    """The corpora of the run of ``model``, read once; None where all are treated alike."""
    run = prepared(model)
    return sources_of_run(run.args) if run.settings.skip_sources else None


def _resume_baseline(baseline: Baseline, args: Namespace) -> None:
    """Go on from the baseline of the checkpoint that this run resumes from."""
    from megatron.training.checkpointing import get_checkpoint_name

    folder = Path(get_checkpoint_name(args.load, args.iteration, return_base_dir=True))
    if not (folder.is_dir() and baseline.load(folder)) and _is_last_rank():
        print(
            f"RMT: --rmt-baseline-decay is {baseline.decay}, but {folder} holds no moving average; "
            "it begins again with the weights at hand.",
            flush=True,
        )


def run_step(original: Callable[..., Any], call: dict[str, Any], run: MidTraining) -> Any:
    """Roll out, then let Megatron's ``train_step`` (``call``: its arguments) train on the trees.

    The rollouts come first, because inside ``train_step`` Megatron's rerun state machine may run
    the forward and backward passes again.
    """
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    options, chunks, iteration = run.args, call["model"], call["iteration"]
    # With virtual pipeline stages Megatron has one for each chunk.
    interleaved = isinstance(call["data_iterator"], list)
    iterators = call["data_iterator"] if interleaved else [call["data_iterator"]]
    started = time.perf_counter()
    if PROGRESS.held is None:
        # The state is still the one that was loaded.
        PROGRESS.held = iteration
    for chunk in chunks:
        # Every rank looks before the optimizer's step, so none may leave in the backward pass.
        chunk.ddp_config.check_for_nan_in_grad = False
    schedule = schedule_of_step(run.settings, iteration, options.train_iters)
    if iteration == 0:
        _measure(run, chunks, 0, schedule.budget)
    sources = _sources_of(run.policy.model)
    read = iterators if sources is None else [noting(iterator) for iterator in iterators]
    try:
        with _gathered(options, chunks):
            batches = take_batches(
                call["forward_step_func"],
                read,
                chunks,
                chunks_of(run.policy.model),
                get_num_microbatches(),
                end_of_document=run.prompt.end_of_document,
                separate_documents=options.reset_attention_mask,
                token_problem=functools.partial(
                    foreign_token_problem, args=options, vocab_size=run.policy.vocab_size
                ),
            )
            if sources is not None:
                batches = with_sources(batches, read, sources)
            for iterator in iterators:
                if isinstance(iterator, RerunDataIterator):
                    # Megatron advances those that it is given, which will be others.
                    iterator.advance()
            began_collecting = time.perf_counter()
            with generating(run.policy.model):
                collected = collect(run, batches, schedule, _told_to_stop(options))
            if run.baseline is not None:
                run.baseline.take_in()
        note_idle_step(IDLE_STEPS, collected.idle, iteration)
        updates = collected.updates
        began_update = time.perf_counter()
        call["forward_step_func"] = make_forward_step(collected.settings)
        trees = [RerunDataIterator(iter(updates)) for _ in chunks]
        call["data_iterator"] = trees if interleaved else trees[0]
        call["forward_backward_func"] = _for_trees(
            call["forward_backward_func"],
            run.policy.model,
            updates,
            logprob_tolerance(options),
            # Of fp16, an infinite gradient is Megatron's to skip, with its loss scale.
            {} if options.fp16 else _gradients(chunks),
        )
        result = original(**call)
    except NotFiniteError as error:
        return skipped(options, iteration, error, batches, run.prompt, PROGRESS)
    except StoppedError:
        return left_to_the_next_run(options, iteration, PROGRESS)
    except (BatchError, DoorError, CacheError, RanksDifferError, LogProbsDifferError) as error:
        # Every rank ends here; no weight has moved yet.
        raise SystemExit(f"RMT, iteration {iteration + 1}: {error}") from None
    PROGRESS.bad_in_a_row = 0
    measured = _measure(run, chunks, iteration + 1, schedule.budget)
    if parallel_state.is_pipeline_last_stage() and result[0]:
        report, device = result[0], updates[0].tree.tokens.device
        report["rmt largest logprob difference"] = _largest_difference(updates, device)
        seconds = {"batch": began_collecting - started, **collected.seconds}
        seconds["update"] = time.perf_counter() - began_update
        for phase, value in seconds.items():
            report[f"rmt {phase} seconds"] = torch.tensor(value, device=device)
        path = metrics_path(options)
        if path is not None and _is_last_rank():
            values = dict(report)
            values["ntp loss"] = values.pop("lm loss")
            values["grad norm"] = float("nan") if result[5] is None else result[5]
            write_metrics(path, iteration + 1, values | measured)
    if _is_last_rank() and is_shown(run.settings, iteration):
        read = (run.prompt, collected.reasoned, collected.entropies)
        write_samples(options, read_samples(*read, iteration))
        write_text(options, read_text(*read, collected.tiers, iteration))
    return result


def _gathered(
    args: Namespace, chunks: Sequence[torch.nn.Module]
) -> contextlib.AbstractContextManager[None]:
    """Within, the weights are whole, though their gathering is overlapped: rollouts need them."""
    from megatron.training.training import should_disable_forward_pre_hook

    overlapped = should_disable_forward_pre_hook(args)
    return whole_parameters(chunks) if overlapped else contextlib.nullcontext()


def _measure(
    run: MidTraining, chunks: Sequence[torch.nn.Module], steps: int, budget: int
) -> dict[str, float | None]:
    """What the held-out documents say after so many steps; empty where it is not asked."""
    if not is_measured(run.settings, steps):
        return {}
    with _gathered(run.args, chunks):
        values = measure_held_out(run, held_out_of(run.policy.model), budget)
    if _is_last_rank():
        log_held_out(values, steps)
        path = metrics_path(run.args)
        if steps == 0 and path is not None:
            write_metrics(path, 0, values)
    return values


def _told_to_stop(args: Any) -> Callable[[], bool] | None:
    """Whether this rank has had the signal that ``--exit-signal-handler`` waits for."""
    if not args.exit_signal_handler:
        return None
    from megatron.training.global_vars import get_signal_handler

    handler = get_signal_handler()
    return lambda: handler._signal_received


def _gradients(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Where the gradients of this rank are summed up, by parameter."""
    return {
        name: parameter.main_grad
        for name, parameter in named_parameters(chunks)
        if getattr(parameter, "main_grad", None) is not None
    }


def _is_last_rank() -> bool:
    """Whether this is the rank that Megatron lets log."""
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def _for_trees(
    schedule: Callable[..., Any],
    model: Model,
    updates: list[Update],
    tolerance: float,
    gradients: Mapping[str, torch.Tensor],
) -> Callable[..., Any]:
    """The schedule, told how long the packed trees are (pipeline stages exchange that size).

    After it, so before the optimizer's step, the log-probs are compared with those of the rollouts,
    and all numbers must be finite.
    """
    length = updates[0].tree.tokens.shape[0]

    @functools.wraps(schedule)
    def forward_backward(**arguments: Any) -> Any:
        arguments |= {"seq_length": length, "decoder_seq_length": length, "micro_batch_size": 1}
        with counting_trees(model):
            result = schedule(**arguments)
        check_log_probs(updates, tolerance, gradients)
        return result

    return forward_backward


def _largest_difference(updates: list[Update], device: torch.device) -> torch.Tensor:
    largest = torch.stack([update.largest_difference.to(device) for update in updates]).max()
    torch.distributed.all_reduce(
        largest,
        op=torch.distributed.ReduceOp.MAX,
        group=parallel_state.get_data_parallel_group(),
    )
    return largest
