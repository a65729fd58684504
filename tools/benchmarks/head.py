"""The language-model head, forward and backward: log-probs, gradients of both inputs.

Cases, on the same rows, weight and targets; before they are timed, their gradients are compared:

    one-pass             the gradients are made in the sweep that finds the log-probs
    saved softmax        what RL frameworks on Megatron do: all logits, then vocabulary-parallel
                         cross entropy, 3 all-reduces, softmax kept for backward
    gather, log-softmax  gather the vocabulary on every rank, then torch's log_softmax
    3 products           scores, and both gradients from them: the floor

Peak memory is what torch's allocators hold at most beyond the inputs, gradients included, added up
from the allocator events of the profiler (on a GPU: its own counter): every temporary inside an
operator counts, and neither the interpreter nor the libraries' code does. With --tensor-parallel N
there are N gloo processes of --threads threads; times and memory are those of rank 0. Ratios on a
CPU are of processor time, in which other programs that take the processor do not count.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.distributed import ReduceOp

from benchmarks.measurement import Report, interleaved, median, peak_memory

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_rmt.model.head import token_loss_sum

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The baselines round logits to bf16 in bf16.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.02}
BASELINES = ("saved softmax", "gather, log-softmax")
FLOOR = "3 products"
CASES = ("one-pass", *BASELINES, FLOOR)
MEBIBYTE = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``benchmark.py head``."""
    parser.add_argument("--rows", type=int, nargs="+", default=[2048], help="predicted tokens")
    parser.add_argument("--vocab", type=int, default=49152, help="tokens (default 49152)")
    parser.add_argument("--hidden", type=int, default=576, help="hidden size (default 576)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of hidden and weight")
    parser.add_argument("--chunk-size", type=int, default=384, help="rows held (default 384)")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of a rank (default 1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default cpu")
    parser.add_argument("--cases", nargs="+", help="only these, by name (default: all)")


def run(flags: argparse.Namespace) -> Report:
    """Measure, on as many processes as there are tensor-parallel ranks."""
    ranks = flags.tensor_parallel
    for name in ("chunk_size", "hidden", "tensor_parallel", "threads"):
        if getattr(flags, name) < 1:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is {getattr(flags, name)}; pass 1 or more.")
    if min(flags.rows) < 1:
        raise ValueError(f"--rows is {min(flags.rows)}; pass 1 or more.")
    if flags.vocab < 2 or flags.vocab % ranks:
        raise ValueError(
            f"--vocab is {flags.vocab}; pass 2 or more, a multiple of --tensor-parallel ({ranks})."
        )
    unknown = set(flags.cases or ()) - {*CASES}
    if unknown:
        raise ValueError(f"--cases names {sorted(unknown)}; pass {[*CASES]}.")
    torch.set_num_threads(flags.threads)
    if ranks == 1:
        return _report(flags, [_measure(flags, rows, None) for rows in flags.rows])
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (flags, folder), nprocs=ranks)
        return _report(flags, torch.load(f"{folder}/results"))


