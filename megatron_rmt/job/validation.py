"""What RMT cannot run with, found on every rank before a model is built: all problems at once."""

import math
import os
import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import torch
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_rmt.algorithm.doors import find
from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.job.checkpoints import save_problem
from megatron_rmt.job.data_files import data_problems
from megatron_rmt.job.held_out import held_out_problems
from megatron_rmt.job.layer_problems import layer_problems
from megatron_rmt.job.resume import (
    check_same_settings,
    checkpoint_problems,
    stored_arguments,
)
from megatron_rmt.job.settings import flag_name, lies_in, setting_problems
from megatron_rmt.job.sources import sources_of_run
from megatron_rmt.mid_training import DOORS, batches_of_run, fitting_problem, read_prompt
from megatron_rmt.model.routers import routing_problems
from megatron_rmt.prompt.ids_of_text import check_ids_are_text
from megatron_rmt.prompt.prompt import NO_END_OF_DOCUMENT
from megatron_rmt.prompt.token_bytes import token_bytes

_OFFLOADING = "it plans by the passes of the first step, and rollouts and trees run others"
# Of Megatron's numbers, bounds that may be without an end.
_BOUNDS = frozenset({"clip_grad", "grad_norm_skip_threshold"})
# Without an epsilon, 0 is divided by 0 where a row of the embedding has no gradient.
_INTERVALS = {"adam_beta1": "[0, 1)", "adam_beta2": "[0, 1)", "adam_eps": "(0, inf)"}
_INTERVALS["weight_decay"] = "[0, inf)"
_OUTPUT_LAYER = "it listens to the output layer, which RMT's head stands in for"
# Megatron's datasets ask the tokenizer for the end of a text.
_NEED_ENDS = (
    "--data-path",
    "--train-data-path",
    "--data-args-path",
    "--per-split-data-args-path",
    "--reset-attention-mask",
    "--reset-position-ids",
    "--eod-mask-loss",
)


def check_rmt_arguments(args: Namespace) -> None:
    """Refuse what cannot work, all problems at once.

    Raises:
        ValueError: one sentence per problem, each naming flag, value and remedy.
    """
    settings = Settings.of(args)
    if not settings.rmt:
        given = (one for one in fields(settings) if getattr(settings, one.name) != one.default)
        stray = [flag_name(one.name) for one in given]
        if stray:
            raise ValueError(f"{', '.join(stray)} given without --rmt; add --rmt or leave it out.")
        return
    if not settings.trains_with_rl:
        return
    problems = [*setting_problems(args), *_numbers(args)]
    problems += [*_doors(settings), *unsupported(args)]
    problems += [*_missing(args), *_precision(args), *_tracking(args)]
    problems += [*held_out_problems(settings)]
    problems += [*checkpoint_problems(args), *filter(None, [save_problem(args.save)])]
    if not problems:
        problems = [*filter(None, [interleaving_problem(args)])]
    if not problems:
        # These read files, and rely on what was checked above.
        problems = [*_vocabulary(args)]
    if problems:
        raise ValueError("RMT cannot train with these settings: " + " ".join(problems))


def _numbers(args: Namespace) -> Iterator[str]:
    """Numbers of Megatron's, such as the learning rate, that its parser takes and its optimizer
    does not, or that make weights NaN or infinite."""
    for name, value in vars(args).items():
        for part in value if isinstance(value, list) else [value]:
            if name.startswith("rmt_") or not isinstance(part, float) or math.isfinite(part):
                continue
            if name not in _BOUNDS or math.isnan(part):
                yield f"--{name.replace('_', '-')} is {part}; pass a finite number."
    for name, interval in _INTERVALS.items():
        value = getattr(args, name)
        if math.isfinite(value) and not lies_in(value, interval):
            yield f"--{name.replace('_', '-')} is {value}; pass a number in {interval}."


def _doors(settings: Settings) -> Iterator[str]:
    """Functions of the user's own that cannot be found or called."""
    for name, known in DOORS.items():
        try:
            find(flag_name(name), getattr(settings, name), known)
        except ValueError as error:
            yield str(error)


