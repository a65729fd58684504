"""Budgeted generation of thoughts with the training model itself.

The trunk is read once (the same pass yields the entropies), the stems are read together against its
keys and values, then the branches of all positions of this rank are decoded together, one token for
every live rollout per step. Every forward goes through Megatron's own modules, so tensor and
pipeline parallelism, experts and FP8 come along; what differs from training is the plan
(``attention``). A rollout that has ended leaves the batch.

The budget bounds the work: beyond ``2 * budget`` tokens of thought nothing is rewarded (paper,
length reward), so generation stops there, or, as an option, the end of thought is forced and the
answer still read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rmt.attention import Plan
from megatron_rmt.decoding import DecodePlan, KeyValueStore, StemPlan, TrunkGroup
from megatron_rmt.head import selected_logits, vocab_range
from megatron_rmt.sampling import greedy_tokens, sample_tokens, token_log_probs, uniforms
from megatron_rmt.template import ResponseGrammar
from megatron_rmt.tree import Responses

# Dropping rows from the batch copies the tails, so it waits until this share of rows has ended.
ENDED_SHARE_TO_COMPACT = 0.25


@dataclass(frozen=True)
class RolloutSettings:
    """How responses are drawn.

    group: responses per position. temperature: of the sampling distribution. answer_tokens: most
    tokens of an answer. force_close: write the end of thought at the bound instead of giving up
    (deviation from the paper, for models that rarely end a thought by themselves). greedy: most
    likely token instead of a draw.
    """

    group: int
    temperature: float
    answer_tokens: int
    force_close: bool = False
    greedy: bool = False


@dataclass(frozen=True)
class RolloutPosition:
    """One chosen position: where its context lies in the stored trunk, and the key of its draws.

    sample, column: global sample index and index in the sample (key of the random draws). first,
    limit: rows of the stored trunk that it sees. next_position: rotary position of its stem. truth:
    the token ids of the true answer, written only in the format warm-up.
    """

    sample: int
    column: int
    first: int
    limit: int
    next_position: int
    truth: tuple[int, ...] = ()


def forward_through_stages(
    model: GPTModel,
    tokens: Tensor,
    plan: Plan,
    read: Callable[[Tensor, Tensor], Any],
) -> Any:
    """One forward of packed ``tokens`` ``[rows]`` through all pipeline stages, without gradient.

    Returns ``read(hidden [rows, hidden], output weight [vocab/tp, hidden])`` on the last stage,
    None on the others. Collective over the tensor- and pipeline-parallel ranks of this model.
    """
    config = model.config
    multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
    padding = -tokens.shape[0] % multiple
    if padding:
        tokens = torch.cat([tokens, tokens.new_zeros(padding)])
        plan.positions = torch.cat([plan.positions, plan.positions.new_zeros(padding)])
    if not model.pre_process:
        rows = tokens.shape[0] // multiple
        received = torch.empty(
            (rows, 1, config.hidden_size),
            dtype=config.pipeline_dtype or config.params_dtype,
            device=tokens.device,
        )
        dist.recv(received, src=parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor([received])

    def read_hidden(
        *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any
    ) -> Any:
        weight = output_layer.weight if output_weight is None else output_weight
        return read(full_hidden(hidden_states, config)[: plan.tokens], weight)

    output = model(
        input_ids=tokens[None],
        position_ids=plan.positions[None],
        attention_mask=None,
        packed_seq_params=plan,
        output_processor=read_hidden,
    )
    if model.post_process:
        return output
    dist.send(output.contiguous(), dst=parallel_state.get_pipeline_model_parallel_next_rank())
    return None


def full_hidden(hidden: Tensor, config: Any) -> Tensor:
    """``[rows, hidden]`` of all rows, from ``[rows (/tp under sequence parallel), 1, hidden]``."""
    if config.sequence_parallel:
        # The head sums d hidden over the ranks itself, so backward only takes this rank's share.
        hidden = tensor_parallel.gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=False
        )
    return hidden[:, 0]


def from_last_stage(value: Tensor) -> Tensor:
    """``value`` of the last pipeline stage on every stage (in place)."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(value, src=source, group=parallel_state.get_pipeline_model_parallel_group())
    return value


