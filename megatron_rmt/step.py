"""One training step of RMT, as data flows through it.

    user's batches -> trunk pass (entropies, keys and values) -> tiers, curriculum, positions
    -> budget, stems, rollouts -> rewards, advantages -> (packing ->) trees
    -> Megatron's own train_step

``collect`` turns the user's micro-batches of a step into the ``Update``s that Megatron's schedules
then consume. Nothing is kept from one step to the next: everything random is a pure function of
(seed, iteration, sample, position, rollout, token), so a resumed run repeats itself.
"""

import dataclasses
import functools
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_rmt.algorithm.curriculum import Candidates, has_reserve, tiers
from megatron_rmt.algorithm.doors import DoorError
from megatron_rmt.algorithm.rewards import Metric
from megatron_rmt.algorithm.schedules import Schedule
from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.mid_training import MidTraining, positions_drawn
from megatron_rmt.model.blocks import Block
from megatron_rmt.model.context_parallel import RowSplit, balanced_bounds, context_parallel_group
from megatron_rmt.rollout.generate import RolloutSettings, StoppedError, generate
from megatron_rmt.rollout.kv_cache import KeyValueStore
from megatron_rmt.rollout.live_rollouts import RolloutPosition
from megatron_rmt.rollout.memory import CacheSize, in_bytes, key_value_bytes
from megatron_rmt.rollout.prefill import EntropyHistogram, read_trunk
from megatron_rmt.rollout.responses import Rollout
from megatron_rmt.rollout.state_cache import state_bytes
from megatron_rmt.rollout.trunk import UserBatch, build_trunk, first_rows, trunk_blocks
from megatron_rmt.update.agreement import (
    Copy,
    NotFiniteError,
    agree,
    digest,
)
from megatron_rmt.update.before_the_step import (
    chosen_alike,
    draw_problems,
    drawn_alike,
    entropy_problems,
    reward_problems,
    rewarded_alike,
)
from megatron_rmt.update.forward_step import LossSettings, Update
from megatron_rmt.update.multi_token import multi_token_predictions
from megatron_rmt.update.packing import TreeCost, repack, tree_cost
from megatron_rmt.update.replicas import copies_of_parameters
from megatron_rmt.update.report import (
    answer_metrics,
    batch_metrics,
    checksum,
    response_metrics,
    size_metrics,
    source_metrics,
    trunk_metrics,
)
from megatron_rmt.update.reserve import keep_differing
from megatron_rmt.update.scoring import bytes_before, gather_evidence, score
from megatron_rmt.update.tree import (
    ChosenPosition,
    ReasonedSample,
    Tree,
    grow_tree,
    pad_tree,
    part_of_tree,
)
from megatron_rmt.update.truth import log_probs_of_truth
from megatron_rmt.update.warm_up import response_from_text, true_target
from megatron_rmt.update.weights import loss_weights


@dataclass
class MicroBatch:
    """One of the user's micro-batches on its way through a step.

    reasoned: its samples, with the positions that are chosen and what comes of them; after packing
    other samples. first_row: of its trunk in the key-value store. entropies, predictions: of its
    rows, once read. tiers: of its rows, once its positions are chosen. metrics: what it will
    report.
    """

    reasoned: list[ReasonedSample]
    first_row: int
    entropies: Tensor | None = None
    predictions: Tensor | None = None
    tiers: Tensor | None = None
    metrics: dict[str, Metric] = field(default_factory=dict)

    @property
    def positions(self) -> list[ChosenPosition]:
        """Those of all its samples, in order."""
        return [position for of in self.reasoned for position in of.positions]


@dataclass(frozen=True)
class Collected:
    """What the update of one step needs: its micro-batches, the loss, and the wall seconds that
    each phase took on this rank. reasoned: this rank's samples as it read them, with what it rolled
    out. entropies, tiers: of these samples' rows, ``[rows]`` fp32 in nats and int64, -1 where none
    may be chosen. idle: why the whole global batch taught nothing by its rollouts, None if it
    did."""

    updates: list[Update]
    settings: LossSettings
    seconds: dict[str, float]
    reasoned: list[ReasonedSample]
    entropies: Tensor
    tiers: Tensor
    idle: str | None