def unsupported(args: Namespace) -> Iterator[str]:
    """What of Megatron RMT cannot run with on any machine, each with the remedy."""
    refused = {
        "--attention-dropout": (0.0, "generation and update must agree"),
        "--hidden-dropout": (0.0, "generation and update must agree"),
        "--experimental-attention-variant": (
            None,
            "tree attention stands in for softmax attention only",
        ),
        "--qk-clip": (False, "tree attention does not record its largest score"),
        "--log-max-attention-logit": (False, "tree attention does not record its largest score"),
        "--cuda-graph-impl": ("none", "every tree has another shape"),
        "--overlap-moe-expert-parallel-comm": (False, "its schedule bypasses the forward step"),
        "--tp-comm-overlap": (False, "its buffers hold one number of tokens, and trees differ"),
        "--fine-grained-activation-offloading": (False, _OFFLOADING),
        "--cpu-offloading-num-layers": (0, _OFFLOADING),
        "--moe-paged-stash": (False, _OFFLOADING),
        "--defer-embedding-wgrad-compute": (False, "RMT's head takes that gradient itself"),
        "--perform-rl-step": (False, "Megatron's own reinforcement learning replaces the step too"),
        "--sft": (False, "its samples are packed, and RMT packs trees"),
        "--dataloader-inter-document-masking": (
            False,
            "it packs samples; --reset-attention-mask keeps documents apart",
        ),
        "--use-torch-fsdp2": (False, "rollouts need whole weights"),
        "--use-megatron-fsdp": (False, "rollouts need whole weights"),
        "--hybrid-context-parallel": (
            False,
            "it deals a batch out anew, and samples must stay where they are",
        ),
        "--logits-save-dir": (None, _OUTPUT_LAYER),
        "--logits-load-dir": (None, _OUTPUT_LAYER),
        "--te-precision-config-file": (
            None,
            "rollouts prepare for --fp8-format, not for precisions of single layers",
        ),
        "--reuse-grad-buf-for-mxfp8-param-ag": (
            False,
            "it is for MXFP8, which needs a Blackwell GPU",
        ),
        "--overlap-param-gather-with-optimizer-step": (False, "rollouts need whole weights"),
        "--phase-transition-iterations": (
            None,
            "each phase reads other data, and a resumed run goes on with its own",
        ),
        "--rampup-batch-size": (
            None,
            "Megatron ignores it since 0.19, and --step-batch-size-schedule is in its place",
        ),
        "--freeze-all-layers": (False, "nothing would learn"),
        "--inprocess-restart": (False, "what RMT knows of a run ends with its process"),
        "--fake-process-group": (False, "ranks compare what they hold"),
    }
    for flag, (needed, why) in refused.items():
        value = getattr(args, flag[2:].replace("-", "_"), needed)
        if value != needed and not (needed is None and not value):
            without = "it left out" if needed is None else needed
            yield f"{flag} is {value}; RMT needs {without}: {why}."
    yield from _context_parallel(args)
    yield from layer_problems(args)
    yield from _shards(args)
    yield from _growing_batch(args)
    yield from _layout(args)
    yield from _windows(args)
    if args.num_experts:
        yield from routing_problems(args)
        yield from _biases_of_experts(args)
    if args.position_embedding_type not in ("rope", "yarn", "learned_absolute", "none"):
        yield (
            f"--position-embedding-type is {args.position_embedding_type}; RMT supports rope, "
            "yarn, learned_absolute and none."
        )
    if args.transformer_impl not in ("local", "transformer_engine"):
        yield (
            f"--transformer-impl is {args.transformer_impl}; RMT supports transformer_engine and "
            "local."
        )
    decay = Settings.of(args).baseline_decay
    if decay is not None and args.save and args.ckpt_format != "torch_dist":
        yield (
            f"--ckpt-format is {args.ckpt_format}; --rmt-baseline-decay {decay:g} saves an average "
            "with torch_dist."
        )


def _context_parallel(args: Namespace) -> Iterator[str]:
    """What context-parallel ranks cannot share yet."""
    ranks = args.context_parallel_size
    if ranks == 1:
        return
    if args.num_experts:
        yield (
            f"--context-parallel-size is {ranks}; RMT needs 1 with --num-experts: what the routers "
            "add to the loss is taken over whole trees."
        )
    if args.transformer_impl == "local" and args.eval_iters:
        yield (
            f"--eval-iters is {args.eval_iters}; with --context-parallel-size {ranks} and "
            "--transformer-impl local pass 0: Megatron's own attention does not share sequences."
        )


