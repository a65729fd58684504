"""One training step of RMT, as data flows through it.

    user's batches -> trunk pass (entropies, keys and values) -> tiers, curriculum, positions
    -> budget, stems, rollouts -> rewards, advantages -> (packing ->) trees
    -> Megatron's own train_step

``prepare`` builds once what does not change during a run; ``collect`` turns the user's
micro-batches of a step into the ``Update``s that Megatron's schedules then consume. Nothing is kept
from one step to the next: everything random is a pure function of (seed, iteration, sample,
position, rollout, token), so a resumed run repeats itself.
"""

import contextlib
import hashlib
import time
import zlib
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rmt.advantages import group_advantages
from megatron_rmt.attention import attach_tree_attention
from megatron_rmt.budget import token_budget
from megatron_rmt.curriculum import choose_positions, tier_probabilities, tiers
from megatron_rmt.decoding import KeyValueStore
from megatron_rmt.entropy import entropy_percentiles, read_trunk
from megatron_rmt.forward_step import LossSettings, Metric, Update
from megatron_rmt.live_rollouts import RolloutPosition
from megatron_rmt.losses import LossWeights, response_weights
from megatron_rmt.packing import TreeSource, repack, tree_cost
from megatron_rmt.rewards import length_reward, total_reward
from megatron_rmt.rollout import RolloutSettings, expert_sharing_group, generate
from megatron_rmt.rollout_memory import GIB, KeyValuePlan, key_value_bytes
from megatron_rmt.template import (
    Response,
    ResponseGrammar,
    Template,
    chat_template,
    load_template,
    read_response,
)
from megatron_rmt.token_bytes import token_bytes
from megatron_rmt.tree import NO_LABEL, Responses, Tree, Trunk, build_trunk, grow_tree, pad_tree
from megatron_rmt.tree_attention import check_backend
from megatron_rmt.user_batch import UserBatch

# Tokens of the true continuation that a prediction is compared with.
CONTINUATION_TOKENS = 64


@dataclass(frozen=True)
class MidTraining:
    """What one run needs in every step: model, prompt, vocabulary.

    template: with the chat markers in place. bytes_of: bytes of each token id. has_bytes:
    ``[vocab]`` bool, False for special tokens. head, close: token ids. stop: token ids that end a
    response. longest_position: above every position id.
    """

    args: Namespace
    model: GPTModel
    template: Template
    tokenizer: Any
    bytes_of: list[bytes]
    has_bytes: Tensor
    grammar: ResponseGrammar
    head: list[int]
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


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a piece of prompt by Megatron's ``tokenizer``, no special tokens added."""
    inner = getattr(getattr(tokenizer, "_tokenizer", None), "tokenizer", None)
    if hasattr(inner, "add_special_tokens"):
        return list(inner.encode(text, add_special_tokens=False)) if text else []
    return list(tokenizer.tokenize(text)) if text else []


def prompt_template(args: Namespace, tokenizer: Any) -> Template:
    """The template that the flags ask for, with the tokenizer's chat markers where it has them.

    Raises:
        ValueError: no such template, or the chat markers do not go round it.
    """
    template = load_template(args.rmt_template)
    if args.rmt_no_chat:
        return template
    inner = getattr(getattr(tokenizer, "_tokenizer", None), "tokenizer", None)
    return chat_template(template, inner)


def prepare(args: Namespace, model: GPTModel, tokenizer: Any) -> MidTraining:
    """Attach tree attention to ``model`` and read the vocabulary and the prompt.

    Raises:
        ValueError: the prompt and the longest thought do not fit, the vocabularies disagree,
            --rmt-attention cannot train on the model's device, or --rmt-max-tokens is less than
            what a micro-batch holds before the rollouts.
    """
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
    head = encode_prompt(tokenizer, template.head)
    held = args.micro_batch_size * (args.seq_length + len(head))
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
        head=head,
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


