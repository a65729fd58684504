"""What a run of RMT will take, before it is started: tokens, FLOPs, memory of a rank, seconds.

    python tools/plan.py --recipe examples/recipes/qwen3-14b.args --world-size 16
    python tools/plan.py --recipe RECIPE --world-size N --model HF_DIR [any Megatron or RMT flag]

Takes what the run takes: a recipe and flags that replace those in it. No model is built and no GPU
is needed. The model is that of ``--model`` (a Hugging Face directory or its config.json), of
``--model-flags`` (written by tools/convert_checkpoint.py), of the folder CHECKPOINT, else of the
config.json that lies beside the recipe under its name. docs/planning.md says how the numbers are
made and how far they were checked; times on a GPU never were.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS), str(TOOLS.parent)]

from megatron_rmt.job import console

if __name__ == "__main__":
    # Before Megatron is imported, which warns of what no plan needs.
    console.leave_out_library_warnings()
for name in ("megatron", "transformers"):
    logging.getLogger(name).setLevel(logging.ERROR)

from megatron_rmt.algorithm.curriculum import SELECTIONS
from megatron_rmt.algorithm.doors import find
from megatron_rmt.algorithm.schedules import Schedule, schedule_of_step
from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.cpu.platform import add_required_flags
from megatron_rmt.mid_training import positions_drawn
from megatron_rmt.prompt.prompt import Prompt
from planning.memory import RankMemory, as_gib, largest_rank, micro_batch, model_parameters
from planning.settings import (
    StepLengths,
    complete_settings,
    corpus_documents,
    is_counted,
    lengths_of_step,
    model_words,
    parse_flags,
    prompt_of,
)
from planning.time import HARDWARE, Hardware, StepSeconds, step_seconds
from planning.work import (
    Documents,
    SampleWork,
    StepFlops,
    sample_work,
    step_flops,
    without_rollouts,
)

# Steps at which the mean over a run is taken.
SAMPLED_STEPS = 1000


def arguments() -> argparse.ArgumentParser:
    """The planner's own flags; all others are the run's."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--recipe", type=Path, help="file of flags, as RECIPE of examples/pretrain_rmt.sh")
    add("--world-size", type=int, default=1, help="ranks of the run (default 1)")
    add("--model", type=Path, help="Hugging Face directory or its config.json")
    add("--model-flags", type=Path, help="model_flags.txt of a converted checkpoint, or its folder")
    add("--hardware", choices=[*HARDWARE, "cpu"], default="h100", help="of a rank (default h100)")
    add("--efficiency", type=float, default=0.4, help="share of peak FLOP/s (default 0.4)")
    add(
        "--bandwidth-efficiency",
        type=float,
        default=0.6,
        help="share of peak bandwidth while decoding (default 0.6)",
    )
    add("--memory-gib", type=float, help="memory of a rank (default: of the hardware)")
    add("--thought-length", type=float, help="mean thought in tokens (default: the budget B_t)")
    add("--answer-length", type=float, help="mean answer in tokens (default: 8, or the most)")
    add("--document-tokens", type=int, help="mean document (default: that of --data-path)")
    add("--json", type=Path, help="write all numbers to this file too")
    return parser


@dataclass(frozen=True)
class Request:
    """What is planned. given: the run's flags as parsed. thought, answer: None for the default."""

    given: Namespace
    prompt: Prompt
    world_size: int
    hardware: Hardware | None
    memory_gib: float | None
    efficiency: float
    bandwidth_efficiency: float
    thought: float | None
    answer: float | None
    document_tokens: int | None

    def settings(self, **changes: Any) -> Namespace:
        """The completed settings, with ``changes`` of flags."""
        changed = Namespace(**vars(self.given) | changes)
        return complete_settings(changed, self.world_size, self.hardware is None, self.prompt)


@dataclass(frozen=True)
class Step:
    """One step. args: the settings, with the positions and the group of this step. seconds: None
    where no hardware is known."""

    args: Namespace
    schedule: Schedule
    tokens: StepLengths
    work: SampleWork
    flops: StepFlops
    seconds: StepSeconds | None


