"""What a plan is made from: a run's flags, and what its tokenizer, model and corpus say.

Flags are read by Megatron's own parser with RMT's group. What Megatron would derive from them when
a run starts, with a device at hand, is derived here in the same way, as far as a plan needs it.
"""

import dataclasses
import io
import json
import math
import os
import shlex
import tempfile
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.training.arguments import add_megatron_arguments

from conversion.huggingface_directory import TOKENIZERS
from conversion.model_config import megatron_flags, read_config
from examples.recipe import recipe_flags
from megatron_rmt.algorithm.schedules import Schedule
from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.job.settings import add_rmt_arguments, setting_problems
from megatron_rmt.job.validation import interleaving_problem, unsupported
from megatron_rmt.mid_training import fitting_problem, largest_batch_size, read_prompt, steps_of_run
from megatron_rmt.prompt.prompt import Prompt
from megatron_rmt.prompt.template import load_template
from model_on_hand import FLAGS
from planning.work import Documents, Lengths, documents_in_samples

# Without a tokenizer: letters of English to a token, and tokens of a chat's markers.
LETTERS_PER_TOKEN, CHAT_TOKENS = 4, 24


def model_words(model: Path | None, model_flags: Path | None, recipe: Path | None) -> list[str]:
    """Megatron's flags of the model that is named, or that lies beside the recipe; else none.

    Raises:
        ValueError: a file is missing or describes no model that the converter knows.
    """
    if model and model_flags:
        raise ValueError("--model and --model-flags both name a model; pass one of them.")
    if model_flags:
        path = model_flags / FLAGS if model_flags.is_dir() else model_flags
        if not path.is_file():
            raise ValueError(f"--model-flags is {model_flags}, but there is no file {path}.")
        return shlex.split(path.read_text(encoding="utf-8"), comments=True)
    beside = recipe.with_suffix(".json") if recipe else None
    if model is None and "CHECKPOINT" not in os.environ and beside and beside.is_file():
        model = beside
    if model is None:
        return []
    path = model / "config.json" if model.is_dir() else model
    try:
        words = megatron_flags(read_config(json.loads(path.read_text(encoding="utf-8"))))
    except OSError:
        raise ValueError(f"--model is {model}, but {path} cannot be read.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"--model is {model}, but {path} is not JSON: {error}.") from None
    if any((path.parent / name).is_file() for name in TOKENIZERS):
        words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(path.parent)]
    return words


def parse_flags(recipe: Path | None, words: Sequence[str], model: Sequence[str]) -> Namespace:
    """The flags of ``model``, then of ``recipe``, then ``words``, which win, as Megatron has them.

    Raises:
        ValueError: a recipe cannot be read, or a flag is unknown or wrong.
    """
    with tempfile.TemporaryDirectory() as empty:
        environment = {"DATA": "DATA"} | os.environ
        if model:
            Path(empty, FLAGS).touch()
            environment["CHECKPOINT"] = empty
        of_recipe: list[str] = []
        if recipe:
            try:
                of_recipe = recipe_flags(recipe, words, environment)
            except ValueError as error:
                if "variable CHECKPOINT" not in str(error):
                    raise
                raise ValueError(f"{error} Or name it by --model or --model-flags.") from None
    parser = ArgumentParser(allow_abbrev=False)
    # Megatron speaks of what it looks for.
    with redirect_stdout(io.StringIO()):
        parser = add_rmt_arguments(add_megatron_arguments(parser))

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"{message}; pass Megatron's and RMT's flags as to a run.")

    parser.error = refuse
    args, unknown = parser.parse_known_args([*model, *of_recipe, *words])
    if unknown:
        refuse(f"unknown: {' '.join(unknown)}")
    return args


def prompt_of(args: Namespace) -> Prompt:
    """The prompt of ``args``, by its tokenizer where that is on this machine, else an estimate.

    Raises:
        ValueError: there is no such template, or it and the tokenizer do not go together.
    """
    settings, folder = Settings.of(args), args.tokenizer_model
    if folder and Path(folder).exists():
        with redirect_stdout(io.StringIO()):
            # Building a tokenizer pads the vocabulary of its arguments.
            padded = Namespace(**vars(args) | {"rank": 1, "padded_vocab_size": None})
            return read_prompt(settings, build_tokenizer(padded))
    template = load_template(settings.template)
    if template.answer == "boxed" and not settings.no_chat:
        markers = "." * (CHAT_TOKENS * LETTERS_PER_TOKEN)
        where = "head" if template.head else "stem"
        template = dataclasses.replace(template, **{where: markers + getattr(template, where)})

    def encode(text: str) -> list[int]:
        # An estimate would say 2 for its end, but models that reason have a token for it.
        count = 1 if text == template.close else math.ceil(len(text) / LETTERS_PER_TOKEN)
        return [0] * count

    return Prompt(
        template=template,
        encode=encode,
        bytes_of=[],
        stop=[],
        end_of_document=0,
        answer_tokens=settings.answer_tokens,
        force_close=settings.force_close,
    )