def _kv_bound(args: Namespace) -> int | None:
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
    plan = KeyValuePlan(
        token_bytes=key_value_bytes(training.model),
        trunk_tokens=samples * (args.seq_length + len(training.head)),
        rows=samples * args.rmt_positions_per_sample * args.rmt_group_size,
        rows_per_position=args.rmt_group_size,
        tail_tokens=len(training.stem(budget))
        + 2 * budget
        + len(training.close) * args.rmt_force_close
        + args.rmt_answer_tokens,
        in_flight=parallel_state.get_pipeline_model_parallel_world_size(),
    )
    bound = _kv_bound(args)
    at_once = plan.positions_at_once(bound)
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if bound is None and plan.total_bytes > memory:
        raise ValueError(
            f"the keys and values of the rollouts take {plan.total_bytes / GIB:.1f} GiB "
            f"({plan.describe()}) but the device has {memory / GIB:.1f} GiB; pass "
            "--rmt-rollout-kv-gib, so that they are generated in waves that fit."
        )
    waves = max(1, -(-plan.positions // at_once))
    if dist.get_rank() == 0:
        print(
            f"RMT: keys and values of a step's rollouts, a rank, at most: {plan.describe()}; "
            f"{waves} wave(s) of {min(at_once, plan.positions)} positions.",
            flush=True,
        )


def _eos(tokenizer: Any) -> int | None:
    try:
        return tokenizer.eos
    except (AttributeError, NotImplementedError):
        return None


def longest_position(args: Namespace, tokenizer: Any, template: Template) -> int:
    """A bound on every position id: documents with their heads, stem, thought, answer."""
    budget = max(args.rmt_initial_budget, args.rmt_minimum_budget)
    prompt = len(encode_prompt(tokenizer, template.head))
    prompt += len(encode_prompt(tokenizer, template.stem_text(budget)))
    # A forced end of thought and, in the warm-up, a written answer, whatever its length.
    close = len(encode_prompt(tokenizer, template.close))
    return args.seq_length + prompt + 2 * budget + 2 * close + args.rmt_answer_tokens + 16


def position_problem(args: Namespace, longest: int) -> str | None:
    """One sentence if the model has no position ids for ``longest`` of them."""
    limit = args.max_position_embeddings
    if args.position_embedding_type == "none" or limit is None or longest <= limit:
        return None
    return (
        f"--max-position-embeddings is {limit} but a sample of {args.seq_length} tokens, the "
        f"prompt and 2 * {args.rmt_initial_budget} tokens of thought with their answer take "
        f"{longest}; lower --rmt-initial-budget or --seq-length, or raise "
        "--max-position-embeddings if the model allows."
    )


@dataclass(frozen=True)
class StepPlan:
    """What is decided before a step: iteration (0 for the first), budget B_t, probabilities of the
    tiers (None: uniform), whether this is a step of format warm-up."""

    iteration: int
    budget: int
    probabilities: tuple[float, float, float] | None
    warm_up: bool


def plan_step(args: Namespace, iteration: int) -> StepPlan:
    """The schedules at ``iteration``; after ``--train-iters`` they stay at their end."""
    iteration_in_range = min(iteration, args.train_iters)
    budget = args.rmt_initial_budget
    if not args.rmt_no_budget_decay:
        budget = token_budget(
            iteration_in_range,
            args.train_iters,
            initial=args.rmt_initial_budget,
            minimum=args.rmt_minimum_budget,
            decay=args.rmt_budget_decay,
        )
    probabilities = None
    if not args.rmt_no_curriculum:
        probabilities = tier_probabilities(
            iteration_in_range,
            args.train_iters,
            args.rmt_curriculum_start,
            args.rmt_curriculum_end,
            tuple(args.rmt_start_probabilities),
            tuple(args.rmt_end_probabilities),
        )
    return StepPlan(iteration, budget, probabilities, iteration < args.rmt_warmup_iters)


@dataclass(frozen=True)
class Collected:
    """What the update of one step needs: its micro-batches, the loss, and the wall seconds that
    each phase took on this rank."""

    updates: list[Update]
    settings: LossSettings
    seconds: dict[str, float]


def collect(training: MidTraining, batches: Sequence[UserBatch], step: StepPlan) -> Collected:
    """Everything before the update of one step, for this data-parallel rank's micro-batches.

    Collective over all ranks: the ranks of one model work in lockstep, and the loss's global means
    are summed over the data-parallel ranks.
    """
    args = training.args
    times = [time.perf_counter()]
    trunks = [_trunk(training, batch) for batch in batches]
    first_rows = [0]
    for trunk in trunks:
        first_rows.append(first_rows[-1] + len(trunk))
    store = KeyValueStore(trunk_tokens=first_rows[-1])
    sample_index = global_sample_indices(args, len(batches))

    chosen: list[list[int]] = []
    positions: list[RolloutPosition] = []
    metrics: list[dict[str, Metric]] = []
    labelled_entropies: list[Tensor] = []
    for index, (trunk, first_row) in enumerate(zip(trunks, first_rows, strict=False)):
        entropies, predictions = read_trunk(
            training.model,
            trunk,
            store,
            first_row,
            vocab_size=training.vocab_size,
            longest_position=training.longest_position,
            chunk_size=args.rmt_head_chunk_size,
            top_k=args.rmt_entropy_top_k,
            attention=args.rmt_attention,
        )
        rows, tier = _choose(training, trunk, entropies, sample_index[index], step)
        chosen.append(rows)
        positions += [
            RolloutPosition(
                sample=sample_index[index][int(trunk.samples[row])],
                column=int(trunk.columns[row]),
                first=first_row + int(trunk.document_first[row]),
                limit=first_row + row + 1,
                next_position=int(trunk.positions[row]) + 1,
                truth=_true_answer(training, trunk, row) if step.warm_up else (),
            )
            for row in rows
        ]
        labelled_entropies.append(entropies[_labelled(trunk)])
        metrics.append(_trunk_metrics(trunk, entropies, predictions, tier, rows, step))
    percentiles = entropy_percentiles(torch.cat(labelled_entropies))
    times.append(time.perf_counter())

    stem = training.stem(step.budget)
    responses = _rollouts(training, store, positions, stem, step)
    _check_ranks_agree(chosen, responses)
    times.append(time.perf_counter())

    ends = [0]
    for rows in chosen:
        ends.append(ends[-1] + len(rows))
    sources = []
    for trunk, rows, first, limit, metric in zip(
        trunks, chosen, ends, ends[1:], metrics, strict=False
    ):
        own = responses.positions(first, limit)
        advantages, reward_metrics = _score(training, trunk, rows, own, step)
        keys = [(position.sample, position.column) for position in positions[first:limit]]
        metric |= reward_metrics | {"rmt rollout checksum": _checksum(keys, own)}
        sources.append(TreeSource(trunk, rows, own, advantages))
    if args.rmt_max_tokens is not None:
        sources = _repack(training, sources, len(stem))
    trees = [
        grow_tree(
            source.trunk,
            source.rows,
            stem,
            source.responses,
            longest_position=training.longest_position,
            device=next(training.model.parameters()).device,
            attention=args.rmt_attention,
        )
        for source in sources
    ]
    trees = _aligned(training, trees)

    totals = torch.tensor([float(len(positions)), sum(float(t.ntp_mask.sum()) for t in trees)])
    totals = totals.to(trees[0].tokens.device)
    dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
    all_positions, ntp_tokens = totals.tolist()

    slots = float(len(batches) * parallel_state.get_data_parallel_world_size())
    updates = []
    for source, tree, metric in zip(sources, trees, metrics, strict=True):
        weights = _weights(training, tree, source.advantages, all_positions, ntp_tokens, step)
        metric |= {f"rmt entropy p{p}": (value, 1.0) for p, value in percentiles.items()}
        metric |= _token_metrics(source.trunk, tree, len(source.rows) * len(stem), slots)
        metric |= _size_metrics(args, source.trunk, tree)
        updates.append(Update(tree, weights, metric))
    settings = LossSettings(
        ntp_coefficient=0.0 if args.rmt_no_ntp else args.rmt_ntp_coefficient,
        temperature=args.rmt_temperature,
        vocab_size=training.vocab_size,
        chunk_size=args.rmt_head_chunk_size,
        ntp_tokens=max(ntp_tokens, 1.0),
        scale=slots,
    )
    times.append(time.perf_counter())
    phases = ("trunk", "rollout", "tree")
    seconds = {name: times[i + 1] - times[i] for i, name in enumerate(phases)}
    return Collected(updates, settings, seconds)


def global_sample_indices(args: Namespace, micro_batches: int) -> list[list[int]]:
    """Index, over the whole run, of every sample of each of this rank's micro-batches.

    As ``MegatronPretrainingSampler`` deals them out: micro-batches of all data-parallel ranks side
    by side. So a sample has the same index in whatever layout it is trained.
    """
    rank = parallel_state.get_data_parallel_rank()
    ranks = parallel_state.get_data_parallel_world_size()
    size = args.micro_batch_size
    return [
        [
            args.consumed_train_samples + (micro_batch * ranks + rank) * size + sample
            for sample in range(size)
        ]
        for micro_batch in range(micro_batches)
    ]


def _trunk(training: MidTraining, batch: UserBatch) -> Trunk:
    return build_trunk(
        batch.tokens,
        batch.position_ids,
        batch.labels,
        batch.loss_mask,
        head=training.head,
        end_of_document=training.tokenizer.eod,
        separate_documents=training.args.reset_attention_mask,
    )


def _choose(
    training: MidTraining,
    trunk: Trunk,
    entropies: Tensor,
    sample_index: Sequence[int],
    step: StepPlan,
) -> tuple[list[int], Tensor]:
    """The chosen rows of a trunk, ascending, and the tier of every row (-1: not eligible)."""
    args = training.args
    labelled = _labelled(trunk) & (trunk.columns >= 0)
    eligible = labelled & training.has_bytes[trunk.labels.clamp(min=0)]
    tier = torch.where(eligible, tiers(entropies, args.rmt_entropy_thresholds), -1)
    rows: list[int] = []
    for sample, index in enumerate(sample_index):
        own = (trunk.samples == sample).nonzero()[:, 0]
        # Keyed by the column, so that a prompt head does not change which positions are chosen.
        picked = choose_positions(
            tier[own],
            step.probabilities,
            args.rmt_positions_per_sample,
            seed=training.seed,
            iteration=step.iteration,
            sample=index,
        )
        rows += own[picked].tolist()
    return rows, tier


def _continuation(training: MidTraining, trunk: Trunk, row: int) -> list[int]:
    """The true next tokens from ``row`` on, to the end of the document."""
    limit = next(end for first, end in trunk.documents if first <= row < end)
    tokens = []
    for token in trunk.labels[row : min(limit, row + CONTINUATION_TOKENS)].tolist():
        if token == NO_LABEL or not training.bytes_of[token]:
            break
        tokens.append(token)
    return tokens


def _true_answer(training: MidTraining, trunk: Trunk, row: int) -> tuple[int, ...]:
    """The answer that the format warm-up writes: the true next token, boxed where asked for."""
    token = int(trunk.labels[row])
    if training.template.answer == "next":
        return (token,)
    text = training.bytes_of[token].decode(errors="replace")
    return tuple(encode_prompt(training.tokenizer, f"\n\\boxed{{{text}}}"))


def _rollouts(
    training: MidTraining,
    store: KeyValueStore,
    positions: Sequence[RolloutPosition],
    stem: Sequence[int],
    step: StepPlan,
) -> Responses:
    args = training.args
    if not positions and expert_sharing_group(training.model) is None:
        empty = torch.empty(0, args.rmt_group_size, 0)
        return Responses(empty.long(), empty.long()[..., :0].sum(-1), empty.bool(), empty)
    return generate(
        training.model,
        store,
        positions,
        stem,
        training.close,
        training.grammar,
        RolloutSettings(
            group=args.rmt_group_size,
            temperature=args.rmt_temperature,
            answer_tokens=args.rmt_answer_tokens,
            force_close=args.rmt_force_close,
            greedy=args.rmt_greedy,
            top_k=args.rmt_top_k,
            top_p=args.rmt_top_p,
            kv_bytes=_kv_bound(args),
        ),
        budget=step.budget,
        vocab_size=training.vocab_size,
        longest_position=training.longest_position,
        seed=training.seed,
        iteration=step.iteration,
        force_truth_at_budget=step.warm_up,
    )


def _check_ranks_agree(chosen: list[list[int]], responses: Responses) -> None:
    """All ranks of one model must have drawn the same; they do by construction, this proves it."""
    group = parallel_state.get_model_parallel_group()
    if dist.get_world_size(group) == 1:
        return
    digest = hashlib.sha256(repr(chosen).encode())
    digest.update(responses.tokens.numpy().tobytes() + responses.lengths.numpy().tobytes())
    own = torch.tensor([int.from_bytes(digest.digest()[:7], "little")])
    own = own.to(torch.cuda.current_device())
    ends = torch.cat([own, -own])
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
    if int(ends[0]) != -int(ends[1]):
        raise RuntimeError(
            "RMT: tensor- or pipeline-parallel ranks chose different positions or drew different "
            "tokens; their weights or inputs differ (check that all load the same checkpoint)."
        )


def _aligned(training: MidTraining, trees: list[Tree]) -> list[Tree]:
    """Trees padded to what the layout asks: pipeline stages exchange micro-batches of one size."""
    args = training.args
    multiple = args.tensor_model_parallel_size if args.sequence_parallel else 1
    if getattr(args, "fp8", None):
        # FP8 matrix products want their leading dimension in whole blocks (Transformer Engine).
        multiple *= 128
    longest = max(tree.tokens.shape[0] for tree in trees)
    same = parallel_state.get_pipeline_model_parallel_world_size() > 1
    return [
        pad_tree(tree, -(-(longest if same else tree.tokens.shape[0]) // multiple) * multiple)
        for tree in trees
    ]


def _labelled(trunk: Trunk) -> Tensor:
    """``[rows]`` bool: rows whose prediction counts."""
    return (trunk.labels != NO_LABEL) & (trunk.loss_mask > 0)


def _repack(
    training: MidTraining, sources: Sequence[TreeSource], stem_length: int
) -> list[TreeSource]:
    return repack(
        sources,
        tree_cost(training.model.config, training.vocab_size),
        stem_length=stem_length,
        max_tokens=training.args.rmt_max_tokens,
        use_all=parallel_state.get_pipeline_model_parallel_world_size() > 1,
        group=parallel_state.get_data_parallel_group(),
        device=torch.device(torch.cuda.current_device()),
    )


def _size_metrics(args: Namespace, trunk: Trunk, tree: Tree) -> dict[str, Metric]:
    """Share of a micro-batch's rows that are padding, and its tokens above the limit."""
    rows, tokens = float(tree.tokens.shape[0]), float(tree.plan.tokens)
    real = tokens - float((trunk.samples < 0).sum())
    excess = 0.0 if args.rmt_max_tokens is None else max(0.0, tokens - args.rmt_max_tokens)
    return {"rmt padding": (rows - real, rows), "rmt tokens above limit": (excess, 1.0)}


def _trunk_metrics(
    trunk: Trunk,
    entropies: Tensor,
    predictions: Tensor,
    tier: Tensor,
    rows: list[int],
    step: StepPlan,
) -> dict[str, Metric]:
    labelled = _labelled(trunk)
    count = float(labelled.sum())
    right = (predictions == trunk.labels) & labelled
    chosen = tier[rows]
    metrics = {
        "rmt entropy": (float(entropies[labelled].sum()), count),
        "rmt next-token accuracy": (float(right.sum()), count),
        "rmt entropy of chosen": (float(entropies[rows].sum()), float(len(rows))),
    }
    for number, name in enumerate(("easy", "medium", "hard")):
        metrics[f"rmt chosen {name}"] = (float((chosen == number).sum()), float(len(rows)))
        # Without a curriculum no share is asked for: 0 of 0 stays out of the logs.
        asked = (0.0, 0.0) if step.probabilities is None else (step.probabilities[number], 1.0)
        metrics[f"rmt asked {name}"] = asked
    return metrics


def _token_metrics(trunk: Trunk, tree: Tree, stem_tokens: int, slots: float) -> dict[str, Metric]:
    """Tokens of the whole global batch; ``slots``: how many micro-batches report."""
    tokens = {
        # The one token of a micro-batch that packing left empty is of no sample.
        "trunk": int((trunk.samples >= 0).sum()),
        "stem": stem_tokens,
        "branch": tree.plan.tokens - len(trunk) - stem_tokens,
    }
    return {f"rmt {name} tokens": (float(count), 1 / slots) for name, count in tokens.items()}


def _score(
    training: MidTraining, trunk: Trunk, rows: list[int], responses: Responses, step: StepPlan
) -> tuple[Tensor, dict[str, Metric]]:
    """Advantages ``[positions, group]`` fp32 and what to report of the responses."""
    args = training.args
    positions, group = len(rows), args.rmt_group_size
    match = torch.zeros(positions, group)
    lengths = torch.zeros(positions, group)
    read: list[Response] = []
    truncated = 0
    for index, row in enumerate(rows):
        truth = [training.bytes_of[token] for token in _continuation(training, trunk, row)]
        boundaries = torch.tensor([len(text) for text in truth]).cumsum(0).tolist()
        for rollout in range(group):
            length = int(responses.lengths[index, rollout])
            response = read_response(
                responses.tokens[index, rollout, :length].tolist(),
                training.template,
                training.bytes_of,
                training.stop,
                args.rmt_answer_tokens,
            )
            read.append(response)
            lengths[index, rollout] = response.thought_length
            truncated += _is_truncated(training, response, responses, index, rollout, step)
            if response.well_formed:
                match[index, rollout] = training.template.match(
                    response.prediction, b"".join(truth), boundaries
                )
    by_length = length_reward(lengths, step.budget, args.rmt_length_reward_maximum)
    weight = 0.0 if args.rmt_no_length_reward else args.rmt_length_reward_weight
    rewards = total_reward(match, by_length, weight)
    if step.warm_up:
        # The answers are given; what is drawn, the thoughts, learns to last until the budget.
        # Else models soon close every thought at once, as closing is all that they are shown.
        rewards = total_reward(torch.zeros_like(match), by_length, weight)
    advantages = group_advantages(rewards)

    count = float(positions * group)
    # In the warm-up the answers are given, so there is nothing to report of them.
    judged = 0.0 if step.warm_up else count
    closed = torch.tensor([r.closed for r in read], dtype=torch.bool).view(positions, group)
    metrics = {
        "rmt match rate": (float(match.sum()) * (judged > 0), judged),
        "rmt well-formed rate": (sum(r.well_formed for r in read) * (judged > 0), judged),
        "rmt closed by itself": (float((closed & ~_forced(responses)).sum()), count),
        "rmt thought length": (float(lengths.sum()), count),
        "rmt length reward": (float(by_length.sum()), count),
        "rmt reward": (float(rewards.sum()) * (judged > 0), judged),
        "rmt truncated": (float(truncated) * (judged > 0), judged),
        "rmt zero-variance groups": (
            float((advantages == 0).all(-1).sum()) * (judged > 0),
            0.0 if step.warm_up else float(positions),
        ),
        "rmt budget": (float(step.budget) * positions, float(positions)),
    }
    return advantages, metrics


def _is_truncated(
    training: MidTraining,
    response: Response,
    responses: Responses,
    position: int,
    rollout: int,
    step: StepPlan,
) -> bool:
    """Whether a bound ended the thought (given up or forced to close), or a boxed answer."""
    length = int(responses.lengths[position, rollout])
    drawn = responses.sampled[position, rollout, :length]
    if response.thought_length >= 2 * step.budget and not (response.closed and bool(drawn.all())):
        return True
    ended = length > 0 and int(responses.tokens[position, rollout, length - 1]) in training.stop
    return response.closed and not response.well_formed and not ended


def _checksum(keys: Sequence[tuple[int, int]], responses: Responses) -> Metric:
    """[sum, rollouts] of a 12-bit checksum of each rollout's position and tokens.

    Two layouts that train alike report the same average; sums stay exact in fp32 up to 4096
    rollouts.
    """
    total = count = 0
    for key, tokens, lengths in zip(keys, responses.tokens, responses.lengths, strict=True):
        for row, length in zip(tokens, lengths.tolist(), strict=True):
            total += zlib.crc32(repr((key, row[:length].tolist())).encode()) & 0xFFF
            count += 1
    return float(total), float(count)


def _forced(responses: Responses) -> Tensor:
    """``[positions, group]`` bool: some token of the response was written, not drawn."""
    columns = torch.arange(responses.tokens.shape[-1])
    real = columns < responses.lengths[..., None]
    return (real & ~responses.sampled).any(-1)


def _weights(
    training: MidTraining,
    tree: Tree,
    advantages: Tensor,
    positions: float,
    ntp_tokens: float,
    step: StepPlan,
) -> LossWeights:
    device = tree.tokens.device
    group = training.args.rmt_group_size
    values = advantages.flatten().to(device)
    policy = response_weights(values, tree.rollouts, tree.sampled, positions=positions * group)
    supervised = torch.zeros_like(policy)
    if step.warm_up:
        supervised = response_weights(
            torch.ones_like(values), tree.rollouts, ~tree.sampled, positions=positions * group
        )
    return LossWeights(
        ntp=tree.ntp_mask / max(ntp_tokens, 1.0), policy=policy, supervised=supervised
    )


def gpt_model(chunks: Sequence[torch.nn.Module]) -> GPTModel:
    """The ``GPTModel`` inside Megatron's wrappers.

    Raises:
        ValueError: another kind of model, or several chunks (virtual pipeline).
    """
    if len(chunks) != 1:
        raise ValueError(
            f"RMT: this rank holds {len(chunks)} model chunks; leave out virtual pipeline stages."
        )
    model = chunks[0]
    while not isinstance(model, GPTModel) and hasattr(model, "module"):
        model = model.module
    if not isinstance(model, GPTModel):
        raise ValueError(f"RMT: the model is a {type(model).__name__}; RMT trains a GPTModel.")
    return model


@contextlib.contextmanager
def generating(model: GPTModel) -> Iterator[None]:
    """Evaluation mode for rollouts; the training mode comes back even after an error."""
    was_training = model.training
    quantized = model.config.fp8 or model.config.fp4
    if quantized:
        # Transformer Engine would go on with weights quantized before the last optimizer step.
        model.set_is_first_microbatch()
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        if quantized:
            # Made without gradient they may lack what the backward pass needs.
            for module in model.modules():
                getattr(module, "_fp8_workspaces", {}).clear()
