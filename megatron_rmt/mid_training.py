"""What one run of RMT needs in every step, built once: settings, model, prompt, their limits."""

import dataclasses
import itertools
import math
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_rmt.algorithm.curriculum import SELECTIONS, Selection, has_reserve
from megatron_rmt.algorithm.doors import find
from megatron_rmt.algorithm.losses import LOSSES, TokenLoss
from megatron_rmt.algorithm.rewards import REWARDS, Reward, needs_answer
from megatron_rmt.algorithm.schedules import Schedule, longest_budgets
from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.model.gpt import Model, Policy
from megatron_rmt.model.rotary import check_rotary_scaling
from megatron_rmt.model.routers import check_routing
from megatron_rmt.model.tree_attention import check_backend
from megatron_rmt.model.visibility import attach_tree_attention
from megatron_rmt.prompt.prompt import Prompt
from megatron_rmt.rollout.generate import tells_limits
from megatron_rmt.rollout.memory import GIB, CacheSize, in_bytes, key_value_bytes
from megatron_rmt.rollout.state_cache import NO_STATES, StateBytes, state_bytes
from megatron_rmt.update.baseline import Baseline

# The settings that may name a function of the user's own, and ours by name.
DOORS = {"reward": REWARDS, "select": SELECTIONS, "loss": LOSSES}


@dataclass(frozen=True)
class MidTraining:
    """args: Megatron's. baseline: of ``--rmt-baseline-decay``, None without it. reward, select,
    loss: what ``--rmt-reward``, ``--rmt-select`` and ``--rmt-loss`` name. seed: of positions and
    rollouts."""

    args: Namespace
    settings: Settings
    policy: Policy
    prompt: Prompt
    baseline: Baseline | None
    reward: Reward
    select: Selection
    loss: TokenLoss
    seed: int


def positions_drawn(settings: Settings, select: Selection, schedule: Schedule) -> int:
    """Most positions rolled out in a sample: those trained, and the reserve. In the warm-up no
    reward decides between them, so there is none."""
    reserve = 0 if schedule.warm_up else reserve_positions(settings, select)
    return schedule.positions_per_sample + reserve


def reserve_positions(settings: Settings, select: Selection) -> int:
    """Positions that ``select`` draws in each sample beyond those that are trained."""
    if not has_reserve(select):
        return 0
    given = settings.reserve_positions
    return settings.positions_per_sample if given is None else given


def prepare(args: Namespace, model: Model, tokenizer: Any) -> MidTraining:
    """Attach tree attention to ``model`` and read the vocabulary and the prompt.

    Raises:
        ValueError: --rope-scaling-factor did not reach the model, its routers are refused, the
            prompt and the longest thought do not fit, the vocabularies disagree, --rmt-attention
            cannot train on the model's device, or --rmt-max-tokens is less than what a micro-batch
            holds before the rollouts.
    """
    settings = Settings.of(args)
    check_rotary_scaling(args, model)
    check_routing(model.config)
    attach_tree_attention(model)
    device = next(model.parameters()).device
    check_backend(settings.attention, device)
    prompt = as_rank_0_rendered(read_prompt(settings, tokenizer))
    problem = fitting_problem(args, settings, prompt)
    if problem:
        raise ValueError(problem)
    decay = settings.baseline_decay
    run = MidTraining(
        args=args,
        settings=settings,
        policy=Policy(
            model=model,
            vocab_size=len(prompt.bytes_of),
            longest_position=longest_position(args.seq_length, settings, prompt),
            head_chunk_size=rows_at_once(settings, device),
            attention=settings.attention,
        ),
        prompt=prompt,
        baseline=None if decay is None else Baseline(model, decay),
        **{name: find(f"--rmt-{name}", getattr(settings, name), DOORS[name]) for name in DOORS},
        seed=args.seed if settings.seed is None else settings.seed,
    )
    _announce_answers(prompt)
    _announce_memory(run)
    return run


def rows_at_once(settings: Settings, device: torch.device) -> int:
    """Rows of the head's logits held at a time on ``device``: a GPU wants few launches, and reads
    and writes the weight's gradient, GBs of it, once for each chunk."""
    return settings.head_chunk_size or (384 if device.type == "cpu" else 4096)


