"""What one run of RMT needs in every step, built once: model, prompt, vocabulary, their limits."""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rmt.model.rotary import check_rotary_scaling
from megatron_rmt.model.tree_attention import check_backend
from megatron_rmt.model.visibility import attach_tree_attention
from megatron_rmt.prompt.grammar import ResponseGrammar
from megatron_rmt.prompt.prompt import (
    encode_prompt,
    longest_position,
    position_problem,
    prompt_template,
)
from megatron_rmt.prompt.template import Template
from megatron_rmt.prompt.token_bytes import token_bytes
from megatron_rmt.rollout.memory import GIB, CacheSize, key_value_bytes


@dataclass(frozen=True)
class MidTraining:
    """What one run needs in every step: model, prompt, vocabulary.

    template: with the chat markers in place. bytes_of: bytes of each token id. has_bytes:
    ``[vocab]`` bool, False for special tokens. preamble, close: token ids. stop: token ids that end
    a response. longest_position: above every position id.
    """

    args: Namespace
    model: GPTModel
    template: Template
    tokenizer: Any
    bytes_of: list[bytes]
    has_bytes: Tensor
    grammar: ResponseGrammar
    preamble: list[int]
    close: list[int]
    stop: list[int]
    longest_position: int
    seed: int

    @property
    def vocab_size(self) -> int:
        """Columns of the vocabulary that are tokens."""
        return len(self.bytes_of)

    def stem(self, budget: int) -> list[int]:
        """Token ids of the stem that asks for ``budget`` tokens."""
        return encode_prompt(self.tokenizer, self.template.stem_text(budget))


def prepare(args: Namespace, model: GPTModel, tokenizer: Any) -> MidTraining:
    """Attach tree attention to ``model`` and read the vocabulary and the prompt.

    Raises:
        ValueError: --rope-scaling-factor did not reach the model, the prompt and the longest
            thought do not fit, the vocabularies disagree, --rmt-attention cannot train on the
            model's device, or --rmt-max-tokens is less than what a micro-batch holds before the
            rollouts.
    """
    check_rotary_scaling(args, model)
    attach_tree_attention(model)
    device = next(model.parameters()).device
    check_backend(args.rmt_attention, device)
    template = prompt_template(args, tokenizer)
    bytes_of = token_bytes(tokenizer)
    if len(bytes_of) > args.padded_vocab_size:
        raise ValueError(
            f"--tokenizer-model has {len(bytes_of)} tokens but the model only "
            f"{args.padded_vocab_size} rows of embedding; pass the tokenizer of the checkpoint."
        )
    stop = sorted({int(i) for i in (tokenizer.eod, _eos(tokenizer)) if i is not None})
    preamble = encode_prompt(tokenizer, template.head)
    held = args.micro_batch_size * (args.seq_length + len(preamble))
    if args.rmt_max_tokens is not None and args.rmt_max_tokens < held:
        raise ValueError(
            f"--rmt-max-tokens is {args.rmt_max_tokens}, but {args.micro_batch_size} samples of "
            f"{args.seq_length} tokens and their prompt take {held} before any rollout; raise it "
            "or lower --micro-batch-size (which gives more micro-batches) or --seq-length."
        )
    training = MidTraining(
        args=args,
        model=model,
        template=template,
        tokenizer=tokenizer,
        bytes_of=bytes_of,
        has_bytes=torch.tensor([len(text) > 0 for text in bytes_of]),
        grammar=ResponseGrammar(template, bytes_of, stop).to(device),
        preamble=preamble,
        close=encode_prompt(tokenizer, template.close),
        stop=stop,
        longest_position=longest_position(args, tokenizer, template),
        seed=args.seed if args.rmt_seed is None else args.rmt_seed,
    )
    problem = position_problem(args, training.longest_position)
    if problem:
        raise ValueError(problem)
    _plan_memory(training)
    return training


def kv_bound(args: Namespace) -> int | None:
    """``--rmt-rollout-kv-gib`` in bytes."""
    return None if args.rmt_rollout_kv_gib is None else int(args.rmt_rollout_kv_gib * GIB)


def _plan_memory(training: MidTraining) -> None:
    """Print what the rollouts' keys and values will take at the longest thoughts.

    Raises:
        ValueError: they cannot fit into ``--rmt-rollout-kv-gib``, or, without it, into the device.
    """
    args = training.args
    budget = max(args.rmt_initial_budget, args.rmt_minimum_budget)
    samples = args.global_batch_size // parallel_state.get_data_parallel_world_size()
    size = CacheSize(
        token_bytes=key_value_bytes(training.model),
        trunk_tokens=samples * (args.seq_length + len(training.preamble)),
        rows=samples * args.rmt_positions_per_sample * args.rmt_group_size,
        rows_per_position=args.rmt_group_size,
        tail_tokens=len(training.stem(budget))
        + 2 * budget
        + len(training.close) * args.rmt_force_close
        + args.rmt_answer_tokens,
        in_flight=parallel_state.get_pipeline_model_parallel_world_size(),
    )
    bound = kv_bound(args)
    at_once = size.positions_at_once(bound)
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if bound is None and size.total_bytes > memory:
        raise ValueError(
            f"the keys and values of the rollouts take {size.total_bytes / GIB:.1f} GiB "
            f"({size.describe()}) but the device has {memory / GIB:.1f} GiB; pass "
            "--rmt-rollout-kv-gib, so that they are generated in waves that fit."
        )
    waves = max(1, -(-size.positions // at_once))
    if dist.get_rank() == 0:
        print(
            f"RMT: keys and values of a step's rollouts, a rank, at most: {size.describe()}; "
            f"{waves} wave(s) of {min(at_once, size.positions)} positions.",
            flush=True,
        )


def _eos(tokenizer: Any) -> int | None:
    try:
        return tokenizer.eos
    except (AttributeError, NotImplementedError):
        return None