@torch.no_grad()
def generate(
    model: GPTModel,
    store: KeyValueStore,
    positions: Sequence[RolloutPosition],
    stem: Sequence[int],
    close: Sequence[int],
    grammar: ResponseGrammar,
    settings: RolloutSettings,
    *,
    budget: int,
    vocab_size: int,
    longest_position: int,
    seed: int,
    iteration: int,
    force_truth_at_budget: bool = False,
) -> Responses:
    """Draw ``settings.group`` responses for each position; the trunk is in ``store`` already.

    positions: rollouts of one sample must stand together. stem: its token ids, which name
    ``budget``. close: token ids of the end of thought, written where it is forced.
    force_truth_at_budget: format warm-up; every thought is closed at ``budget`` tokens at the
    latest, or where the text would end, and the true answer is written.

    Each draw is a pure function of (seed, iteration, sample, column, rollout, token), so it does
    not depend on the layout, the batch, or which rollouts have ended.
    """
    device = next(model.parameters()).device
    tp_group = parallel_state.get_tensor_model_parallel_group()
    group, count = settings.group, len(positions) * settings.group
    bound = budget if force_truth_at_budget else 2 * budget
    forces = settings.force_close or force_truth_at_budget
    # What is written by force, per position: the end of thought, in the warm-up also the answer.
    forced_of = [[*close, *position.truth * force_truth_at_budget] for position in positions]
    longest = bound + settings.answer_tokens
    if forces:
        longest = bound + max([settings.answer_tokens + len(close), *map(len, forced_of)])
    store.capacity = len(stem) + longest

    def read_logits(hidden: Tensor, weight: Tensor) -> Tensor:
        return selected_logits(hidden, weight, vocab_size=vocab_size, tp_group=tp_group)

    def of_rollouts(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=device, dtype=torch.int64).repeat_interleave(group)

    sample = of_rollouts([position.sample for position in positions])
    column = of_rollouts([position.column for position in positions])
    after = of_rollouts([position.next_position + len(stem) for position in positions])
    rollout = torch.arange(group, device=device).repeat(len(positions))
    forced_length = of_rollouts([len(tokens) for tokens in forced_of])
    forced = torch.zeros(len(positions), max(1, *map(len, forced_of)), dtype=torch.int64)
    for row, tokens in enumerate(forced_of):
        forced[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    forced = forced.to(device).repeat_interleave(group, dim=0)

    responses = Responses(
        tokens=torch.zeros(count, longest, dtype=torch.int64, device=device),
        lengths=torch.zeros(count, dtype=torch.int64, device=device),
        sampled=torch.zeros(count, longest, dtype=torch.bool, device=device),
        log_probs=torch.zeros(count, longest, device=device),
    )
    # Rollouts in the batch; those that have ended stay until enough of them can leave together.
    batch = torch.arange(count, device=device)
    alive = torch.ones(count, dtype=torch.bool, device=device)
    state = torch.full((count,), grammar.start, dtype=torch.int64, device=device)
    answered = torch.zeros(count, dtype=torch.int64, device=device)
    # Index of the next token to write by force, -1 while the policy draws.
    force_next = torch.full((count,), -1, dtype=torch.int64, device=device)
    groups = _trunk_groups(positions, batch, group)
    logits = _read_stems(model, store, positions, stem, group, longest_position, read_logits)
    for step in range(longest):
        draws = uniforms(seed, iteration, sample[batch], column[batch], rollout[batch], step)
        token, log_prob = _draw(logits, draws, settings, model, vocab_size)

        was_thinking = grammar.thinking[state]
        open_at_bound = was_thinking & (force_next < 0) & (step >= bound)
        if force_truth_at_budget:
            # A response that would end without an answer gets its thought closed instead.
            ends = grammar.done[grammar.next_state[state, token].long()]
            open_at_bound |= was_thinking & (force_next < 0) & ends
        if forces:
            force_next = torch.where(open_at_bound, 0, force_next)
        else:
            alive = alive & ~open_at_bound
        forcing = (force_next >= 0) & (force_next < forced_length[batch])
        wanted = forced[batch].gather(1, force_next.clamp(0, forced.shape[1] - 1)[:, None])[:, 0]
        token = torch.where(forcing, wanted, token)

        drawn = alive & ~forcing
        responses.tokens[batch, step] = torch.where(alive, token, 0)
        responses.sampled[batch, step] = drawn
        responses.log_probs[batch, step] = torch.where(drawn, log_prob, 0.0)
        responses.lengths[batch] += alive

        state = grammar.next_state[state, token].long()
        answered = answered + ~was_thinking
        force_next = torch.where(forcing, force_next + 1, force_next)
        if force_truth_at_budget:
            closed_itself = was_thinking & ~grammar.thinking[state] & (force_next < 0)
            force_next = torch.where(closed_itself, len(close), force_next)
            alive = alive & (force_next < forced_length[batch])
        else:
            alive = alive & ~grammar.done[state] & (answered < settings.answer_tokens)

        left = int(alive.sum())
        if left == 0 or step + 1 == longest:
            break
        if left <= (1 - ENDED_SHARE_TO_COMPACT) * len(batch):
            remaining = alive.nonzero()[:, 0]
            store.keep(remaining)
            batch, alive, token = batch[remaining], alive[remaining], token[remaining]
            state, answered = state[remaining], answered[remaining]
            force_next = force_next[remaining]
            groups = _trunk_groups(positions, batch, group)
        plan = DecodePlan(tokens=len(batch), store=store, groups=groups, column=len(stem) + step)
        plan.use_positions(after[batch] + step, longest_position)
        logits = forward_through_stages(model, token, plan, read_logits)

    used = int(responses.lengths.max()) if count else 0
    shape = (len(positions), group)
    return Responses(
        tokens=responses.tokens[:, :used].reshape(*shape, used).cpu(),
        lengths=responses.lengths.view(shape).cpu(),
        sampled=responses.sampled[:, :used].reshape(*shape, used).cpu(),
        log_probs=responses.log_probs[:, :used].reshape(*shape, used).cpu(),
    )


def _trunk_groups(
    positions: Sequence[RolloutPosition], batch: Tensor, group: int
) -> list[TrunkGroup]:
    """One ``TrunkGroup`` for the rollouts ``batch`` (ascending) of each sample."""
    first_of = torch.tensor([position.first for position in positions])
    limit_of = torch.tensor([position.limit for position in positions])
    sample_of = torch.tensor([position.sample for position in positions])
    position = batch.cpu() // group
    _, counts = sample_of[position].unique_consecutive(return_counts=True)
    groups, start = [], 0
    for count in counts.tolist():
        own = position[start : start + count]
        first, limit = first_of[own], limit_of[own]
        trunk_first, trunk_limit = int(first.min()), int(limit.max())
        rows = torch.arange(trunk_first, trunk_limit)
        seen = (rows >= first[:, None]) & (rows < limit[:, None])
        bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, None]
        groups.append(
            TrunkGroup(start, start + count, trunk_first, trunk_limit, bias.to(batch.device))
        )
        start += count
    return groups