def _growing_batch(args: Namespace) -> Iterator[str]:
    """What Megatron finds out in the middle of a run whose batch grows, or takes from the smallest
    batch of the layout: the learning rate's schedule and the data of a run that is given in steps.
    """
    growth = getattr(args, "step_batch_size_schedule", None)
    if not growth:
        return
    given = f"--step-batch-size-schedule is {growth}"
    try:
        batches = batches_of_run(args)
    except (ValueError, AssertionError) as error:
        yield f"{given}: {_one_line(error)}."
        return
    sizes, taken = [size for _, size in batches], sum(steps * size for steps, size in batches)
    together = args.micro_batch_size * args.data_parallel_size
    if sizes != sorted(sizes) or any(size % together for size in sizes):
        yield (
            f"{given}, whose steps have {' then '.join(map(str, sizes))} samples; pass numbers "
            "that grow, and multiples of --micro-batch-size times data-parallel ranks "
            f"({together})."
        )
    elif args.train_iters:
        yield (
            f"{given} and --train-iters is {args.train_iters}, for which Megatron's learning rate "
            f"and data are those of {args.train_iters} steps of {together} sample(s); pass "
            f"--train-samples {taken} instead."
        )
    elif taken != args.train_samples:
        yield (
            f"{given} and --train-samples is {args.train_samples}, but the steps take {taken}; "
            f"pass {taken}, or {taken - sizes[-1]}, so that the last one finds its data."
        )


def _layout(args: Namespace) -> Iterator[str]:
    """Pipeline stages that would hold no parameter; a chunk of one may hold none. And layers of
    multi-token prediction that lie on another stage than the loss."""
    layout, stages = args.pipeline_model_parallel_layout, args.pipeline_model_parallel_size
    if not layout:
        return
    try:
        parts = PipelineParallelLayerLayout.parse_str_to_list(layout)
    except AssertionError as error:
        yield f"--pipeline-model-parallel-layout is {layout}: {_one_line(error)}."
        return
    empty = [stage for stage in range(stages) if not any(parts[stage::stages])]
    if empty:
        yield (
            f"--pipeline-model-parallel-layout is {layout}, which leaves nothing to pipeline stage "
            f"{empty[0]}; give each a layer, the embedding or the loss."
        )
    if any(LayerType.mtp in part for part in parts[:-1]):
        yield (
            f"--pipeline-model-parallel-layout is {layout}; put the layers of multi-token "
            "prediction (m) beside the loss (L): RMT takes both together."
        )


def _biases_of_experts(args: Namespace) -> Iterator[str]:
    """Megatron's local experts add their biases in place, to what autograd takes for a view where
    nothing was exchanged between ranks."""
    alone = args.expert_model_parallel_size == 1
    if args.add_bias_linear and args.transformer_impl == "local" and alone:
        yield (
            "--transformer-impl is local, whose experts cannot be trained with biases where "
            "--expert-model-parallel-size is 1; pass 2 or more, transformer_engine, or "
            "--disable-bias-linear."
        )


def _windows(args: Namespace) -> Iterator[str]:
    """Sliding windows that Megatron's layers read differently, or not at all."""
    window, layers = args.window_size, args.num_layers
    if window is None:
        return
    shown = ",".join(map(str, window))
    if len(window) != 2 or window[0] < 0 or window[1] != 0:
        yield (
            f"--window-size is {shown}; RMT needs N,0: a token sees itself and the N before it, "
            "and none behind it."
        )
    elif args.transformer_impl == "local" and args.masked_softmax_fusion:
        yield (
            f"--window-size is {shown}, which the fused softmax of --transformer-impl local does "
            "not know; pass --no-masked-softmax-fusion."
        )
    skip = args.window_attn_skip_freq
    if (isinstance(skip, list) and len(skip) != layers) or skip == 0:
        yield (
            f"--window-attn-skip-freq is {skip}; pass a number above 0, or a list of {layers} "
            "(--num-layers), 1 where a layer has a window."
        )


def _shards(args: Namespace) -> Iterator[str]:
    """Weights that are split further than tensor parallelism splits them."""
    tensor = args.tensor_model_parallel_size
    expert = getattr(args, "expert_tensor_parallel_size", None) or tensor
    for kind, ranks in (("tensor", tensor), ("expert_tensor", expert)):
        name = f"{kind}_parallel_num_weight_shards"
        shards = getattr(args, name, None)
        if shards not in (None, ranks):
            yield (
                f"--{name.replace('_', '-')} is {shards}; RMT needs it left out: rollouts need "
                "whole weights."
            )


