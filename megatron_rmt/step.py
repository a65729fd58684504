"""One training step of RMT, as data flows through it.

    user's batches -> trunk pass (entropies, keys and values) -> tiers, curriculum, positions
    -> budget, stems, rollouts -> rewards, advantages -> (packing ->) trees
    -> Megatron's own train_step

``collect`` turns the user's micro-batches of a step into the ``Update``s that Megatron's schedules
then consume. Nothing is kept from one step to the next: everything random is a pure function of
(seed, iteration, sample, position, rollout, token), so a resumed run repeats itself.
"""

import hashlib
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_rmt.algorithm.curriculum import choose_positions, tiers
from megatron_rmt.algorithm.losses import LossWeights, response_weights
from megatron_rmt.algorithm.schedules import Schedule
from megatron_rmt.job.samples import Sample, read_samples
from megatron_rmt.mid_training import MidTraining, kv_bound
from megatron_rmt.rollout.generate import RolloutSettings, expert_sharing_group, generate
from megatron_rmt.rollout.kv_cache import KeyValueStore
from megatron_rmt.rollout.live_rollouts import RolloutPosition
from megatron_rmt.rollout.prefill import entropy_percentiles, read_trunk
from megatron_rmt.rollout.responses import Responses, join_responses
from megatron_rmt.rollout.trunk import NO_LABEL, Trunk, UserBatch, build_trunk
from megatron_rmt.update.forward_step import LossSettings, Metric, Update
from megatron_rmt.update.packing import TreeSource, repack, tree_cost
from megatron_rmt.update.scoring import checksum, read_responses, score, thought_lengths
from megatron_rmt.update.tree import Tree, grow_tree, pad_tree
from megatron_rmt.update.warm_up import responses_from_text, true_answer


@dataclass(frozen=True)
class Collected:
    """What the update of one step needs: its micro-batches, the loss, and the wall seconds that
    each phase took on this rank. samples: rollouts as text, in steps whose samples are logged."""

    updates: list[Update]
    settings: LossSettings
    seconds: dict[str, float]
    samples: list[Sample]


def collect(training: MidTraining, batches: Sequence[UserBatch], step: Schedule) -> Collected:
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
                next_position=int(trunk.position_ids[row]) + 1,
                truth=true_answer(training, trunk, row) if step.warm_up else (),
            )
            for row in rows
        ]
        labelled_entropies.append(entropies[_labelled(trunk)])
        metrics.append(_trunk_metrics(trunk, entropies, predictions, tier, rows, step))
    percentiles = entropy_percentiles(torch.cat(labelled_entropies))
    times.append(time.perf_counter())

    stem = training.stem(step.budget)
    if step.thought_from_text:
        responses = join_responses(
            [
                responses_from_text(training, trunk, rows, step)
                for trunk, rows in zip(trunks, chosen, strict=True)
            ]
        )
    else:
        responses = _rollouts(training, store, positions, stem, step)
    _check_ranks_agree(chosen, responses)
    times.append(time.perf_counter())

    ends = [0]
    for rows in chosen:
        ends.append(ends[-1] + len(rows))
    sources, rewards = [], []
    for trunk, rows, first, limit, metric in zip(
        trunks, chosen, ends, ends[1:], metrics, strict=False
    ):
        own = responses.positions(first, limit)
        reward, advantages, reward_metrics = score(training, trunk, rows, own, step)
        keys = [(position.sample, position.column) for position in positions[first:limit]]
        metric |= reward_metrics | {"rmt rollout checksum": checksum(keys, own)}
        sources.append(TreeSource(trunk, rows, own, advantages))
        rewards.append(reward)
    shown = read_samples(training, sources, rewards, step.iteration)
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
        weights = _weights(training, source, tree, all_positions, ntp_tokens, step)
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
    return Collected(updates, settings, seconds, shown)


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
        preamble=training.preamble,
        end_of_document=training.tokenizer.eod,
        separate_documents=training.args.reset_attention_mask,
    )


def _choose(
    training: MidTraining,
    trunk: Trunk,
    entropies: Tensor,
    sample_index: Sequence[int],
    step: Schedule,
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
            step.positions_per_sample,
            seed=training.seed,
            iteration=step.iteration,
            sample=index,
        )
        rows += own[picked].tolist()
    return rows, tier


def _rollouts(
    training: MidTraining,
    store: KeyValueStore,
    positions: Sequence[RolloutPosition],
    stem: Sequence[int],
    step: Schedule,
) -> Responses:
    args = training.args
    if not positions and expert_sharing_group(training.model) is None:
        empty = torch.empty(0, step.group, 0)
        return Responses(empty.long(), empty.long()[..., :0].sum(-1), empty.bool(), empty)
    return generate(
        training.model,
        store,
        positions,
        stem,
        training.close,
        training.grammar,
        RolloutSettings(
            group=step.group,
            temperature=args.rmt_temperature,
            answer_tokens=args.rmt_answer_tokens,
            force_close=args.rmt_force_close,
            greedy=args.rmt_greedy,
            top_k=args.rmt_top_k,
            top_p=args.rmt_top_p,
            kv_bytes=kv_bound(args),
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
    rows, tokens = float(tree.tokens.shape[0]), float(tree.visibility.tokens)
    real = tokens - float((trunk.samples < 0).sum())
    excess = 0.0 if args.rmt_max_tokens is None else max(0.0, tokens - args.rmt_max_tokens)
    return {"rmt padding": (rows - real, rows), "rmt tokens above limit": (excess, 1.0)}


def _trunk_metrics(
    trunk: Trunk,
    entropies: Tensor,
    predictions: Tensor,
    tier: Tensor,
    rows: list[int],
    step: Schedule,
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
        "branch": tree.visibility.tokens - len(trunk) - stem_tokens,
    }
    return {f"rmt {name} tokens": (float(count), 1 / slots) for name, count in tokens.items()}


def _weights(
    training: MidTraining,
    source: TreeSource,
    tree: Tree,
    positions: float,
    ntp_tokens: float,
    step: Schedule,
) -> LossWeights:
    """``positions``, ``ntp_tokens``: of the global batch."""
    values = source.advantages.flatten().to(tree.tokens.device)
    rollouts = positions * step.group
    policy = response_weights(values, tree.rollouts, tree.drawn, positions=rollouts)
    supervised = torch.zeros_like(policy)
    if step.warm_up:
        ones, written = torch.ones_like(values), ~tree.drawn
        thought = torch.zeros_like(written)
        if step.thought_from_text:
            thought = _thought_tokens(training, source, tree)
        # Thought and answer each have their own mean, so that a long thought leaves the one token
        # of the answer its weight.
        for part in (written & thought, written & ~thought):
            supervised += response_weights(ones, tree.rollouts, part, positions=rollouts)
    return LossWeights(
        ntp=tree.ntp_mask / max(ntp_tokens, 1.0), policy=policy, supervised=supervised
    )


def _thought_tokens(training: MidTraining, source: TreeSource, tree: Tree) -> Tensor:
    """``[response predictions]`` bool: the predicted token belongs to a thought."""
    read = read_responses(training, source.responses)
    lengths = thought_lengths(read, source.responses.tokens.shape[1]).flatten()
    # Predictions stand in the order of their rollouts.
    first = torch.searchsorted(tree.rollouts, tree.rollouts)
    index = torch.arange(len(tree.rollouts), device=tree.rollouts.device) - first
    return index < lengths.to(index.device)[tree.rollouts]
