"""What a plan is made from: a run's flags, and what its tokenizer, model and corpus say.

Flags are read by Megatron's own parser with RMT's group. What Megatron would derive from them when
a run starts, with a device at hand, is derived here in the same way, as far as a plan needs it.
"""

import io
import json
import math
import os
import shlex
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.arguments import add_megatron_arguments

from conversion.huggingface_directory import TOKENIZERS
from conversion.model_config import megatron_flags, read_config
from examples.recipe import recipe_flags
from megatron_rmt.cpu.platform import add_required_flags
from megatron_rmt.job.settings import add_rmt_arguments
from megatron_rmt.prompt.prompt import encode_prompt, position_problem, prompt_template
from megatron_rmt.prompt.template import Template, load_template
from megatron_rmt.prompt.token_bytes import token_bytes
from planning.work import Documents, Lengths, documents_in_samples

# Without a tokenizer: letters of English to a token, and tokens of a chat's markers.
LETTERS_PER_TOKEN, CHAT_TOKENS = 4, 24
FLAGS = "model_flags.txt"
# What every plan refuses, because RMT does.
_UNSUPPORTED = {
    "context_parallel_size": 1,
    "num_layers_per_virtual_pipeline_stage": None,
    "num_virtual_stages_per_pipeline_rank": None,
    "multi_latent_attention": False,
    "hybrid_layer_pattern": None,
}


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


@dataclass(frozen=True)
class Prompt:
    """The prompt's pieces and their lengths. tokenizer: None where none is at hand; lengths then
    are estimates from the number of letters. vocabulary: its tokens."""

    template: Template
    tokenizer: Any = None
    vocabulary: int | None = None
    chat_tokens: int = 0

    def tokens(self, text: str) -> int:
        if self.tokenizer is not None:
            return len(encode_prompt(self.tokenizer, text))
        return math.ceil(len(text) / LETTERS_PER_TOKEN)

    @property
    def head(self) -> int:
        return self.tokens(self.template.head) + (self.chat_tokens if self.template.head else 0)

    @property
    def close(self) -> int:
        # An estimate would say 2, but models that reason have a token for it.
        return self.tokens(self.template.close) if self.tokenizer is not None else 1

    def stem(self, budget: int) -> int:
        added = 0 if self.template.head else self.chat_tokens
        return self.tokens(self.template.stem_text(budget)) + added