def interleaving_problem(args: Namespace) -> str | None:
    """One sentence if a step's micro-batches cannot be dealt out to virtual pipeline stages, which
    Megatron finds out in the first update."""
    if args.virtual_pipeline_model_parallel_size is None:
        return None
    stages = args.pipeline_model_parallel_size
    together = args.microbatch_group_size_per_vp_stage or stages
    if together < stages:
        return (
            f"--microbatch-group-size-per-virtual-pipeline-stage is {together}; {stages} pipeline "
            f"stages need {stages} or more, or leave it out."
        )
    flag = "step-batch-size-schedule" if args.step_batch_size_schedule else "global-batch-size"
    sizes = [(f"--{flag}", size, args.micro_batch_size) for _, size in batches_of_run(args)]
    if args.eval_iters and args.eval_global_batch_size:
        own = (args.eval_global_batch_size, args.eval_micro_batch_size)
        sizes.append(("--eval-global-batch-size", *own))
    for flag, size, micro_batch_size in sizes:
        count = size // (micro_batch_size * args.data_parallel_size)
        if count < together or 0 < count % together < stages:
            return (
                f"{flag} is {size}, which is {count} micro-batches for each "
                f"data-parallel rank; virtual pipeline stages take {together} of them at a time "
                f"(--microbatch-group-size-per-virtual-pipeline-stage), and a rest of {stages} or "
                f"more: pass a multiple of "
                f"{together * micro_batch_size * args.data_parallel_size}."
            )
    return None


def _missing(args: Namespace) -> Iterator[str]:
    """What asks for packages that are not installed here."""
    if args.gradient_accumulation_fusion and find_spec("fused_weight_gradient_mlp_cuda") is None:
        # Megatron would say so on the last pipeline stage only, and the others would wait.
        whose = "layers have" if args.transformer_impl == "local" else "head has"
        yield (
            f"--transformer-impl is {args.transformer_impl}, whose {whose} the fused weight "
            "gradient of NVIDIA's apex, which is not installed; pass "
            "--no-gradient-accumulation-fusion (RMT never needs apex)."
        )
    for name in ("use_te_activation_func", "use_transformer_engine_op_fuser"):
        if args.transformer_impl == "local" and getattr(args, name, False):
            yield (
                f"--{name.replace('_', '-')} is on and --transformer-impl is local, whose layers "
                "have nothing of Transformer Engine; leave it out, or pass transformer_engine."
            )
    connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if args.pipeline_model_parallel_comm_backend == "ucc" and connections == "1":
        yield (
            "--pipeline-model-parallel-comm-backend is ucc, for which Megatron wants the "
            "environment's CUDA_DEVICE_MAX_CONNECTIONS above 1; set it, or pass nccl."
        )
    saves = args.save and not args.no_save_optim
    loads = args.load and not (args.finetune or args.no_load_optim)
    if args.use_distributed_optimizer and not HAVE_APEX_OR_TE and (saves or loads):
        yield (
            "--use-distributed-optimizer is on, whose saved state Megatron cannot load again with "
            "PyTorch's optimizers; leave it out, or install Transformer Engine."
        )


def _precision(args: Namespace) -> Iterator[str]:
    """FP8 and FP4: which recipes a loop that also generates can use, and sizes they ask for.

    Rollouts run the training model's own FP8 linears. Tensorwise and blockwise scale each product
    by what it holds. Delayed scaling takes its scale from a history that rollouts would write to.
    MXFP8 and FP4 are formats of Blackwell.
    """
    if getattr(args, "fp4", None):
        yield f"--fp4-format is {args.fp4}; it needs a Blackwell GPU: pass FP8 or bf16."
    if not getattr(args, "fp8", None):
        return
    reasons = {
        "delayed": "rollouts would leak into its scaling history",
        "mxfp8": "it needs a Blackwell GPU",
        "custom": "what it keeps between steps is not known",
    }
    if args.fp8_recipe in reasons:
        yield (
            f"--fp8-recipe is {args.fp8_recipe}; {reasons[args.fp8_recipe]}, pass blockwise or "
            "tensorwise."
        )
        return
    if args.transformer_impl != "transformer_engine":
        yield (
            f"--transformer-impl is {args.transformer_impl}; FP8 needs transformer_engine: pass "
            "it, or leave out --fp8-format."
        )
    if args.fp8_recipe == "blockwise" and _cuda_version() < (12, 9):
        yield (
            "--fp8-recipe is blockwise, which needs CUDA 12.9, and this PyTorch has CUDA "
            f"{torch.version.cuda}; pass tensorwise."
        )
    multiple = 128 if args.fp8_recipe == "blockwise" else 16
    tensor_parallel = args.tensor_model_parallel_size
    for flag, size, parts in _widths(args):
        own = size / parts
        if own % multiple:
            each = f" on each of {tensor_parallel} tensor-parallel ranks" if parts > 1 else ""
            yield (
                f"{flag} makes a linear layer {own:g} wide{each}; --fp8-recipe {args.fp8_recipe} "
                f"needs a multiple of {multiple}."
            )