def read_prompt(settings: Settings, tokenizer: Any) -> Prompt:
    """The prompt that the settings ask for, by Megatron's ``tokenizer``.

    Raises:
        ValueError: see ``Prompt.of``; --rmt-reward names nothing.
    """
    reward = find("--rmt-reward", settings.reward, REWARDS)
    return Prompt.of(
        tokenizer,
        settings.template,
        chat=not settings.no_chat,
        answer_tokens=settings.answer_tokens if needs_answer(reward) else 0,
        force_close=settings.force_close,
        target_tokens=settings.target_tokens,
    )


def as_rank_0_rendered(prompt: Prompt) -> Prompt:
    """The prompt with the texts of rank 0: a chat template may write the time, and ranks that start
    round midnight would ask with different ones. Collective over all ranks."""
    texts = [prompt.rendering()]
    dist.broadcast_object_list(texts)
    return dataclasses.replace(prompt, template=dataclasses.replace(prompt.template, **texts[0]))


def longest_position(seq_length: int, settings: Settings, prompt: Prompt) -> int:
    """A bound on every position id: a sample behind its preamble, stem and response."""
    budgets = longest_budgets(settings)
    tail = prompt.longest_tail(budgets, settings.warmup_iters > 0)
    # A reward may ask for the truth behind the longest thought, whose end is then written.
    closed_thought = max(len(prompt.stem(own)) + 2 * own for own in budgets)
    closed_thought += len(prompt.close) + prompt.target_tokens - 1
    return seq_length + len(prompt.preamble) + max(tail, closed_thought)


def fitting_problem(args: Namespace, settings: Settings, prompt: Prompt) -> str | None:
    """One sentence if vocabulary, position ids or micro-batches do not hold what a run needs."""
    if args.padded_vocab_size is not None and len(prompt.bytes_of) > args.padded_vocab_size:
        return (
            f"--tokenizer-model has {len(prompt.bytes_of)} tokens but the model only "
            f"{args.padded_vocab_size} rows of embedding (--padded-vocab-size); pass the tokenizer "
            "of the checkpoint."
        )
    needed = longest_position(args.seq_length, settings, prompt)
    limit = args.max_position_embeddings
    if args.position_embedding_type != "none" and limit is not None and needed > limit:
        return (
            f"--max-position-embeddings is {limit} but a sample of {args.seq_length} tokens, the "
            f"prompt and 2 * {max(longest_budgets(settings))} tokens of thought with their answer "
            f"take {needed}; lower --rmt-initial-budget or --seq-length, or raise "
            "--max-position-embeddings if the model allows."
        )
    held = args.micro_batch_size * (args.seq_length + len(prompt.preamble))
    if settings.max_tokens is not None and settings.max_tokens < held:
        return (
            f"--rmt-max-tokens is {settings.max_tokens}, but {args.micro_batch_size} samples of "
            f"{args.seq_length} tokens and their prompt take {held} before any rollout; raise it "
            "or lower --micro-batch-size (which gives more micro-batches) or --seq-length."
        )
    return None


def largest_batch_size(args: Namespace) -> int:
    """Samples of the run's largest step, to which a ``--step-batch-size-schedule`` may grow."""
    return max(samples for _, samples in batches_of_run(args))


def steps_of_run(args: Namespace) -> int:
    """``--train-iters``, or what Megatron makes of ``--train-samples`` once the model is built."""
    return args.train_iters or sum(steps for steps, _ in batches_of_run(args))