def step_at(
    request: Request,
    args: Namespace,
    documents: Documents,
    schedule: Schedule,
    at_bound: bool = False,
) -> Step:
    """The step of ``schedule``. at_bound: every thought is as long as it may be."""
    positions, group = schedule.positions_per_sample, schedule.group
    settings = Settings.of(args)
    select = find("--rmt-select", settings.select, SELECTIONS)
    own = {"rmt_positions_per_sample": positions, "rmt_group_size": group}
    own["positions_drawn"] = positions_drawn(settings, select, schedule)
    args = Namespace(**vars(args) | own)
    written = request.thought is None or schedule.thought_from_text

    def thought(budget: int, bound: int) -> float:
        return bound if at_bound else budget if written else request.thought

    answer = min(8, args.rmt_answer_tokens) if request.answer is None else request.answer
    tokens = lengths_of_step(request.prompt, schedule, thought, answer)
    work = sample_work(args, documents, tokens.lengths)
    if schedule.thought_from_text:
        work = without_rollouts(work)
    flops = step_flops(args, work)
    seconds = None
    if request.hardware is not None:
        shares = request.efficiency, request.bandwidth_efficiency
        responses = tokens.longest, tokens.passes
        seconds = step_seconds(args, work, flops, *responses, request.hardware, *shares)
        if schedule.thought_from_text:
            seconds = dataclasses.replace(seconds, rollout=0.0, passes=0.0)
    return Step(args, schedule, tokens, work, flops, seconds)


@dataclass(frozen=True)
class Plan:
    """first, last: steps of the run. mean: of what ``numbers`` gives, over its steps. memory,
    memory_at_bound: of the rank that needs most, in the first step or, if that is more, in the
    first one after the warm-up."""

    args: Namespace
    documents: Documents
    corpus: str
    first: Step
    last: Step
    mean: dict[str, float]
    memory: RankMemory
    memory_at_bound: RankMemory