def is_counted(prompt: Prompt) -> bool:
    """Whether a tokenizer gave the prompt's lengths; else they are estimates from its letters."""
    return len(prompt.bytes_of) > 0


def corpus_documents(args: Namespace, document_tokens: int | None) -> tuple[Documents, str]:
    """The documents of a mean sample, and where their lengths are from."""
    lengths: Sequence[int] | np.ndarray = [args.seq_length]
    if not args.reset_attention_mask:
        source = "documents see each other (no --reset-attention-mask)"
    elif document_tokens:
        lengths, source = [document_tokens], f"documents of {document_tokens} tokens"
    elif found := _indexed(args.data_path or []):
        # The lengths lie in a mapped file, which is closed with the data set: keep that, and copy.
        dataset = IndexedDataset(found)
        lengths = dataset.sequence_lengths.copy()
        source = f"{len(lengths)} documents of {found}"
    else:
        source = "one document in each sample (no --data-path here; see --document-tokens)"
    return documents_in_samples(lengths, args.seq_length), source


def _indexed(words: Sequence[str]) -> str | None:
    """The first of ``--data-path`` that is a pair of token files here."""
    found = (w for w in words if Path(f"{w}.idx").is_file() and Path(f"{w}.bin").is_file())
    return next(found, None)


def complete_settings(given: Namespace, world_size: int, on_cpu: bool, prompt: Prompt) -> Namespace:
    """A copy of ``given`` with what Megatron derives, and what the other modules read besides.

    Added: world_size, data_parallel_size, expert_data_parallel_size, micro_batches,
    layers_per_stage, chunks (of the model on a rank), query_width, key_width (of all heads, in
    numbers), params_bytes, gradient_bytes, head_columns (of the vocabulary without padding),
    true_vocab_size, on_cpu, and the names of ``TransformerConfig`` that ``packing.tree_cost``
    reads.

    Raises:
        ValueError: a flag is missing, RMT refuses it, or sizes do not divide or fit.
    """
    args = Namespace(**vars(given))
    settings = Settings.of(args)
    if settings.no_rl:
        raise ValueError("--rmt-no-rl is plain pre-training; a plan is of RMT: leave it out.")
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        if getattr(args, name) is None:
            raise ValueError(f"{_flag(name)} is not set; name the model: --model or --model-flags.")
    for name in ("seq_length", "micro_batch_size"):
        if getattr(args, name) is None:
            raise ValueError(f"{_flag(name)} is not set; pass it as to the run.")
    problems = [*setting_problems(args), *unsupported(args)]
    ranks = args.context_parallel_size
    if ranks > 1:
        problems.append(f"--context-parallel-size is {ranks}; a plan is of 1, which it counts.")
    for name in ("multi_latent_attention", "mtp_num_layers"):
        if getattr(args, name):
            problems.append(f"{_flag(name)} is {getattr(args, name)}; a plan does not count it.")
    if args.hybrid_layer_pattern:
        problems.append(
            f"--hybrid-layer-pattern is {args.hybrid_layer_pattern}; a plan is of like layers."
        )
    if problems:
        raise ValueError(" ".join(problems))
    args.world_size, args.on_cpu = world_size, on_cpu
    _derive_layout(args)
    _derive_model(args, prompt)
    half = args.bf16 or args.fp16
    args.params_bytes = 2 if half else 4
    reduced_in_half = args.fp16 and not args.accumulate_allreduce_grads_in_fp32
    args.gradient_bytes = 2 if args.grad_reduce_in_bf16 or reduced_in_half else 4
    args.apply_rope_fusion = args.apply_rope_fusion and args.transformer_impl != "local"
    problem = fitting_problem(args, settings, prompt) or interleaving_problem(args)
    if problem:
        raise ValueError(problem)
    return args


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _derive_layout(args: Namespace) -> None:
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    args.expert_tensor_parallel_size = args.expert_tensor_parallel_size or tp
    experts = args.expert_model_parallel_size
    of_experts = experts * args.expert_tensor_parallel_size * pp
    args.data_parallel_size = args.world_size // (tp * pp)
    args.expert_data_parallel_size = args.world_size // of_experts
    at_once = args.micro_batch_size * args.data_parallel_size
    args.global_batch_size = args.global_batch_size or at_once
    args.train_iters, args.global_batch_size = steps_of_run(args), largest_batch_size(args)
    tensor, pipeline = f"--tensor-model-parallel-size {tp}", f"--pipeline-model-parallel-size {pp}"
    three = "--expert-model-parallel-size, --expert-tensor-parallel-size and "
    three += "--pipeline-model-parallel-size"
    batch = f"--micro-batch-size {args.micro_batch_size} times {args.data_parallel_size}"
    for name, parts, of in (
        ("world_size", tp * pp, f"{tensor} times {pipeline}"),
        ("world_size", of_experts, f"the {of_experts} ranks that {three} ask for"),
        ("global_batch_size", at_once, f"{batch} data-parallel ranks"),
        ("num_layers", pp, pipeline),
        ("num_attention_heads", tp, tensor),
        ("num_experts", experts, f"--expert-model-parallel-size {experts}"),
    ):
        value = getattr(args, name)
        if value is not None and (value < parts or value % parts):
            raise ValueError(
                f"{_flag(name)} is {value}, not a multiple of {of}; change one of them."
            )
    args.micro_batches = args.global_batch_size // at_once
    args.layers_per_stage = args.num_layers // pp
    args.chunks = _chunks(args)
    args.virtual_pipeline_model_parallel_size = args.chunks if args.chunks > 1 else None