def _cuda_version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", torch.version.cuda or "0")[:2])


def _widths(args: Namespace) -> Iterator[tuple[str, int, int]]:
    """(flag, width, ranks that share it) of the linear layers."""
    parts = args.tensor_model_parallel_size
    yield "--hidden-size", args.hidden_size, 1
    heads, width = args.num_attention_heads, args.kv_channels
    groups = args.num_query_groups if args.group_query_attention else heads
    yield "--num-attention-heads * --kv-channels", heads * width, parts
    yield "--num-query-groups * --kv-channels", (heads + 2 * groups) * width, parts
    if args.num_experts:
        experts = args.expert_tensor_parallel_size or 1
        yield "--moe-ffn-hidden-size", args.moe_ffn_hidden_size or args.ffn_hidden_size, experts
    else:
        yield "--ffn-hidden-size", args.ffn_hidden_size, parts


def _tracking(args: Namespace) -> Iterator[str]:
    """What Megatron finds wrong with wandb on the last rank only while others wait, or never."""
    if not getattr(args, "wandb_project", None):
        return
    if not args.wandb_exp_name:
        yield (
            f"--wandb-project is {args.wandb_project} and --wandb-exp-name is not set; name the "
            "run."
        )
    if not (args.wandb_save_dir or args.save):
        yield (
            f"--wandb-project is {args.wandb_project} and there is no folder for its files; pass "
            "--wandb-save-dir or --save."
        )
    if not args.tensorboard_dir:
        yield (
            f"--wandb-project is {args.wandb_project} and --tensorboard-dir is not set; Megatron "
            "sends its metrics to wandb only beside TensorBoard: pass --tensorboard-dir."
        )


def _vocabulary(args: Namespace) -> Iterator[str]:
    """Prompt, tokenizer, data and model against each other."""
    copy = Namespace(**vars(args))  # building a tokenizer pads the vocabulary of its arguments
    settings = Settings.of(args)
    named = f"--tokenizer-type {args.tokenizer_type} --tokenizer-model {args.tokenizer_model}"
    model = args.tokenizer_model
    if (
        model
        and (model.startswith((".", "/")) or model.count("/") > 1)
        and not Path(model).exists()
    ):
        # The Hugging Face hub would be asked for it, for a minute where there is no network.
        yield f"{named} cannot be read: there is no such file or folder."
        return
    try:
        tokenizer = build_tokenizer(copy)
    except Exception as error:
        yield f"{named} cannot be read: {_one_line(error)}."
        return
    try:
        vocabulary = len(token_bytes(tokenizer))
        check_ids_are_text(tokenizer)
    except ValueError as error:
        yield f"{named} does not suit RMT, which reads answers as text: {_one_line(error)}."
        return
    problems = [*data_problems(args, vocabulary)]
    yield from problems
    if settings.skip_sources and not problems:
        try:
            sources_of_run(args)
        except ValueError as error:
            yield str(error)
    try:
        prompt = read_prompt(settings, tokenizer)
    except ValueError as error:
        yield f"--rmt-template is {settings.template}; {_one_line(error)}."
        return
    problem = fitting_problem(args, settings, prompt)
    if problem:
        yield problem
    try:
        check_same_settings(args, prompt, stored_arguments(args))
    except ValueError as error:
        yield str(error)
    if prompt.end_of_document == NO_END_OF_DOCUMENT:
        needing = [flag for flag in _NEED_ENDS if getattr(args, flag[2:].replace("-", "_"), None)]
        if needing:
            yield (
                f"{named} has no token that ends a text, which {', '.join(needing)} cannot do "
                "without; set eos_token in its tokenizer_config.json and tokenize the corpus again."
            )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