def make_plan(request: Request, **changes: Any) -> Plan:
    """The plan of ``request`` with ``changes`` of flags.

    Raises:
        ValueError: one sentence on what cannot be planned, or would be refused by the run.
    """
    args = request.settings(**changes)
    documents, corpus = corpus_documents(args, request.document_tokens)
    count = min(args.train_iters, SAMPLED_STEPS)
    settings = Settings.of(args)
    drawn = [
        schedule_of_step(settings, index * args.train_iters // count, args.train_iters)
        for index in range(count)
    ]
    # Steps differ in nothing else that counts here.
    same = {"iteration": 0, "progress": 0.0}
    if settings.tier_budgets is None:
        same["probabilities"] = None
    kinds = Counter(dataclasses.replace(step, **same) for step in drawn)
    steps = {kind: step_at(request, args, documents, kind) for kind in kinds}
    last = schedule_of_step(settings, args.train_iters - 1, args.train_iters)
    all_numbers = {kind: numbers(step) for kind, step in steps.items()}
    first = next(iter(kinds))
    mean = {
        name: sum(all_numbers[kind][name] * times for kind, times in kinds.items()) / count
        for name in all_numbers[first]
    }
    # The first steps of either kind have the longest thoughts, unless the tiers' budgets differ. A
    # warm-up from the text is counted as if it rolled out, which is more than it takes.
    fullest = [steps[first], *(step for kind, step in steps.items() if not kind.warm_up)]
    fullest = fullest[:2] if settings.tier_budgets is None else fullest
    at_bound = [step_at(request, args, documents, step.schedule, at_bound=True) for step in fullest]
    return Plan(
        args=args,
        documents=documents,
        corpus=corpus,
        first=steps[first],
        last=step_at(request, args, documents, last),
        mean=mean,
        memory=_fullest(fullest),
        memory_at_bound=_fullest(at_bound),
    )


def _fullest(steps: Sequence[Step]) -> RankMemory:
    memories = [largest_rank(step.args, step.work, step.tokens.allocated) for step in steps]
    return max(memories, key=lambda memory: memory.peak)


def numbers(step: Step) -> dict[str, float]:
    """Of a step and its global batch: tokens, FLOPs, seconds of a rank."""
    args, tokens = step.args, step.work.tokens
    batch = args.global_batch_size
    rolled_out = 0.0 if step.schedule.thought_from_text else tokens.stem + tokens.branch
    values = {
        "budget": step.tokens.budget,
        "thought length": step.tokens.thought,
        "trunk tokens": batch * tokens.trunk,
        "stem tokens": batch * tokens.stem,
        "branch tokens": batch * tokens.branch,
        "tokens of the update": batch * tokens.tree,
        "tokens of the update, naive": batch * tokens.naive_update,
        "tokens of the rollouts": batch * rolled_out,
        "tokens of the rollouts, naive": batch * tokens.naive_rollout,
        "tokens of a micro-batch": micro_batch(args, step.work).rows,
    }
    flops = dataclasses.asdict(step.flops) | {"total": step.flops.total}
    values |= {f"FLOPs, {name.replace('_', ' ')}": value for name, value in flops.items()}
    if step.seconds is not None:
        seconds = dataclasses.asdict(step.seconds) | {"total": step.seconds.total}
        passes = seconds.pop("passes")
        values |= {f"seconds, {name}": value for name, value in seconds.items()}
        values["decode passes"] = passes
    return values


Changes = dict[str, Any]


def possible_changes(plan: Plan, limit: float) -> Iterator[Changes]:
    """Flags that need less memory, those that cost the run least first. limit: GiB of a rank."""
    args, memory = plan.args, plan.memory_at_bound
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    if args.data_parallel_size > 1 and not args.use_distributed_optimizer:
        yield {"use_distributed_optimizer": True}
    if tp > 1 and not args.sequence_parallel and not args.on_cpu:
        yield {"sequence_parallel": True}
    others = (memory.rollout_peak - memory.key_values) / 2**30
    bound = int(2 * 0.95 * (limit - others)) / 2
    if memory.rollout_peak > memory.update_peak and bound > 0:
        yield {"rmt_rollout_kv_gib": int(bound) if bound % 1 == 0 else bound}
    if args.recompute_granularity != "full":
        full = {"recompute_granularity": "full", "recompute_method": "uniform"}
        yield full | {"recompute_num_layers": 1}
    if args.micro_batch_size > 1:
        yield {"micro_batch_size": 1}
    if args.rmt_max_tokens is not None:
        yield {"rmt_max_tokens": None}
    if args.num_experts and args.expert_model_parallel_size < args.num_experts:
        yield {"expert_model_parallel_size": 2 * args.expert_model_parallel_size}
    if tp < 8:
        yield {"tensor_model_parallel_size": 2 * tp, "sequence_parallel": not args.on_cpu}
    yield {"pipeline_model_parallel_size": 2 * pp}
    for name, least in (
        ("rmt_positions_per_sample", 1),
        ("rmt_initial_budget", max(1, args.rmt_minimum_budget)),
        ("seq_length", 128),
    ):
        half = getattr(args, name) // 2
        if half >= least:
            yield {name: half}


def as_flags(changes: Changes) -> str:
    """``changes`` as on a command line."""
    words = []
    for name, value in changes.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [flag] * value
        else:
            words.append(f"without {flag}" if value is None else f"{flag} {value}")
    return " ".join(words)


def advice(request: Request, plan: Plan, limit: float) -> list[str]:
    """What to change for every thought at its bound to fit into ``limit`` GiB."""

    def peak(of: Plan) -> float:
        return of.memory_at_bound.peak / 2**30

    def smaller(than: Plan, before: Changes) -> Iterator[tuple[Changes, Plan]]:
        """Each change that helps, made after those ``before``, with the plan that it gives."""
        for changes in possible_changes(than, limit):
            try:
                result = make_plan(request, **before | changes)
            except ValueError:
                # Sizes that do not divide, or positions that do not fit.
                continue
            if peak(result) < 0.98 * peak(than):
                yield changes, result

    lines = []
    for changes, result in smaller(plan, {}):
        fits = "fits" if peak(result) <= limit else "not enough alone"
        lines.append(f"  {as_flags(changes)}: {peak(result):.1f} GiB, {fits}")
    current, total = plan, Changes()
    together: dict[str, Changes] = {}
    while peak(current) > limit:
        changes, current = next(smaller(current, total), (None, current))
        if changes is None:
            lines.append("  no such change suffices: take more ranks (--world-size).")
            return lines
        total |= changes
        together[next(iter(changes))] = changes
    if len(together) > 1:
        flags = " ".join(map(as_flags, together.values()))
        lines.append(f"  together {flags}: {peak(current):.1f} GiB, fits")
    return lines


def report(request: Request, plan: Plan) -> str:
    """The plan as text."""
    args, prompt = plan.args, request.prompt
    columns = {
        "first step": numbers(plan.first),
        "last step": numbers(plan.last),
        "mean of the run": plan.mean,
    }
    moe = f", EP {args.expert_model_parallel_size}" if args.num_experts else ""
    device = request.hardware.name if request.hardware else "CPU"
    lengths = "counted by its tokenizer" if is_counted(prompt) else "estimated, no tokenizer here"
    stem = len(prompt.stem(plan.first.schedule.budget))
    parts = " / ".join(f"{part:g}" for part in args.rmt_tier_budgets or ())
    asked = f"{parts} x B_t (easy / medium / hard)" if parts else "B_t"
    thoughts = asked if request.thought is None else f"{request.thought:g}"
    most = "twice that" if parts else "2 * B_t"
    lines = [
        f"Plan: {model_parameters(args) / 1e9:.3g} billion parameters on {args.world_size} x "
        f"{device}, TP {args.tensor_model_parallel_size}, PP {args.pipeline_model_parallel_size}"
        f"{f' x {args.chunks} virtual' if args.chunks > 1 else ''}, "
        f"DP {args.data_parallel_size}{moe}; {args.global_batch_size} samples of "
        f"{args.seq_length} tokens, {args.rmt_positions_per_sample} positions x "
        f"{args.rmt_group_size} rollouts in each.",
        "All numbers are estimates. Assumed:",
        f"  thoughts of {thoughts} tokens (at most {most}), all positions found, uniform in the "
        "sample;",
        f"  prompt {lengths}: head {len(prompt.preamble)}, stem {stem} tokens;",
        f"  {plan.corpus}: {plan.documents.pieces:.3g} a sample.",
        "",
        _table(columns),
        "",
        _memory_table(plan),
        "",
        *_verdict(request, plan),
    ]
    if request.hardware is not None:
        hours = plan.mean["seconds, total"] * args.train_iters / 3600
        lines += [
            "",
            f"Time is an estimate, unverified on GPU: {request.efficiency:.0%} of "
            f"{request.hardware.tflops:g} TFLOP/s, {request.bandwidth_efficiency:.0%} of "
            f"{request.hardware.bandwidth:g} GB/s, each batch of rollouts decoded until one "
            f"reaches its bound. {args.train_iters} steps: {hours:.1f} h, "
            f"{hours * args.world_size:.0f} device hours.",
        ]
    return "\n".join(lines)


def _table(columns: Mapping[str, Mapping[str, float]]) -> str:
    names = [*next(iter(columns.values()))]
    width = max(len(name) for name in names)
    lines = [" " * width + "".join(f"{title:>17}" for title in columns)]
    for name in names:
        values = "".join(f"{_short(column[name]):>17}" for column in columns.values())
        lines.append(f"{name:<{width}}{values}")
    return "\n".join(lines)


def _short(value: float) -> str:
    if value >= 1e7:
        return f"{value:.3e}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _memory_table(plan: Plan) -> str:
    assumed, bound = as_gib(plan.memory), as_gib(plan.memory_at_bound)
    lines = [f"{'GiB of the fullest rank, first step':<37}{'as assumed':>12}{'all at 2 * B_t':>16}"]
    for name, value in assumed.items():
        lines.append(f"  {name.replace('_', ' '):<35}{value:>12.2f}{bound[name]:>16.2f}")
    return "\n".join(lines)


def _verdict(request: Request, plan: Plan) -> list[str]:
    limit = request.memory_gib
    if limit is None:
        return ["No --memory-gib given: whether it fits is not judged."]
    assumed, bound = plan.memory.peak / 2**30, plan.memory_at_bound.peak / 2**30
    if bound <= limit:
        return [f"Fits into {limit:g} GiB, even if every thought runs to its bound."]
    if assumed <= limit:
        first = (
            f"Fits into {limit:g} GiB with thoughts as assumed, not if all of a micro-batch run to "
            f"their bound ({bound:.1f} GiB). To be safe:"
        )
    else:
        peaks = f"{assumed:.1f}" if bound - assumed < 0.1 else f"{assumed:.1f} to {bound:.1f}"
        first = f"Does not fit into {limit:g} GiB: it takes {peaks} GiB. Change:"
    return [first, *advice(request, plan, limit)]


def write_json(request: Request, plan: Plan, path: Path) -> None:
    """All numbers, replaced in one step."""
    content = {
        "estimates": True,
        "settings": {name: value for name, value in vars(plan.args).items() if _is_plain(value)},
        "prompt lengths are exact": is_counted(request.prompt),
        "documents": dataclasses.asdict(plan.documents) | {"source": plan.corpus},
        "first step": numbers(plan.first),
        "last step": numbers(plan.last),
        "mean of the run": plan.mean,
        "memory of a rank in GiB": {
            "thoughts as assumed": as_gib(plan.memory),
            "every thought at its bound": as_gib(plan.memory_at_bound),
            "limit": request.memory_gib,
        },
        "parameters": model_parameters(plan.args),
        "hardware": None if request.hardware is None else dataclasses.asdict(request.hardware),
        "efficiency": request.efficiency,
        "bandwidth efficiency": request.bandwidth_efficiency,
    }
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | list | None)


