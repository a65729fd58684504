"""The few patches of Megatron, in one table.

All symbols are looked up as module globals at call time by Megatron 0.19, so patching works also
after the user's script has imported ``pretrain``. Each patched symbol, and each that the wrappers
call, is checked first: one that is gone, or lacks a parameter that RMT relies on, is refused.
"""

import copy
import functools
import importlib
import importlib.metadata
import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.job.checkpoints import refuse_what_is_not_finite, unwritten
from megatron_rmt.job.data_files import empty_split
from megatron_rmt.job.digests import check_digests, index_with_digest, with_digests
from megatron_rmt.job.eval_samples import Values, evaluate_with_thoughts, report_evaluation
from megatron_rmt.job.index_cache import whole_indices
from megatron_rmt.job.processes import (
    end_when_interrupted,
    end_with_torchrun,
    start_save_worker,
    write_results_queue,
)
from megatron_rmt.job.resume import check_same_settings, stored_arguments
from megatron_rmt.job.run_lock import lock_problem, metrics_lock_problem
from megatron_rmt.job.settings import add_rmt_arguments, readable_help, versions
from megatron_rmt.job.tracking import continue_wandb_run, forgive_writer, never_ending_training
from megatron_rmt.job.train_step import PROGRESS, prepared, run_step
from megatron_rmt.job.user_batch import BatchError
from megatron_rmt.job.validation import check_rmt_arguments
from megatron_rmt.mid_training import read_prompt
from megatron_rmt.model.gpt import Model, gpt_model

SUPPORTED = ">=0.19,<0.20"


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
    try:
        result = original(args, *others, **named)
    except Exception as error:
        if not Settings.of(args).rmt:
            raise
        raise SystemExit(f"Megatron refuses these flags: {_reason(error)}") from None
    try:
        check_rmt_arguments(args)
    except ValueError as error:
        # Each rank ends here by itself, before any of them waits for another.
        raise SystemExit(str(error)) from None
    if not Settings.of(args).rmt:
        return result
    _check_configuration(args)
    end_with_torchrun()
    end_when_interrupted()
    continue_wandb_run(args)
    if Settings.of(args).trains_with_rl:
        # Megatron hands all arguments to wandb as the configuration of the run.
        args.rmt_versions = versions()
    return result


