"""RMT's training program on the null device, as one rank of one or many: what the host did.

    python -m tests.null_cuda.rehearsal --report FILE [options] -- FLAGS of examples/pretrain_rmt.py

Runs on the device of ``device.run``. The report is JSON: of each phase, how often it came, and for
each time the events of ``device.counts`` and the largest memory; and how many graphs were compiled.
"""

import argparse
import contextlib
import functools
import importlib.machinery
import json
import os
import runpy
import sys
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.null_cuda import answers, device, experts, ranks

PRETRAIN = device.REPOSITORY / "examples/pretrain_rmt.py"

# Of a decode step: the pass, and taking the tokens of the one before.
DECODE, TAKE = "decode", "take tokens"


@dataclass
class Phase:
    """One time that a phase ran: how often each event happened in it, the most bytes that the
    allocator had given out and had reserved, what is known besides."""

    events: dict[str, int]
    allocated: int
    reserved: int
    known: dict[str, Any] = field(default_factory=dict)


class Recorder:
    """The phases of a run, which may hold one another."""

    def __init__(self) -> None:
        self.phases: dict[str, list[Phase]] = defaultdict(list)
        # Of each open phase, the peaks that were seen before the newest reset of torch's.
        self._open: list[tuple[int, int]] = []

    @contextlib.contextmanager
    def phase(self, name: str, **known: Any) -> Iterator[None]:
        """What happens inside is a phase of this name."""
        before = device.counts()
        self._take_peaks()
        self._open.append((0, 0))
        try:
            yield
        finally:
            self._take_peaks()
            peaks = self._open.pop()
            self._take_peaks(peaks)
            events = {n: count - before[n] for n, count in device.counts().items()}
            events = {n: count for n, count in events.items() if count}
            self.phases[name].append(Phase(events, *peaks, known))

    def _take_peaks(self, peaks: tuple[int, int] = (0, 0)) -> None:
        if self._open:
            now = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            self._open[-1] = tuple(map(max, self._open[-1], now, peaks))
        torch.cuda.reset_peak_memory_stats()

    def record(
        self, owner: Any, name: str, phase: str, know: Callable[..., dict[str, Any]] | None = None
    ) -> None:
        """Every call of ``owner.name`` is a phase. know: what is known of one, by its arguments."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase, **(know(*args, **kwargs) if know else {})):
                return function(*args, **kwargs)

        setattr(owner, name, recorded)


def record_steps(recorder: Recorder) -> None:
    """Record the phases of RMT's steps; their names are those of the report."""
    from megatron.training import training

    from megatron_rmt import step
    from megatron_rmt.job import train_step
    from megatron_rmt.rollout import generate
    from megatron_rmt.update import forward_step

    recorder.record(training, "train_step", "step", _known_of_model)
    recorder.record(train_step, "take_batches", "batch")
    recorder.record(train_step, "collect", "rollouts and trees")
    recorder.record(step, "read_trunk", "trunk")
    recorder.record(generate._Decoder, "_read_stems", "stems")
    recorder.record(generate._Decoder, "_take_tokens", TAKE, _known_of_batch)
    recorder.record(generate._Decoder, "_decode", DECODE, _known_of_batch)
    recorder.record(forward_step, "_loss", "loss", _known_of_tree)
    for_trees = train_step._for_trees

    def recorded_for_trees(*args: Any) -> Any:
        holder = argparse.Namespace(schedule=for_trees(*args))
        recorder.record(holder, "schedule", "update")
        return holder.schedule

    train_step._for_trees = recorded_for_trees


def _known_of_model(*, model: list[Any], **_: Any) -> dict[str, Any]:
    """engine: modules that are Transformer Engine's. quantized: weights that are kept in FP8."""
    modules = [module for chunk in model for module in chunk.modules()]
    engine = sum("transformer_engine" in str(type(module).__mro__) for module in modules)
    weights = [weight for chunk in model for weight in chunk.parameters()]
    return {"engine": engine, "quantized": sum(hasattr(own, "_quantizer") for own in weights)}


def _known_of_batch(_: Any, batch: Any, *__: Any) -> dict[str, Any]:
    """rows: of the pass. samples: whose trunks they read. is_new: rows have left since the last."""
    live = batch.live
    samples = {live.positions[row // live.how.group].sample for row in live.rows_here}
    return {"rows": len(live.rows_here), "samples": len(samples), "is_new": batch.trunks is None}


def _known_of_tree(update: Any, *_: Any) -> dict[str, Any]:
    """rows: of the packed tree."""
    return {"rows": len(update.tree.tokens)}


def weight_gradients_of_apex() -> None:
    """Let Megatron find apex's kernel, which Transformer Engine's layers and RMT's head do not
    call: they add weight gradients by themselves. Local layers would, and end the program."""
    name = "fused_weight_gradient_mlp_cuda"
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules[name] = module


def norms_under_sequence_parallel() -> None:
    """torch's norms, which the local layers use, refuse sequence parallelism; on this device they
    may do as apex's and Transformer Engine's."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    make = WrappedTorchNorm.__new__

    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        parallel, config.sequence_parallel = config.sequence_parallel, False
        try:
            return make(cls, config, *args, **kwargs)
        finally:
            config.sequence_parallel = parallel

    WrappedTorchNorm.__new__ = staticmethod(new)


def main() -> None:
    """Rehearse two or more steps, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--report", type=Path, required=True)
    add("--world-size", type=int, default=1)
    add("--rank", type=int, default=0)
    add("--passes", type=int, default=8, help="tokens decoded for each batch of rollouts")
    add("--shortest", type=int, default=3, help="tokens of the responses")
    add("--longest", type=int, default=8)
    add("--to-the-bound", action="store_true", help="decode the last tokens that there may be")
    add("flags", nargs="+")
    given = parser.parse_args()
    os.environ |= {
        "RANK": str(given.rank),
        "WORLD_SIZE": str(given.world_size),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    ranks.stand_alone()
    weight_gradients_of_apex()

    # After the environment is set.
    from megatron_rmt.job import user_batch

    # There is no cuDNN on this device.
    torch.backends.cuda.enable_cudnn_sdp(False)
    user_batch._from_stage = ranks.batch_of_stage
    norms_under_sequence_parallel()
    experts.route_evenly()
    script = answers.Script(given.passes, given.shortest, given.longest, given.to_the_bound)
    answers.answer_reads(script)
    recorder = Recorder()
    record_steps(recorder)
    sys.argv = [str(PRETRAIN), *given.flags]
    runpy.run_path(str(PRETRAIN), run_name="__main__")
    content = {
        "phases": {name: [asdict(own) for own in of] for name, of in recorder.phases.items()},
        "events": device.counts(),
        "compiled": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }
    given.report.write_text(json.dumps(content), encoding="utf-8")
    sys.stdout.flush()
    # What is left waits for ranks that are not there.
    os._exit(0)


if __name__ == "__main__":
    main()