def _chunks(args: Namespace) -> int:
    """Of the model on a rank; several with virtual pipeline stages."""
    layout = args.pipeline_model_parallel_layout
    if layout:
        stages = PipelineParallelLayerLayout.get_num_stages_from_str(layout)
        return stages // args.pipeline_model_parallel_size
    for name in ("num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage"):
        value = getattr(args, name)
        if value is not None and (value < 1 or args.layers_per_stage % value):
            raise ValueError(
                f"{_flag(name)} is {value}, and does not divide the {args.layers_per_stage} layers "
                "of a pipeline stage; change one of them."
            )
    layers = args.num_layers_per_virtual_pipeline_stage
    if layers is not None:
        return args.layers_per_stage // layers
    return args.num_virtual_stages_per_pipeline_rank or 1


def _derive_model(args: Namespace, prompt: Prompt) -> None:
    args.gated_linear_unit = args.swiglu
    args.num_moe_experts = args.num_experts
    args.kv_channels = args.kv_channels or args.hidden_size // args.num_attention_heads
    if args.ffn_hidden_size is None:
        width = 4 * args.hidden_size
        args.ffn_hidden_size = int(width * 2 / 3 / 64) * 64 if args.swiglu else width
    args.moe_ffn_hidden_size = args.moe_ffn_hidden_size or args.ffn_hidden_size
    if not args.group_query_attention:
        args.num_query_groups = args.num_attention_heads
    tp = args.tensor_model_parallel_size
    if args.num_query_groups % tp and tp % args.num_query_groups:
        raise ValueError(
            f"--num-query-groups is {args.num_query_groups}; it and --tensor-model-parallel-size "
            f"{tp} must divide one another: change the latter."
        )
    args.query_width = args.num_attention_heads * args.kv_channels
    args.key_width = args.num_query_groups * args.kv_channels
    known = args.vocab_size or args.padded_vocab_size or len(prompt.bytes_of)
    if not known:
        raise ValueError("--vocab-size is not set and no tokenizer is here; pass it.")
    args.true_vocab_size = known
    if args.padded_vocab_size is None:
        multiple = args.make_vocab_size_divisible_by * tp
        args.padded_vocab_size = -(-known // multiple) * multiple
    args.head_columns = len(prompt.bytes_of) or known


@dataclass(frozen=True)
class StepLengths:
    """Tokens of one step's prompts and responses. budget, thought: means over the tiers, as lengths
    are. longest: response. passes: of decoding, one after the other; positions that are asked for
    as much are decoded together. allocated: of a response, for its keys and values."""

    lengths: Lengths
    budget: float
    thought: float
    longest: float
    passes: float
    allocated: int


def lengths_of_step(
    prompt: Prompt, schedule: Schedule, thought: Callable[[int, int], float], answer: float
) -> StepLengths:
    """The lengths of a step in which every tier holds the share of positions that is asked of it.

    thought: mean length by budget and by the bound where generation stops, which cuts it. answer:
    mean length.
    """
    shares: Counter[int] = Counter()
    for budget, share in zip(
        schedule.tier_budgets, schedule.probabilities or (1, 1, 1), strict=True
    ):
        shares[budget] += share
    total, means, longest, allocated = sum(shares.values()), np.zeros(4), [], []
    for budget, share in shares.items():
        bound = prompt.bound(budget, warm_up=schedule.warm_up)
        after = len(prompt.close) + answer
        own = min(bound.thought, thought(budget, bound.thought))
        response = own + after
        if own >= bound.thought and not bound.close:
            # Given up there, without an end of thought or an answer.
            response = float(bound.thought)
        means += share / total * np.array([len(prompt.stem(budget)), response, budget, own])
        longest.append(max(response, bound.thought + after))
        allocated.append(bound.tokens)
    stem, response, budget, own = means.tolist()
    return StepLengths(
        lengths=Lengths(len(prompt.preamble), stem, response),
        budget=budget,
        thought=own,
        longest=max(longest),
        passes=sum(max(0.0, of_budget - 1) for of_budget in longest),
        allocated=max(allocated),
    )