def _check_configuration(args: Any) -> None:
    """End where the configuration of the model would: Megatron makes it of the flags after it has
    checked them, and checks others then."""
    from megatron.training.arguments import core_transformer_config_from_args

    try:
        core_transformer_config_from_args(copy.copy(args))
    except Exception as error:
        raise SystemExit(f"Megatron refuses these flags: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """One line on why Megatron's checks of its flags ended."""
    text = " ".join(str(error).split())
    line = traceback.extract_tb(error.__traceback__)[-1].line
    if isinstance(error, AssertionError):
        # Many say nothing; their line does.
        return text or str(line)
    if isinstance(error, ValueError | NotImplementedError | RuntimeError):
        return text or type(error).__name__
    # Megatron did not mean to end so.
    return f"{type(error).__name__}: {text} (in: {line})"


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


def _setup_model(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from megatron.training import get_args

    options = get_args()
    if Settings.of(options).trains_with_rl:
        # The first moment at which one rank can tell the others, and no model is built yet.
        _end_if(0, lock_problem, options.save)
        last = torch.distributed.get_world_size() - 1
        _end_if(last, metrics_lock_problem, options.rmt_metrics_file)
    return original(*args, **kwargs)


def _end_if(rank: int, find: Callable[[str | None], str | None], place: str | None) -> None:
    """All ranks end if ``rank`` finds a problem with a ``place`` to which it writes."""
    problem = [find(place) if torch.distributed.get_rank() == rank else None]
    torch.distributed.broadcast_object_list(problem, src=rank)
    if problem[0] is not None:
        raise SystemExit(f"RMT cannot train here: {problem[0]}")


def _get_model(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from megatron.training import get_args

    chunks = original(*args, **kwargs)
    if Settings.of(get_args()).trains_with_rl:
        _inside(chunks)
    return chunks


def _inside(chunks: list[torch.nn.Module]) -> Model:
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


def _build_indices(original: Callable[..., Any], dataset: Any) -> Any:
    from megatron.training import get_args

    if not Settings.of(get_args()).rmt:
        return original(dataset)
    return whole_indices(original, dataset)


def _generate_state_dict(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a checkpoint holds; with the baseline when it is saved, which is when it has an
    iteration."""
    state = original(*args, **kwargs)
    call = inspect.signature(original).bind(*args, **kwargs).arguments
    settings = Settings.of(call["args"])
    if settings.trains_with_rl and settings.baseline_decay is not None and "iteration" in call:
        state["rmt_baseline"] = prepared(gpt_model(call["model"])).baseline.sharded_state()
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
        run = prepared(model)
    except ValueError as error:
        # What only the built model tells; all ranks find the same.
        raise SystemExit(str(error)) from None
    return run_step(original, call, run)


# Of the evaluation that is under way: what each of its sets is measured by, after how many steps.
_EVALUATION: list[tuple[int, list[Values]]] = []


def _evaluate_and_print_results(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from megatron.training import get_args

    settings = Settings.of(get_args())
    if not (settings.trains_with_rl and settings.eval_samples):
        return original(*args, **kwargs)
    call = inspect.signature(original).bind(*args, **kwargs).arguments
    steps, values = call["iteration"], []
    _EVALUATION.append((steps, values))
    try:
        result = original(*args, **kwargs)
    finally:
        _EVALUATION.pop()
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        report_evaluation(get_args(), values, call["prefix"], steps)
    return result


def _evaluate(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not _EVALUATION:
        return original(*args, **kwargs)
    steps, values = _EVALUATION[-1]
    call = inspect.signature(original).bind(*args, **kwargs).arguments
    run = prepared(_inside(call["model"]))
    try:
        result, found = evaluate_with_thoughts(original, call, run, steps)
    except BatchError as error:
        raise SystemExit(f"RMT, evaluation after {steps} steps: {error}") from None
    values.append(found)
    return result


def _save_checkpoint(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from megatron.training import get_args

    if not Settings.of(get_args()).rmt:
        return original(*args, **kwargs)
    call = inspect.signature(original).bind(*args, **kwargs)
    call.apply_defaults()
    values = call.arguments
    refuse_what_is_not_finite(values["model"], values["optimizer"], values["iteration"])
    try:
        result = original(*args, **kwargs)
    except OSError as error:
        # What one rank writes alone, such as the file that names the last iteration.
        place = Path(get_args().save)
        raise SystemExit(unwritten(place, {torch.distributed.get_rank(): (error,)})) from None
    if not values["non_persistent_ckpt"]:
        PROGRESS.held = values["iteration"]
    return result


def _get_save_function_and_args(original: Callable[..., Any], writer: Any) -> Any:
    from megatron.training import get_args

    settings = Settings.of(get_args())
    if not settings.rmt:
        return original(writer)
    return with_digests(original, writer, not settings.no_digests)


def _save_state_dict_async_finalize(
    original: Callable[..., Any], storage_writer: Any, global_metadata: Any, dist_wrapper: Any
) -> None:
    from megatron.training import get_args

    settings = Settings.of(get_args())
    finalize = functools.partial(original, storage_writer, global_metadata, dist_wrapper)
    try:
        if settings.rmt and dist_wrapper.is_coordinator:
            index_with_digest(finalize, storage_writer, not settings.no_digests)
        else:
            finalize()
    except CheckpointException as error:
        if not settings.rmt:
            raise
        # Every rank raises it, and the coordinator knows why.
        found = error.failures and unwritten(Path(storage_writer.checkpoint_dir), error.failures)
        raise SystemExit(dist_wrapper.broadcast_object(found)) from None


def _load_global_dist_base_checkpoint(
    original: Callable[..., Any], load_dir: str, args: Any, rank0: bool, *others: Any, **named: Any
) -> Any:
    """Megatron calls it twice; the first time with ``rank0``, on all ranks, for what is no tensor,
    and before that for its own arguments, when no rank can tell another anything yet."""
    from megatron.training.checkpointing import get_checkpoint_name

    call = inspect.signature(original).bind(load_dir, args, rank0, *others, **named).arguments
    folder = get_checkpoint_name(load_dir, call["iteration"], call["release"], return_base_dir=True)
    agreed = rank0 and torch.distributed.is_initialized()
    if agreed and not Settings.of(args).no_digests and "://" not in folder:
        check_digests(Path(folder))
    try:
        return original(load_dir, args, rank0, *others, **named)
    except CheckpointException as error:
        # torch has told it to all ranks.
        first, _ = next(iter(error.failures.values()))
        reason = " ".join(str(first).split()) or type(first).__name__
        # States of Transformer Engine, which those who wrote it with other layers may lack.
        lacks_states = "Missing key" in reason and "_extra_state" in reason
        remedy = (
            "convert it again, or pass --dist-ckpt-strictness log_all, which goes without"
            if lacks_states
            else "copy it again, or name another one with --ckpt-step"
        )
        raise SystemExit(
            f"RMT: the checkpoint {folder} is not loaded: {reason}; {remedy}."
        ) from None


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
    # Neither half a cache of samples nor one of an earlier corpus is trained on.
    Symbol(
        "megatron.core.datasets.gpt_dataset",
        "GPTDataset._build_document_sample_shuffle_indices",
        "",
        _build_indices,
    ),
    # The wheel ships the compiled helper and no Makefile.
    Symbol("megatron.core.datasets.utils", "compile_helpers", "", _compile_helpers),
    # One job at a time writes to --save and to --rmt-metrics-file.
    Symbol("megatron.training.training", "setup_model_and_optimizer", "", _setup_model),
    # Another model than a GPTModel, where a job's own function builds it, is refused before its
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
    # Thoughts on samples of Megatron's evaluations.
    Symbol(
        "megatron.training.training",
        "evaluate",
        "forward_step_func data_iterator model eval_iters",
        _evaluate,
    ),
    Symbol(
        "megatron.training.training",
        "evaluate_and_print_results",
        "prefix iteration",
        _evaluate_and_print_results,
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
    # Bits that flip in a checkpoint are seen before it is loaded.
    Symbol(
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "FileSystemWriterAsync.get_save_function_and_args",
        "",
        _get_save_function_and_args,
    ),
    Symbol(
        "megatron.core.dist_checkpointing.strategies.state_dict_saver",
        "save_state_dict_async_finalize",
        "storage_writer global_metadata dist_wrapper",
        _save_state_dict_async_finalize,
    ),
    Symbol(
        "megatron.training.checkpointing",
        "_load_global_dist_base_checkpoint",
        "load_dir args rank0 iteration release",
        _load_global_dist_base_checkpoint,
    ),
    # Processes that save a checkpoint end with the rank that started them.
    Symbol(
        "megatron.core.dist_checkpointing.strategies.async_utils",
        "PersistentAsyncCaller._get_process",
        "",
        start_save_worker,
    ),
    Symbol(
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "get_write_results_queue",
        "mp_mode",
        write_results_queue,
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
    # What comes behind the decoder, where layers of multi-token prediction would run in every pass.
    Symbol(
        "megatron.core.models.gpt.gpt_model",
        "GPTModel._postprocess",
        "hidden_states rotary_pos_emb packed_seq_params output_processor output_processor_context",
    ),
    # Where latent attention rotates, and what it makes keys and values of.
    Symbol(
        "megatron.core.transformer.multi_latent_attention",
        "MLASelfAttention.get_query_key_value_tensors",
        "hidden_states key_value_states position_ids packed_seq_params",
    ),
    # The same of hybrid stacks, and how their Mamba layers are told what rows see.
    Symbol(
        "megatron.core.models.hybrid.hybrid_model",
        "HybridModel.forward",
        "input_ids position_ids attention_mask labels loss_mask packed_seq_params",
    ),
    Symbol(
        "megatron.core.ssm.mamba_mixer", "MambaMixer.forward", "hidden_states packed_seq_params"
    ),
    # Whole weights for rollouts, where their gathering is overlapped.
    Symbol("megatron.training.training", "should_disable_forward_pre_hook"),
    *(
        Symbol(
            "megatron.core.distributed.distributed_data_parallel",
            f"DistributedDataParallel.{name}",
        )
        for name in ("start_param_sync", "disable_forward_pre_hook", "enable_forward_pre_hook")
    ),
    # Where the checkpoint lies whose moving average a resumed run goes on with.
    Symbol("megatron.training.checkpointing", "get_checkpoint_name", "iteration return_base_dir"),
    # The model's configuration, which refuses flags that were not looked at before.
    Symbol("megatron.training.arguments", "core_transformer_config_from_args", "args"),
    # The corpora of the training blend.
    Symbol("megatron.training.utils", "get_blend_and_blend_per_split", "args"),
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
    # The samples of the largest step, where the batch grows.
    Symbol(
        "megatron.core.num_microbatches_calculator",
        "StepBatchsizeNumMicroBatchesCalculator.__init__",
        "micro_batch_size data_parallel_size decrease_batch_size_if_needed rank schedule "
        "seq_length",
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