def read_request(words: Sequence[str]) -> tuple[Request, Path | None]:
    """The request that a command line makes, and where JSON is to go.

    Raises:
        ValueError: one sentence on what cannot be planned.
    """
    flags, others = arguments().parse_known_args(words)
    for name in ("efficiency", "bandwidth_efficiency"):
        if not 0 < getattr(flags, name) <= 1:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} is {getattr(flags, name)}; pass a share above 0, at most 1.")
    for name in ("memory_gib", "thought_length", "answer_length", "document_tokens"):
        value = getattr(flags, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; pass a number above 0.")
    hardware = HARDWARE.get(flags.hardware)
    if hardware is None:
        others = add_required_flags(others)
    model = model_words(flags.model, flags.model_flags, flags.recipe)
    given = parse_flags(flags.recipe, others, model)
    memory = flags.memory_gib
    request = Request(
        given=given,
        prompt=prompt_of(given),
        world_size=flags.world_size,
        hardware=hardware,
        memory_gib=memory or (hardware.memory if hardware else None),
        efficiency=flags.efficiency,
        bandwidth_efficiency=flags.bandwidth_efficiency,
        thought=flags.thought_length,
        answer=flags.answer_length,
        document_tokens=flags.document_tokens,
    )
    return request, flags.json


def main() -> None:
    """Print a plan; bad input ends it with one sentence."""
    try:
        request, path = read_request(sys.argv[1:])
        plan = make_plan(request)
        text = report(request, plan)
    except ValueError as error:
        sys.exit(f"plan.py: {error}")
    print(text)
    if path:
        write_json(request, plan, path)


if __name__ == "__main__":
    main()