def batches_of_run(args: Namespace) -> list[tuple[int, int]]:
    """(steps, samples in each) of the run, in order; several with a
    ``--step-batch-size-schedule``."""
    steps = args.train_iters
    if not getattr(args, "step_batch_size_schedule", None):
        size = args.global_batch_size
        return [(args.train_samples // size if steps is None else steps, size)]
    # Imported here, as it is looked for when the patches are installed.
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

    schedule = StepBatchsizeNumMicroBatchesCalculator(
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=1,
        decrease_batch_size_if_needed=False,
        rank=-1,
        schedule=args.step_batch_size_schedule,
        seq_length=args.seq_length,
    ).schedule
    samples = math.inf if steps is not None else args.train_samples
    consumed, left, found = 0, math.inf if steps is None else steps, []
    for (_, size), (following, _) in itertools.pairwise([*schedule, (math.inf, 0)]):
        until = min(following, samples)
        if left > 0 and until > consumed:
            taken = left if until == math.inf else min(left, -(-(until - consumed) // size))
            found.append((taken, size))
            consumed, left = consumed + taken * size, left - taken
    return found


def prompts_of_a_sample(args: Namespace, prompt: Prompt) -> str:
    """What is to be added to numbers that count one prompt a sample; empty if there is one."""
    if not (args.reset_attention_mask and prompt.preamble):
        return ""
    return (
        f" with one document in each sample (--reset-attention-mask: each further one adds its "
        f"prompt of {len(prompt.preamble)} tokens to the trunk)"
    )


def cache_size(
    args: Namespace,
    settings: Settings,
    prompt: Prompt,
    *,
    token_bytes: int,
    data_parallel_size: int,
    in_flight: int,
    context_parallel_size: int = 1,
    states: StateBytes = NO_STATES,
) -> CacheSize:
    """Keys and values, and states, of the largest step's rollouts on one rank, at the longest
    thoughts of the run, with one prompt in each sample. Context-parallel ranks each hold the trunk
    whole."""
    samples = largest_batch_size(args) // data_parallel_size
    select = find("--rmt-select", settings.select, SELECTIONS)
    positions = settings.positions_per_sample + reserve_positions(settings, select)
    draws_in_warm_up = settings.warmup_iters > 0 and settings.warmup_thought == "drawn"
    return CacheSize(
        token_bytes=token_bytes,
        trunk_tokens=samples * (args.seq_length + len(prompt.preamble)),
        rows=-(-samples * positions // context_parallel_size) * settings.group_size,
        rows_per_position=settings.group_size,
        tail_tokens=prompt.longest_tail(longest_budgets(settings), draws_in_warm_up),
        in_flight=in_flight,
        states=states,
    )


def _announce_answers(prompt: Prompt) -> None:
    """Print how many tokens are text that no answer says, so that positions before them are never
    chosen."""
    left_out = int((prompt.has_bytes & ~prompt.answerable).sum())
    if left_out and dist.get_rank() == 0:
        print(
            f"RMT: {left_out} of {len(prompt.bytes_of)} tokens cannot be answered in template "
            f"{prompt.template.name} (the end of thought; in a box also unbalanced braces and "
            "parts of characters); positions where they come next are not chosen.",
            flush=True,
        )


def _announce_memory(run: MidTraining) -> None:
    """Print what the rollouts' keys and values will take at the longest thoughts.

    Raises:
        ValueError: they cannot fit into ``--rmt-rollout-kv-gib``, or, without it, into the device.
    """
    size = cache_size(
        run.args,
        run.settings,
        run.prompt,
        token_bytes=key_value_bytes(run.policy.model),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        in_flight=parallel_state.get_pipeline_model_parallel_world_size(),
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        states=state_bytes(run.policy.model),
    )
    bound = in_bytes(run.settings.rollout_kv_gib)
    at_once = size.positions_at_once(bound)
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if bound is None and size.total_bytes > memory:
        raise ValueError(
            f"the keys and values of the rollouts take {size.total_bytes / GIB:.1f} GiB "
            f"({size.describe()}) but the device has {memory / GIB:.1f} GiB; pass "
            "--rmt-rollout-kv-gib, so that no more are generated at a time than fit."
        )
    fit = min(at_once, size.positions)
    parts = f"{max(1, -(-size.positions // at_once))} wave(s) of {fit} positions"
    if tells_limits(run.policy.device):
        parts = f"{fit} of {size.positions} positions at a time"
    if dist.get_rank() == 0:
        print(
            "RMT: keys and values of a step's rollouts, a rank, at most"
            f"{prompts_of_a_sample(run.args, run.prompt)}: {size.describe()}; "
            f"{parts}.",
            flush=True,
        )