def _read_stems(
    model: GPTModel,
    store: KeyValueStore,
    positions: Sequence[RolloutPosition],
    stem: Sequence[int],
    group: int,
    longest_position: int,
    read_logits: Callable[[Tensor, Tensor], Tensor],
) -> Tensor | None:
    """Start every tail with its stem; logits ``[rollouts, vocab/tp]`` of the first tokens."""
    device = next(model.parameters()).device
    length = len(stem)
    tokens = torch.tensor([*stem], dtype=torch.int64, device=device).repeat(len(positions))
    starts = torch.tensor([position.next_position for position in positions], device=device)
    plan = StemPlan(
        tokens=len(tokens),
        store=store,
        visible=[(position.first, position.limit) for position in positions],
        group=group,
    )
    plan.use_positions(
        (starts[:, None] + torch.arange(length, device=device)).flatten(), longest_position
    )

    def read_last(hidden: Tensor, weight: Tensor) -> Tensor:
        last = hidden.view(len(positions), length, -1)[:, -1]
        return read_logits(last, weight).repeat_interleave(group, dim=0)

    return forward_through_stages(model, tokens, plan, read_last)


def _draw(
    logits: Tensor | None,
    draws: Tensor,
    settings: RolloutSettings,
    model: GPTModel,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """A token ``[rollouts]`` and its log-prob for each row of ``logits``, on every stage."""
    rows, device = draws.shape[0], draws.device
    token = torch.zeros(rows, dtype=torch.int64, device=device)
    log_prob = torch.zeros(rows, device=device)
    if model.post_process:
        tp_group = parallel_state.get_tensor_model_parallel_group()
        start, _ = vocab_range(output_weight(model).shape[0], vocab_size, tp_group)
        shard = {"vocab_start": start, "tp_group": tp_group}
        if settings.greedy:
            token = greedy_tokens(logits, **shard)
        else:
            token = sample_tokens(logits, draws, temperature=settings.temperature, **shard)
        log_prob = token_log_probs(logits, token, temperature=settings.temperature, **shard)
    return from_last_stage(token), from_last_stage(log_prob)


def output_weight(model: GPTModel) -> Tensor:
    """The output layer's weight ``[vocab/tp, hidden]``, on the last stage."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight
