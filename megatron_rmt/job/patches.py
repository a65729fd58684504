"""The few patches of Megatron, in one table.

All symbols are looked up as module globals at call time by Megatron 0.19, so patching works also
after the user's script has imported ``pretrain``. Each patched symbol, and each that the wrappers
call, is checked first: one that is gone, or lacks a parameter that RMT relies on, is refused.
"""

import functools
import importlib
import importlib.metadata
import inspect
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.rerun_state_machine import RerunDataIterator

from megatron_rmt.algorithm.doors import DoorError
from megatron_rmt.algorithm.schedules import schedule_of_step
from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.job.checkpoints import refuse_what_is_not_finite
from megatron_rmt.job.data_files import empty_split
from megatron_rmt.job.idle_steps import note_idle_step
from megatron_rmt.job.metrics import metrics_path, write_metrics
from megatron_rmt.job.not_taken import Progress, left_to_the_next_run, skipped
from megatron_rmt.job.processes import end_with_torchrun
from megatron_rmt.job.resume import check_same_settings, rendering, stored_arguments
from megatron_rmt.job.run_lock import lock_problem
from megatron_rmt.job.samples import is_shown, read_samples, write_samples
from megatron_rmt.job.settings import add_rmt_arguments, readable_help, versions
from megatron_rmt.job.tracking import continue_wandb_run, forgive_writer, never_ending_training
from megatron_rmt.job.user_batch import BatchError, check_tokens, take_batches
from megatron_rmt.job.validation import check_rmt_arguments
from megatron_rmt.mid_training import MidTraining, prepare, read_prompt
from megatron_rmt.model.gpt import generating, gpt_model
from megatron_rmt.model.routers import counting_trees
from megatron_rmt.rollout.generate import StoppedError
from megatron_rmt.rollout.memory import CacheError
from megatron_rmt.step import collect
from megatron_rmt.update.agreement import NotFiniteError, RanksDifferError
from megatron_rmt.update.baseline import Baseline
from megatron_rmt.update.forward_step import Update, make_forward_step
from megatron_rmt.update.logprob_check import check_log_probs, logprob_tolerance

SUPPORTED = ">=0.19,<0.20"

# By reason, since this process started.
_IDLE_STEPS: Counter[str] = Counter()


@dataclass(frozen=True)
class Symbol:
    """A function of Megatron's. parameters: names of those that RMT passes or reads by name.
    replacement: called in its place, with the original before the arguments; None if RMT only
    calls it."""

    module: str
    name: str
    parameters: str = ""
    replacement: Callable[..., Any] | None = None

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def attribute(self) -> str:
        """Its name in what holds it."""
        return self.name.split(".")[-1]

    def find(self) -> tuple[Any, Callable[..., Any]] | None:
        """(what holds it, the function); None if there is none."""
        try:
            owner: Any = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name is None or not self.module.startswith(error.name):
                raise  # not Megatron's module, but one that it needs
            return None
        for parent in self.name.split(".")[:-1]:
            owner = getattr(owner, parent, None)
        function = getattr(owner, self.attribute, None)
        return None if function is None else (owner, function)


def _add_arguments(original: Callable[..., Any], parser: Any) -> Any:
    return readable_help(add_rmt_arguments(original(parser)))


def _validate_args(original: Callable[..., Any], args: Any, *others: Any, **named: Any) -> Any:
    result = original(args, *others, **named)
    try:
        check_rmt_arguments(args)
    except ValueError as error:
        # Each rank ends here by itself, before any of them waits for another.
        raise SystemExit(str(error)) from None
    if not Settings.of(args).rmt:
        return result
    end_with_torchrun()
    continue_wandb_run(args)
    if Settings.of(args).trains_with_rl:
        # Megatron hands all arguments to wandb as the configuration of the run.
        args.rmt_versions = versions()
    return result


def _compile_helpers(original: Callable[..., Any]) -> None:
    try:
        importlib.import_module("megatron.core.datasets.helpers_cpp")
    except ImportError:
        original()


def _check_checkpoint_args(
    original: Callable[..., Any], checkpoint_args: Any, **named: Any
) -> None:
    from megatron.training import get_args, get_tokenizer

    original(checkpoint_args, **named)
    args = get_args()
    if not Settings.of(args).trains_with_rl or stored_arguments(args) is not None:
        return  # they were compared before the model was built
    try:
        prompt = read_prompt(Settings.of(args), get_tokenizer())
        check_same_settings(args, prompt, checkpoint_args)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def _get_model(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from megatron.training import get_args

    if not Settings.of(get_args()).trains_with_rl:
        return original(*args, **kwargs)
    # The first moment at which one rank can tell the others, and no model is built yet.
    problem = [lock_problem(get_args().save) if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise SystemExit(f"RMT cannot train here: {problem[0]}")
    chunks = original(*args, **kwargs)
    _inside(chunks)
    return chunks


def _inside(chunks: list[torch.nn.Module]) -> GPTModel:
    """The ``GPTModel`` in a job's model; all ranks end if there is none."""
    try:
        return gpt_model(chunks)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def _build_datasets(original: Callable[..., Any], builder: Any) -> Any:
    from megatron.training import get_args

    if Settings.of(get_args()).trains_with_rl:
        problem = empty_split(get_args(), builder)
        if problem is not None:
            # On all ranks: each reads the same index.
            raise SystemExit(f"RMT cannot train on this data: {problem}")
    return original(builder)


def _generate_state_dict(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a checkpoint holds; with the baseline when it is saved, which is when it has an
    iteration."""
    state = original(*args, **kwargs)
    call = inspect.signature(original).bind(*args, **kwargs).arguments
    settings = Settings.of(call["args"])
    if settings.trains_with_rl and settings.baseline_decay is not None and "iteration" in call:
        state["rmt_baseline"] = _prepared(gpt_model(call["model"])).baseline.sharded_state()
    return state


def _set_writer(
    name: str, what: str, original: Callable[..., Any], args: Any, *others: Any
) -> None:
    """Open a writer of logs; it neither ends the job here nor later."""
    if not Settings.of(args).rmt:
        original(args, *others)
        return
    with never_ending_training(what):
        original(args, *others)
    forgive_writer(name, what)


def _train_step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # Imported here, as Megatron's globals do not exist when the patches are installed.
    from megatron.training import get_args

    if not Settings.of(get_args()).trains_with_rl:
        return original(*args, **kwargs)
    call = inspect.signature(original).bind(*args, **kwargs).arguments
    model = _inside(call["model"])
    try:
        run = _prepared(model)
    except ValueError as error:
        # What only the built model tells; all ranks find the same.
        raise SystemExit(str(error)) from None
    return run_step(original, call, run)


# Of this process.
_progress = Progress()


def _save_checkpoint(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from megatron.training import get_args

    if not Settings.of(get_args()).rmt:
        return original(*args, **kwargs)
    call = inspect.signature(original).bind(*args, **kwargs)
    call.apply_defaults()
    values = call.arguments
    refuse_what_is_not_finite(values["model"], values["optimizer"], values["iteration"])
    result = original(*args, **kwargs)
    if not values["non_persistent_ckpt"]:
        _progress.held = values["iteration"]
    return result


@functools.lru_cache(maxsize=1)
def _prepared(model: GPTModel) -> MidTraining:
    from megatron.training import get_args, get_tokenizer

    args = get_args()
    run = prepare(args, model, get_tokenizer())
    # Megatron stores all arguments with each checkpoint.
    args.rmt_prompt_rendering = rendering(run.prompt)
    if run.baseline is not None and args.iteration > 0:
        _resume_baseline(run.baseline, args)
    return run


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
    from megatron.training.training import force_param_sync, should_disable_forward_pre_hook

    options, chunks, iteration = run.args, call["model"], call["iteration"]
    started = time.perf_counter()
    if _progress.held is None:
        # The state is still the one that was loaded.
        _progress.held = iteration
    for chunk in chunks:
        # Every rank looks before the optimizer's step, so none may leave in the backward pass.
        chunk.ddp_config.check_for_nan_in_grad = False
    if should_disable_forward_pre_hook(options):
        # Overlapped parameter gathering: rollouts need the whole weights now.
        force_param_sync(chunks)
    if run.baseline is not None:
        run.baseline.follow()
    try:
        batches = take_batches(
            call["forward_step_func"],
            call["data_iterator"],
            chunks[0],
            run.policy.model,
            get_num_microbatches(),
            end_of_document=run.prompt.end_of_document,
            separate_documents=options.reset_attention_mask,
        )
    except BatchError as error:
        # All ranks raise the same; no weight has moved yet.
        raise SystemExit(str(error)) from None
    if isinstance(call["data_iterator"], RerunDataIterator):
        # Megatron advances the iterator that it is given, which will be another one.
        call["data_iterator"].advance()
    schedule = schedule_of_step(run.settings, iteration, options.train_iters)
    began_collecting = time.perf_counter()
    try:
        check_tokens(batches, options, run.policy.vocab_size)
        with generating(run.policy.model):
            collected = collect(run, batches, schedule, _told_to_stop(options))
        note_idle_step(_IDLE_STEPS, collected.idle, iteration)
        updates = collected.updates
        began_update = time.perf_counter()
        call["forward_step_func"] = make_forward_step(collected.settings)
        call["data_iterator"] = RerunDataIterator(iter(updates))
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
        return skipped(options, iteration, error, batches, run.prompt, _progress)
    except StoppedError:
        return left_to_the_next_run(options, iteration, _progress)
    except (BatchError, DoorError, CacheError, RanksDifferError) as error:
        # Every rank ends here; no weight has moved yet.
        raise SystemExit(f"RMT, iteration {iteration + 1}: {error}") from None
    _progress.bad_in_a_row = 0
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
            write_metrics(path, iteration + 1, values)
    if _is_last_rank() and is_shown(run.settings, iteration):
        write_samples(options, read_samples(run.prompt, collected.reasoned, iteration))
    return result


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
        name.removeprefix("module."): parameter.main_grad
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if getattr(parameter, "main_grad", None) is not None
    }


def _is_last_rank() -> bool:
    """Whether this is the rank that Megatron lets log."""
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def _for_trees(
    schedule: Callable[..., Any],
    model: GPTModel,
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


PATCHES: tuple[Symbol, ...] = (
    # The --rmt-* flags.
    Symbol("megatron.training.arguments", "add_megatron_arguments", "parser", _add_arguments),
    # Refuse what RMT cannot run with, before a model is built.
    Symbol("megatron.training.arguments", "validate_args", "args", _validate_args),
    # Refuse to go on under other settings, where they could not be read before.
    Symbol(
        "megatron.training.checkpointing",
        "check_checkpoint_args",
        "checkpoint_args",
        _check_checkpoint_args,
    ),
    # Refuse what Megatron would look for without an end.
    Symbol(
        "megatron.core.datasets.blended_megatron_dataset_builder",
        "BlendedMegatronDatasetBuilder.build",
        "",
        _build_datasets,
    ),
    # The wheel ships the compiled helper and no Makefile.
    Symbol("megatron.core.datasets.utils", "compile_helpers", "", _compile_helpers),
    # One job at a time writes to --save; another model than a GPTModel is refused before its
    # checkpoint and the data are read.
    Symbol("megatron.training.training", "get_model", "", _get_model),
    # Saves the moving average of --rmt-baseline-decay with the rest.
    Symbol(
        "megatron.training.checkpointing",
        "generate_state_dict",
        "args model iteration",
        _generate_state_dict,
    ),
    # Rollouts before the step, trees instead of the batch in it.
    Symbol(
        "megatron.training.training",
        "train_step",
        "forward_step_func data_iterator model forward_backward_func iteration",
        _train_step,
    ),
    # Logs that cannot be written end nothing.
    Symbol(
        "megatron.training.global_vars",
        "_set_tensorboard_writer",
        "args",
        functools.partial(_set_writer, "_GLOBAL_TENSORBOARD_WRITER", "TensorBoard"),
    ),
    Symbol(
        "megatron.training.global_vars",
        "_set_wandb_writer",
        "args",
        functools.partial(_set_writer, "_GLOBAL_WANDB_WRITER", "wandb"),
    ),
    # Nothing that is not finite gets into a checkpoint, whichever module saves it.
    *(
        Symbol(
            f"megatron.training.{module}",
            "save_checkpoint",
            "iteration model optimizer non_persistent_ckpt",
            _save_checkpoint,
        )
        for module in ("training", "checkpointing")
    ),
)

# Called or handed over to, not replaced.
RELIED_ON: tuple[Symbol, ...] = (
    # Records the user's batch; takes trees and RMT's own head.
    Symbol(
        "megatron.core.models.gpt.gpt_model",
        "GPTModel.forward",
        "input_ids position_ids attention_mask labels loss_mask packed_seq_params "
        "output_processor output_processor_context",
    ),
    # Whole weights for rollouts, where their gathering is overlapped.
    Symbol("megatron.training.training", "should_disable_forward_pre_hook"),
    Symbol("megatron.training.training", "force_param_sync"),
    # Where the checkpoint lies whose moving average a resumed run goes on with.
    Symbol("megatron.training.checkpointing", "get_checkpoint_name", "iteration return_base_dir"),
    # How many micro-batches of the user's a step takes.
    Symbol("megatron.core.num_microbatches_calculator", "get_num_microbatches"),
    # The updates as Megatron's schedules expect them.
    Symbol("megatron.core.rerun_state_machine", "RerunDataIterator.__init__", "iterable"),
    # Back to where it was before a step that is skipped.
    Symbol("megatron.core.rerun_state_machine", "get_rerun_state_machine"),
    # Whether a rank has been told to stop.
    Symbol("megatron.training.global_vars", "get_signal_handler"),
    # What writes checkpoints in a process of its own.
    Symbol(
        "megatron.core.dist_checkpointing.strategies.async_utils",
        "PersistentAsyncCaller.async_loop",
    ),
)


def patch() -> None:
    """Install RMT's hooks into ``megatron.training``. Calling it twice is harmless.

    Raises:
        RuntimeError: Megatron-Core's version is outside the supported range, or a symbol is missing
            or lacks a parameter; nothing is patched then.
    """
    version = importlib.metadata.version("megatron-core")
    if version.split(".")[:2] != ["0", "19"]:
        raise RuntimeError(
            f"megatron_rmt.patch() supports megatron-core {SUPPORTED} but found {version}; install "
            "a supported release."
        )
    found = [(symbol, *_expected(symbol)) for symbol in (*PATCHES, *RELIED_ON)]
    for symbol, owner, function in found:
        if symbol.replacement and not hasattr(function, "megatron_rmt_original"):
            setattr(owner, symbol.attribute, _replaced(function, symbol.replacement))


def _replaced(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    wrapper.megatron_rmt_original = original
    wrapper.megatron_rmt_wrapper = wrapper
    return wrapper


def unpatch() -> None:
    """Put back every function that ``patch`` replaced. Harmless where nothing is patched.

    A model that RMT has trained keeps its tree attention, which without a visibility is its own
    attention.

    Raises:
        RuntimeError: somebody wrapped one of them after ``patch``; nothing is put back then.
    """
    found = [(entry, *place) for entry in PATCHES if (place := entry.find()) is not None]
    ours = [place for place in found if hasattr(place[2], "megatron_rmt_original")]
    for entry, _, function in ours:
        # functools.wraps copies attributes: such a wrapper says that it is ours and is not.
        if function.megatron_rmt_wrapper is not function:
            raise RuntimeError(
                f"megatron_rmt.unpatch() found {entry} wrapped again after megatron_rmt.patch(); "
                "undo that first."
            )
    for entry, owner, function in ours:
        setattr(owner, entry.attribute, function.megatron_rmt_original)


def _expected(symbol: Symbol) -> tuple[Any, Callable[..., Any]]:
    """What holds ``symbol`` and the function, if it is what RMT was written for."""
    release = f"megatron-core {importlib.metadata.version('megatron-core')}"
    place = symbol.find()
    if place is None:
        raise RuntimeError(
            f"megatron_rmt.patch() expected {symbol} but {release} has no such symbol; install "
            f"megatron-core {SUPPORTED}."
        )
    present, needed = inspect.signature(place[1]).parameters, symbol.parameters.split()
    if not set(needed) <= set(present):
        raise RuntimeError(
            f"megatron_rmt.patch() expected {symbol} with parameters {', '.join(needed)} but "
            f"{release} has {', '.join(present)}; install megatron-core {SUPPORTED}."
        )
    return place