def _rank(rank: int, flags: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(flags.threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "gloo" if flags.device == "cpu" else "nccl"
    if flags.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=flags.tensor_parallel,
    )
    if rank:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 until the process ends
    results = [_measure(flags, rows, dist.group.WORLD) for rows in flags.rows]
    if rank == 0:
        torch.save(results, f"{folder}/results")
    dist.destroy_process_group()


def _measure(
    flags: argparse.Namespace, rows: int, group: dist.ProcessGroup | None
) -> dict[str, dict[str, object]]:
    """Times, peak memory and error of each case for one number of rows."""
    cases = _cases(flags, rows, group)
    if flags.cases:
        cases = {name: case for name, case in cases.items() if name in flags.cases}
    memory, reference = {}, None
    for name, case in cases.items():
        memory[name], gradients = peak_memory(case, flags.device)
        if name != FLOOR:
            reference = reference or gradients
            _compare(name, gradients, reference, TOLERANCE[flags.dtype])
        del gradients

    processor: dict[str, list[float]] = {name: [] for name in cases}

    def in_step(name: str, case: Callable[[], object]) -> Callable[[], object]:
        def run_together() -> None:
            if group is not None:
                dist.barrier(group)
            began = time.process_time()
            case()
            processor[name].append(time.process_time() - began)

        return run_together

    times = interleaved({n: in_step(n, case) for n, case in cases.items()}, flags.repeats)
    return {
        name: {
            "seconds": times[name],
            # Without the warm-up, which comes first.
            "processor seconds": processor[name][-flags.repeats :],
            "peak bytes": memory[name],
        }
        for name in cases
    }


def _cases(
    flags: argparse.Namespace, rows: int, group: dist.ProcessGroup | None
) -> Mapping[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(1)
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    shard_rows = flags.vocab // ranks
    dtype = DTYPES[flags.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # Scores with a standard deviation of 3: entropies like those of a trained model.
    weight = normal(shard_rows * ranks, flags.hidden) * 3 / flags.hidden**0.5
    weight = weight[rank * shard_rows : (rank + 1) * shard_rows].to(flags.device, dtype)
    hidden = normal(rows, flags.hidden).to(flags.device, dtype)
    targets = torch.randint(flags.vocab, (rows,), generator=generator).to(flags.device)
    by_log_prob = normal(rows).to(flags.device)
    settings = {"vocab_size": flags.vocab, "tp_group": group, "chunk_size": flags.chunk_size}

    def gradients(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def forward_and_backward() -> tuple[Tensor, ...]:
            inputs = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            return torch.autograd.grad(loss_of(*inputs), inputs)

        return forward_and_backward

    def one_pass(hidden: Tensor, weight: Tensor) -> Tensor:
        return token_loss_sum(
            hidden, weight, targets, lambda rows, own: by_log_prob[rows] * own, **settings
        )[0]

    def saved_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = _parallel_logits(hidden, weight, group)
        cross_entropy = _SavedCrossEntropy.apply(logits, targets - rank * shard_rows, group)
        return -torch.dot(cross_entropy, by_log_prob)

    def gather(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = _Gather.apply(_parallel_logits(hidden, weight, group), group)
        log_probs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return torch.dot(log_probs, by_log_prob)

    def products() -> tuple[Tensor, Tensor]:
        scores = hidden @ weight.t()
        return scores @ weight, scores.t() @ hidden

    return {
        "one-pass": gradients(one_pass),
        "saved softmax": gradients(saved_softmax),
        "gather, log-softmax": gradients(gather),
        FLOOR: products,
    }


def _compare(
    name: str, gradients: tuple[Tensor, ...], reference: tuple[Tensor, ...], tolerance: float
) -> None:
    for value, expected in zip(gradients, reference, strict=True):
        error = float((value.float() - expected.float()).norm() / expected.float().norm())
        if not error < tolerance:
            raise RuntimeError(f"{name}: a gradient is off by {error:.1e}, relative.")


def _report(flags: argparse.Namespace, results: list[dict[str, dict[str, object]]]) -> Report:
    columns = ["rows", "case", "seconds", "processor s", "of floor", "of best baseline"]
    columns += ["peak MB", "of it"]
    clock = "processor seconds" if flags.device == "cpu" else "seconds"
    table = []
    for rows, cases in zip(flags.rows, results, strict=True):
        seconds = {name: median(case[clock]) for name, case in cases.items()}
        memory = {name: case["peak bytes"] for name, case in cases.items()}
        best = min((n for n in BASELINES if n in cases), key=seconds.__getitem__, default=None)
        for name in cases:
            floor = None if name == FLOOR else seconds.get(FLOOR)
            table.append(
                [
                    str(rows),
                    name,
                    f"{median(cases[name]['seconds']):.3f}",
                    f"{median(cases[name]['processor seconds']):.3f}",
                    f"{seconds[name] / floor:.2f}" if floor else "",
                    f"{seconds[name] / seconds[best]:.2f}" if best else "",
                    f"{memory[name] / MEBIBYTE:.0f}",
                    f"{memory[name] / memory[best]:.2f}" if best else "",
                ]
            )
    element = DTYPES[flags.dtype].itemsize
    of_gradients = [
        element * flags.hidden * (rows + flags.vocab // flags.tensor_parallel) / MEBIBYTE
        for rows in flags.rows
    ]
    return Report(
        title=f"Head, forward and backward: vocabulary {flags.vocab}, hidden {flags.hidden}, "
        f"{flags.dtype}, chunks of {flags.chunk_size}, {flags.tensor_parallel} rank(s)",
        columns=columns,
        rows=table,
        notes=[
            f"Medians of {flags.repeats}, interleaved; ratios are of {clock}. Best baseline: the "
            f"faster of {' and '.join(BASELINES)}.",
            "Gradients, part of every peak: "
            + ", ".join(
                f"{size:.0f} MB ({rows} rows)"
                for size, rows in zip(of_gradients, flags.rows, strict=True)
            )
            + ".",
        ],
        data={"cases": dict(zip(map(str, flags.rows), results, strict=True))},
    )


def _reduce(tensor: Tensor, operation: ReduceOp, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(tensor, op=operation, group=group)
    return tensor


class _ToEveryRank(torch.autograd.Function):
    """Megatron's copy to the tensor-parallel region: the gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx, hidden: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _reduce(gradient.contiguous(), ReduceOp.SUM, ctx.group), None


def _parallel_logits(hidden: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[rows, vocab/tp] fp32, made in the dtype of the inputs."""
    return (_ToEveryRank.apply(hidden, group) @ weight.t()).float()


class _SavedCrossEntropy(torch.autograd.Function):
    """log Z - z of the target; overwrites the logits with the softmax and keeps it.
    MAX, SUM, SUM."""

    @staticmethod
    def forward(ctx, logits: Tensor, columns: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        held = (columns >= 0) & (columns < logits.shape[1])
        columns = columns.clamp(0, logits.shape[1] - 1)
        logits -= _reduce(logits.amax(-1, keepdim=True), ReduceOp.MAX, group)
        of_target = logits.gather(1, columns[:, None])[:, 0] * held
        _reduce(of_target, ReduceOp.SUM, group)
        torch.exp(logits, out=logits)
        normaliser = _reduce(logits.sum(-1, keepdim=True), ReduceOp.SUM, group)
        ctx.save_for_backward(logits.div_(normaliser), columns, held)
        return normaliser.log()[:, 0] - of_target

    @staticmethod
    def backward(ctx, by_loss: Tensor) -> tuple[Tensor, None, None]:
        softmax, columns, held = ctx.saved_tensors
        softmax[torch.arange(len(columns), device=columns.device), columns] -= held.float()
        return softmax.mul_(by_loss[:, None]), None, None


class _Gather(torch.autograd.Function):
    """[rows, vocab] on every rank; the loss is the same on each, so each keeps its own columns."""

    @staticmethod
    def forward(ctx, logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.columns = group, logits.shape[1]
        if group is None:
            return logits.view_as(logits)
        parts = [torch.empty_like(logits) for _ in range(group.size())]
        dist.all_gather(parts, logits.contiguous(), group=group)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        first = 0 if ctx.group is None else ctx.group.rank() * ctx.columns
        return gradient[:, first : first + ctx.columns].contiguous(), None