def collect(
    run: MidTraining,
    batches: Sequence[UserBatch],
    schedule: Schedule,
    stop: Callable[[], bool] | None = None,
) -> Collected:
    """Everything before the update of one step, for this data-parallel rank's micro-batches.

    Context-parallel ranks have the same ones, and share the passes over them: the rows of trunks
    and trees, and the positions whose rollouts are generated.

    stop: whether this rank has been told to stop. Collective over all ranks: the ranks of one model
    work in lockstep, and the loss's global means are summed over the data-parallel ranks.

    Raises:
        CacheError: see ``_check_trunk_fits``.
        DoorError: a function of the user's own returned what it must not.
        NotFiniteError: an entropy, a log-prob, a reward or an advantage; names the sample.
        RanksDifferError: in the parameters, the choice of positions, what was drawn or rewarded.
        StoppedError: a rank has been told to stop.
        Each on all ranks.
    """
    times = [time.perf_counter()]
    copies = copies_of_parameters(run.policy.model, schedule.iteration)
    # The trunk pass, and the positions that its entropies let the curriculum choose.
    micro_batches, store = _lay_out(run, batches)
    reasoned = [of for micro_batch in micro_batches for of in micro_batch.reasoned]
    _check_trunk_fits(run, store.trunk_tokens, schedule)
    problems = []
    for micro_batch in micro_batches:
        problems += _read(run, micro_batch, store)
    found = EntropyHistogram(torch.cat([_labelled(own) for own in micro_batches]))
    thresholds = thresholds_of_step(run.settings, found)
    for micro_batch in [] if problems else micro_batches:
        problems += _choose(run, micro_batch, thresholds, schedule)
    told = stop or (lambda: False)
    where = digest(schedule, run.seed, run.args.consumed_train_samples)
    copies.append(Copy("iteration, schedule, seed or samples consumed", where, first_rank=0))
    _agree(run, [*copies, *chosen_alike(reasoned)], problems, told())
    times.append(time.perf_counter())
    # Rollouts of all micro-batches together.
    stopped = _respond(run, micro_batches, store, schedule, stop)
    _agree(run, drawn_alike(reasoned), draw_problems(reasoned), stopped or told())
    times.append(time.perf_counter())
    # Rewards and advantages.
    problems = []
    for micro_batch in micro_batches:
        problems += _score(run, micro_batch, schedule)
        micro_batch.metrics |= batch_metrics(run.settings, found, thresholds)
    _agree(run, rewarded_alike(reasoned), problems + reward_problems(reasoned), told())
    # Trees of the positions that are trained, with the weights of the loss of the global batch.
    for own in micro_batches if has_reserve(run.select) else []:
        own.metrics |= keep_differing(own.reasoned, schedule)
    if run.settings.max_tokens is not None:
        _repack(run, micro_batches, schedule)
    updates, settings, idle = _grow(run, micro_batches, schedule)
    times.append(time.perf_counter())
    phases = ("trunk", "rollout", "tree")
    seconds = {name: times[i + 1] - times[i] for i, name in enumerate(phases)}
    entropies = torch.cat([own.entropies for own in micro_batches])
    tier = torch.cat([own.tiers for own in micro_batches])
    return Collected(updates, settings, seconds, reasoned, entropies, tier, idle)


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


def _lay_out(
    run: MidTraining, batches: Sequence[UserBatch]
) -> tuple[list[MicroBatch], KeyValueStore]:
    """The micro-batches' trunks, and room for the keys and values of all of them."""
    micro_batches, rows = [], 0
    for batch, indices in zip(batches, global_sample_indices(run.args, len(batches)), strict=True):
        trunk = build_trunk(
            batch,
            indices,
            preamble=run.prompt.preamble,
            begin=run.prompt.begin,
            end_of_document=run.prompt.end_of_document,
            separate_documents=run.args.reset_attention_mask,
            vocab_size=run.policy.vocab_size,
        )
        micro_batches.append(MicroBatch([ReasonedSample(sample) for sample in trunk], rows))
        rows += sum(map(len, trunk))
    return micro_batches, KeyValueStore(trunk_tokens=rows)