def read_prompt(args: Namespace) -> Prompt:
    """The prompt of ``args``, by its tokenizer where that is on this machine.

    Raises:
        ValueError: there is no such template, or it and the tokenizer do not go together.
    """
    folder = args.tokenizer_model
    if folder and Path(folder).exists():
        with redirect_stdout(io.StringIO()):
            # Building a tokenizer pads the vocabulary of its arguments.
            padded = Namespace(**vars(args) | {"rank": 1, "padded_vocab_size": None})
            tokenizer = build_tokenizer(padded)
        return Prompt(prompt_template(args, tokenizer), tokenizer, len(token_bytes(tokenizer)))
    template = load_template(args.rmt_template)
    chats = template.answer == "boxed" and not args.rmt_no_chat
    return Prompt(template, chat_tokens=CHAT_TOKENS if chats else 0)


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
    layers_per_stage, query_width, key_width (of all heads, in numbers), params_bytes,
    gradient_bytes, head_columns (of the vocabulary without padding), true_vocab_size, on_cpu, and
    the names of ``TransformerConfig`` that ``packing.tree_cost`` reads.

    Raises:
        ValueError: a flag is missing, or sizes do not divide.
    """
    args = Namespace(**vars(given))
    for name, needed in _UNSUPPORTED.items():
        if getattr(args, name, needed) != needed:
            raise ValueError(f"{_flag(name)} is {getattr(args, name)}; RMT does not run with it.")
    if args.rmt_no_rl:
        raise ValueError("--rmt-no-rl is plain pre-training; a plan is of RMT: leave it out.")
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        if getattr(args, name) is None:
            raise ValueError(f"{_flag(name)} is not set; name the model: --model or --model-flags.")
    for name in ("seq_length", "micro_batch_size"):
        if getattr(args, name) is None:
            raise ValueError(f"{_flag(name)} is not set; pass it as to the run.")
    for name in ("rmt_positions_per_sample", "rmt_group_size", "rmt_answer_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"{_flag(name)} is {getattr(args, name)}; pass 1 or more.")
    args.world_size, args.on_cpu = world_size, on_cpu
    _derive_layout(args)
    _derive_model(args, prompt)
    half = args.bf16 or args.fp16
    args.params_bytes = 2 if half else 4
    reduced_in_half = args.fp16 and not args.accumulate_allreduce_grads_in_fp32
    args.gradient_bytes = 2 if args.grad_reduce_in_bf16 or reduced_in_half else 4
    args.apply_rope_fusion = args.apply_rope_fusion and args.transformer_impl != "local"
    if args.train_iters is None:
        if not args.train_samples:
            raise ValueError("--train-iters is not set; the budget decays over them: pass it.")
        args.train_iters = args.train_samples // args.global_batch_size
    needed = args.seq_length + prompt.head + prompt.stem(args.rmt_initial_budget)
    needed += 2 * args.rmt_initial_budget + 2 * prompt.close + args.rmt_answer_tokens + 16
    problem = position_problem(args, needed)
    if problem:
        raise ValueError(problem)
    held = args.micro_batch_size * (args.seq_length + prompt.head)
    if args.rmt_max_tokens is not None and args.rmt_max_tokens < held:
        raise ValueError(
            f"--rmt-max-tokens is {args.rmt_max_tokens}, but a micro-batch has {held} tokens "
            "before any rollout; raise it, or lower --micro-batch-size or --seq-length."
        )
    return args


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _derive_layout(args: Namespace) -> None:
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    if args.world_size < 1 or args.world_size % (tp * pp):
        raise ValueError(
            f"--world-size is {args.world_size}, not a multiple of --tensor-model-parallel-size "
            f"{tp} times --pipeline-model-parallel-size {pp}; change one of them."
        )
    args.data_parallel_size = args.world_size // (tp * pp)
    args.expert_tensor_parallel_size = args.expert_tensor_parallel_size or tp
    of_experts = args.expert_model_parallel_size * args.expert_tensor_parallel_size * pp
    if args.world_size % of_experts:
        raise ValueError(
            f"--world-size is {args.world_size}, not a multiple of the {of_experts} ranks that "
            "--expert-model-parallel-size, --expert-tensor-parallel-size and "
            "--pipeline-model-parallel-size ask for; change one of them."
        )
    args.expert_data_parallel_size = args.world_size // of_experts
    at_once = args.micro_batch_size * args.data_parallel_size
    args.global_batch_size = args.global_batch_size or at_once
    if args.global_batch_size % at_once:
        raise ValueError(
            f"--global-batch-size is {args.global_batch_size}, not a multiple of "
            f"--micro-batch-size {args.micro_batch_size} times {args.data_parallel_size} "
            "data-parallel ranks; change one of them."
        )
    args.micro_batches = args.global_batch_size // at_once
    for name, parts, flag in (
        ("num_layers", pp, "pipeline_model_parallel_size"),
        ("num_attention_heads", tp, "tensor_model_parallel_size"),
        ("num_experts", args.expert_model_parallel_size, "expert_model_parallel_size"),
    ):
        if (getattr(args, name) or 0) % parts:
            raise ValueError(
                f"{_flag(name)} is {getattr(args, name)}, not a multiple of {_flag(flag)} {parts}; "
                "change the latter."
            )
    args.layers_per_stage = args.num_layers // pp


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
    known = args.vocab_size or args.padded_vocab_size or prompt.vocabulary
    if known is None:
        raise ValueError("--vocab-size is not set and no tokenizer is here; pass it.")
    args.true_vocab_size = known
    if args.padded_vocab_size is None:
        multiple = args.make_vocab_size_divisible_by * tp
        args.padded_vocab_size = -(-known // multiple) * multiple
    args.head_columns = prompt.vocabulary or known


def on_this_cpu(words: Sequence[str]) -> list[str]:
    """``words`` with the flags that a run without CUDA adds by itself."""
    return add_required_flags(words)


def lengths_of_step(
    args: Namespace, prompt: Prompt, budget: int, thought: float, answer: float, warm_up: bool
) -> tuple[Lengths, float, float]:
    """(lengths, longest response, tokens that its keys and values are allocated for) of a step.

    thought: mean length, cut at the bound where generation stops.
    """
    bound = budget if warm_up else 2 * budget
    closes = args.rmt_force_close or warm_up
    thought = min(thought, bound)
    response = thought + prompt.close + answer
    if thought >= bound and not closes:
        # Given up there, without an end of thought or an answer.
        response = float(bound)
    allocated = bound + args.rmt_answer_tokens + prompt.close * closes
    longest = bound + prompt.close + answer
    return Lengths(prompt.head, prompt.stem(budget), response), max(response, longest), allocated