def _check_trunk_fits(run: MidTraining, trunk_tokens: int, schedule: Schedule) -> None:
    """How many documents, each with its prompt, a step's samples hold is known only now.

    Raises:
        CacheError: on all ranks, if the trunk of one and a position's rollouts do not fit into
            ``--rmt-rollout-kv-gib``.
    """
    settings, prompt = run.settings, run.prompt
    if settings.rollout_kv_gib is None or schedule.thought_from_text:
        return
    largest = torch.tensor([trunk_tokens, key_value_bytes(run.policy.model)])
    largest = largest.to(run.policy.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    trunk_tokens, token_bytes = largest.tolist()
    size = CacheSize(
        token_bytes=token_bytes,
        trunk_tokens=trunk_tokens,
        rows=schedule.group,
        rows_per_position=schedule.group,
        tail_tokens=prompt.longest_tail(schedule.tier_budgets, schedule.warm_up),
        in_flight=parallel_state.get_pipeline_model_parallel_world_size(),
        states=state_bytes(run.policy.model),
    )
    size.positions_at_once(in_bytes(settings.rollout_kv_gib))


def _read(run: MidTraining, micro_batch: MicroBatch, store: KeyValueStore) -> list[Exception]:
    """Read one trunk. Returns what is wrong with its entropies, as the other ranks must hear of it
    before one of them leaves."""
    trunk = [of.sample for of in micro_batch.reasoned]
    top_k = run.settings.entropy_top_k
    split = _split(run, trunk_blocks(trunk))
    found = read_trunk(run.policy, trunk, store, micro_batch.first_row, top_k=top_k, split=split)
    micro_batch.entropies, micro_batch.predictions = found.entropies, found.predictions
    return entropy_problems(trunk, micro_batch.entropies)


def thresholds_of_step(settings: Settings, found: EntropyHistogram) -> tuple[float, ...]:
    """Lower ends of the tiers, in nats, where these entropies are ``found`` in the global batch."""
    if settings.threshold_quantiles is None:
        return settings.entropy_thresholds
    return found.quantiles(settings.threshold_quantiles)


def _choose(
    run: MidTraining, own: MicroBatch, thresholds: Sequence[float], schedule: Schedule
) -> list[Exception]:
    """Choose one trunk's positions by its entropies. Returns what is wrong with them, likewise."""
    try:
        own.tiers = choose(run, own.reasoned, own.entropies, thresholds, schedule)
    except DoorError as error:
        return [error]
    own.metrics |= trunk_metrics(
        own.reasoned,
        own.entropies,
        own.predictions,
        own.tiers,
        schedule,
        run.settings.entropy_ceiling,
    )
    own.metrics |= answer_metrics(own.reasoned, run.prompt)
    own.metrics |= source_metrics(own.reasoned, run.settings)
    return []


def choose(
    run: MidTraining,
    reasoned: Sequence[ReasonedSample],
    entropies: Tensor,
    thresholds: Sequence[float],
    schedule: Schedule,
) -> Tensor:
    """Choose the positions of samples whose rows have ``entropies`` ``[rows]``; returns the tier of
    every row, -1 where it may not be chosen. thresholds: lower ends of the tiers, nats.

    Raises:
        DoorError: the selection returned something else than positions that may be chosen.
    """
    stems = {budget: run.prompt.stem(budget) for budget in set(schedule.tier_budgets)}
    found = []
    for of, own in zip(reasoned, entropies.split([len(of.sample) for of in reasoned]), strict=True):
        sample = of.sample
        eligible = sample.labelled & (sample.columns >= 0)
        eligible &= run.prompt.answerable[sample.labels.clamp(min=0)] & (not sample.plain)
        tier = torch.where(eligible, tiers(own, thresholds, run.settings.entropy_ceiling), -1)
        rows = run.select(
            Candidates(
                entropies=own,
                tiers=tier,
                probabilities=schedule.probabilities,
                count=positions_drawn(run.settings, run.select, schedule),
                progress=schedule.progress,
                seed=run.seed,
                iteration=schedule.iteration,
                sample=sample.index,
                trunk=functools.partial(bytes_before, run.prompt, sample),
            )
        )
        in_any_order = has_reserve(run.select)
        ascending = sorted(rows) if in_any_order else rows
        if ascending != sorted(set(rows) & set(range(len(sample)))) or (tier[rows] < 0).any():
            raise DoorError(
                f"--rmt-select {run.settings.select} returned {rows} for a sample; return a list "
                "of positions whose tier is 0 or more, "
                f"{'' if in_any_order else 'ascending, '}each once."
            )
        budgets = [schedule.tier_budgets[tier[row]] for row in ascending]
        of.positions = [
            ChosenPosition(row, budget, stems[budget], place=rows.index(row))
            for row, budget in zip(ascending, budgets, strict=True)
        ]
        found.append(tier)
    return torch.cat(found)


def _labelled(micro_batch: MicroBatch) -> Tensor:
    """The entropies of the rows whose prediction counts, of samples that are not plain."""
    samples = [of.sample for of in micro_batch.reasoned]
    return micro_batch.entropies[torch.cat([own.labelled & (not own.plain) for own in samples])]


def _respond(
    run: MidTraining,
    micro_batches: Sequence[MicroBatch],
    store: KeyValueStore,
    schedule: Schedule,
    stop: Callable[[], bool] | None,
) -> bool:
    """Draw the responses to all chosen positions, or take them from the text, and read them.

    Returns whether this rank's model has been told to stop, and holds no responses.
    """
    if schedule.thought_from_text:
        for of in (of for own in micro_batches for of in own.reasoned):
            for position in of.positions:
                rollout, response = response_from_text(
                    run.prompt, of.sample, position.row, position.budget
                )
                position.rollouts, position.responses = [rollout], [response]
        return False
    settings = run.settings
    how = RolloutSettings(
        group=schedule.group,
        budget=schedule.budget,
        seed=run.seed,
        iteration=schedule.iteration,
        temperature=settings.temperature,
        greedy=settings.greedy,
        top_k=settings.top_k,
        top_p=settings.top_p,
        kv_bytes=in_bytes(settings.rollout_kv_gib),
        writes_truth=schedule.warm_up,
        graph=not settings.no_decode_graph,
    )
    places = _rollout_positions(run, micro_batches, schedule)
    positions = [position for own in micro_batches for position in own.positions]
    found: dict[int, list[Rollout]] = {}
    stopped = False
    # Positions that are asked for as much are decoded together. Ranks that share experts take part
    # in each other's passes, so all of them come here equally often, whatever they hold.
    for budget in sorted(set(schedule.tier_budgets)):
        own = [] if stopped else [i for i, at in enumerate(positions) if at.budget == budget]
        own = _share(own)
        asked, of_budget = [places[i] for i in own], dataclasses.replace(how, budget=budget)
        try:
            groups = generate(run.policy, run.prompt, store, asked, of_budget, stop)
        except StoppedError:
            stopped = True
            continue
        found |= zip(own, groups, strict=True)
    for of_rank, stopped_there in _of_context_parallel_ranks((found, stopped)):
        found |= of_rank
        stopped |= stopped_there
    for i, group in found.items():
        positions[i].rollouts = group
        positions[i].responses = [run.prompt.read(one.tokens.tolist()) for one in group]
    return stopped


def _share[T](items: Sequence[T]) -> Sequence[T]:
    """What this context-parallel rank does of ``items``: neighbours, as many as the others."""
    group, count = context_parallel_group(), len(items)
    if group is None:
        return items
    first, limit = (count * rank // group.size() for rank in (group.rank(), group.rank() + 1))
    return items[first:limit]


def _of_context_parallel_ranks[T](value: T) -> list[T]:
    """``value`` of each of the context-parallel ranks. Collective over them."""
    group = context_parallel_group()
    if group is None:
        return [value]
    found = [value] * group.size()
    dist.all_gather_object(found, value, group=group)
    return found


def _rollout_positions(
    run: MidTraining, micro_batches: Sequence[MicroBatch], schedule: Schedule
) -> list[RolloutPosition]:
    """Where the contexts of the chosen positions lie in the stored trunks."""
    found = []
    for own in micro_batches:
        starts = first_rows([of.sample for of in own.reasoned])
        for of, start in zip(own.reasoned, starts, strict=True):
            for position in of.positions:
                sample, row, first = of.sample, position.row, own.first_row + start
                truth = true_target(run.prompt, sample, row) if schedule.warm_up else []
                found.append(
                    RolloutPosition(
                        sample=sample.index,
                        column=int(sample.columns[row]),
                        first=first + sample.document_of(row)[0],
                        limit=first + row + 1,
                        next_position=int(sample.position_ids[row]) + 1,
                        truth=tuple(run.prompt.true_answer(truth)) if truth else (),
                    )
                )
    return found


def _score(run: MidTraining, micro_batch: MicroBatch, schedule: Schedule) -> list[Exception]:
    """Rewards and advantages of one micro-batch's responses. Returns what is wrong with them, as
    the other ranks must hear of it before one of them leaves."""
    reasoned, positions = micro_batch.reasoned, micro_batch.positions

    # What runs the model, if a reward asks for it.
    @functools.cache
    def of_truth() -> tuple[Tensor, Tensor]:
        split = functools.partial(_split, run)
        read = functools.partial(log_probs_of_truth, run.policy, run.prompt, split=split)
        without, after = read(reasoned, schedule.group)
        if run.baseline is not None:
            none = {"rollouts": [], "responses": []}
            silent = [
                ReasonedSample(
                    of.sample, [dataclasses.replace(own, **none) for own in of.positions]
                )
                for of in reasoned
            ]
            with run.baseline.in_place_of_the_weights():
                without, _ = read(silent, group=1)
        return without, after

    evidence = gather_evidence(run.prompt, reasoned, schedule, of_truth)
    places = [(of.sample, position) for of in reasoned for position in of.positions]
    try:
        score(positions, evidence, run.reward, run.settings, warm_up=schedule.warm_up)
        micro_batch.metrics |= response_metrics(
            positions, evidence, run.settings, schedule, run.prompt
        )
    except NotFiniteError as error:
        sample, position = places[error.position]
        return [NotFiniteError(f"{error} It was for {sample.place(position.row)}")]
    except DoorError as error:
        return [error]
    micro_batch.metrics["rmt rollout checksum"] = checksum(reasoned)
    return []


def _agree(run: MidTraining, copies: list[Copy], problems: Sequence[Exception], stop: bool) -> None:
    """See ``update.agreement.agree``."""
    agree(copies, run.policy.device, error=problems[0] if problems else None, stop=stop)


def _repack(run: MidTraining, micro_batches: Sequence[MicroBatch], schedule: Schedule) -> None:
    """Deal the samples out again over the data-parallel ranks and their micro-batches."""
    packed = repack(
        [own.reasoned for own in micro_batches],
        _tree_cost(run),
        max_tokens=run.settings.max_tokens,
        use_all=parallel_state.get_pipeline_model_parallel_world_size() > 1,
        dp_group=parallel_state.get_data_parallel_group(),
        device=torch.device(torch.cuda.current_device()),
    )
    for micro_batch, reasoned in zip(micro_batches, packed, strict=True):
        micro_batch.reasoned = reasoned


def _grow(
    run: MidTraining, micro_batches: Sequence[MicroBatch], schedule: Schedule
) -> tuple[list[Update], LossSettings, str | None]:
    """The trees, with the weights of the loss of the global batch, and ``Collected.idle``."""
    settings = run.settings
    trees = [
        grow_tree(
            own.reasoned,
            longest_position=run.policy.longest_position,
            device=run.policy.device,
            attention=run.policy.attention,
        )
        for own in micro_batches
    ]
    layers = run.policy.model.config.mtp_num_layers or 0
    further = [
        multi_token_predictions(
            own.reasoned,
            layers,
            row_multiple=_row_multiple(run.args),
            longest_position=run.policy.longest_position,
            device=run.policy.device,
            attention=run.policy.attention,
        )
        for own in (micro_batches if layers else ())
    ]
    totals = torch.tensor(
        [
            float(sum(len(own.positions) for own in micro_batches)),
            sum(float(tree.ntp_mask.sum()) for tree in trees),
            float(sum(any(at.advantages) for own in micro_batches for at in own.positions)),
            *map(sum, zip(*(own.counts for own in further), strict=True)),
        ]
    ).to(run.policy.device)
    dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
    positions, ntp_tokens, telling, *further_tokens = totals.tolist()
    weights = [
        loss_weights(own.positions, tree, positions, ntp_tokens, schedule)
        for own, tree in zip(micro_batches, trees, strict=True)
    ]
    # What this rank computes of them: all, or its part of the rows.
    parts = [*trees]
    for index, tree in enumerate(trees):
        split = _split(run, tree.visibility.blocks)
        if split is not None:
            parts[index], held = part_of_tree(tree, split)
            weights[index] = weights[index].at(held)
    parts = _aligned(run.args, parts)
    slots = float(len(micro_batches) * parallel_state.get_data_parallel_world_size())
    updates = []
    for own, tree, part, of, ahead in zip(
        micro_batches, trees, parts, weights, further or [None] * len(trees), strict=True
    ):
        own.metrics |= size_metrics(own.reasoned, tree, part, settings.max_tokens, slots)
        updates.append(Update(part, of, own.metrics, reasoned=own.reasoned, further=ahead))
    loss = LossSettings(
        ntp_coefficient=0.0 if settings.no_ntp else settings.ntp_coefficient,
        temperature=settings.temperature,
        vocab_size=run.policy.vocab_size,
        chunk_size=run.policy.head_chunk_size,
        ntp_tokens=max(ntp_tokens, 1.0),
        scale=slots * parallel_state.get_context_parallel_world_size(),
        loss=run.loss,
        further_tokens=further_tokens,
    )
    return updates, loss, idle_reason(positions, ntp_tokens, telling, schedule.warm_up)


def _split(run: MidTraining, blocks: Sequence[Block]) -> RowSplit | None:
    """How context-parallel ranks, if there are any, share the rows of ``blocks``: by the operations
    of the layers, as if none had a window."""
    group = context_parallel_group()
    if group is None:
        return None
    cost = _tree_cost(run)
    bounds = balanced_bounds(blocks, group.size(), row_cost=cost.token, pair_cost=cost.pair)
    return RowSplit(bounds, group)


def _tree_cost(run: MidTraining) -> TreeCost:
    pattern = run.args.hybrid_layer_pattern
    return tree_cost(run.policy.model.config, run.policy.vocab_size, pattern)


def idle_reason(positions: float, ntp_tokens: float, telling: float, warm_up: bool) -> str | None:
    """Why the rollouts of a global batch teach nothing, in words; None if they do.

    telling: positions whose rewards differ; in the warm-up written answers teach too.
    """
    if positions == 0 and ntp_tokens == 0:
        return "no token counts: everywhere the loss mask is 0 or the label is none of the tokens"
    if positions == 0:
        return (
            "no position could be chosen: none that counts is as uncertain as "
            "--rmt-entropy-thresholds asks for and below --rmt-entropy-ceiling, --rmt-select took "
            "none, or all samples are of --rmt-skip-sources"
        )
    if telling == 0 and not warm_up:
        return "the rewards of no group differ: all responses to a position earn the same"
    return None


def _row_multiple(args: Namespace) -> int:
    """What the number of rows of the update's passes must be a multiple of."""
    multiple = args.tensor_model_parallel_size if args.sequence_parallel else 1
    # FP8 matrix products want their leading dimension in whole blocks (Transformer Engine).
    return multiple * (128 if getattr(args, "fp8", None) else 1)


def _aligned(args: Namespace, trees: list[Tree]) -> list[Tree]:
    """Trees padded to what the layout asks: pipeline stages exchange micro-batches of one size."""
    multiple = _row_multiple(args)
    longest = max(tree.tokens.shape[0] for tree in trees)
    same = parallel_state.get_pipeline_model_parallel_world_size() > 1
    # A rank that holds no row of a tree has one of padding.
    rows = [max(1, longest if same else tree.tokens.shape[0]) for tree in trees]
    return [
        pad_tree(tree, -(-count // multiple) * multiple)
        for tree, count in zip(trees, rows, strict=True)
    ]
