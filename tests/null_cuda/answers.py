"""What the host reads from a device that computes nothing, so that a step goes on.

Every place of ``megatron_rmt`` at which the host reads numbers of the device is listed here. One
that is not listed ends the program: whoever reads another number waits for the device once more.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Whose functions read, as their modules' names begin.
READERS = ("megatron.", "megatron_rmt.", "torch._inductor.")
READS = ("tolist", "item", "cpu", "__bool__", "__int__", "__float__", "__index__")


@dataclass(frozen=True)
class Script:
    """What the rollouts are to be like.

    passes: tokens that a batch of rollouts decodes; a third of the rows end half-way. shortest,
    longest: tokens of the responses that are said to have come of it. to_the_bound: after two
    tokens the rollouts go on where the longest would end.
    """

    passes: int
    shortest: int
    longest: int
    to_the_bound: bool = False


# What a place reads: the tensor as it lies there, the local variables of the place, the script.
Answer = Callable[[Tensor, Mapping[str, Any], Script], Tensor]


def _as_it_is(found: Tensor, *_: Any) -> Tensor:
    """What the host itself has copied there."""
    return found


def _zeros(found: Tensor, *_: Any) -> Tensor:
    return torch.zeros_like(found)


def _batch(found: Tensor, names: Mapping[str, Any], _: Script) -> Tensor:
    """The user's batch; only the first tensor-parallel rank reads it itself."""
    rows, columns = found.shape[0], found.shape[-1]
    if names["name"] == "position_ids":
        return torch.arange(columns).expand(rows, -1)
    if names["name"] == "loss_mask":
        return torch.ones(rows, columns)
    return torch.arange(columns).remainder(150).add(32).expand(rows, -1)


def _entropies_and_predictions(found: Tensor, *_: Any) -> Tensor:
    generator = torch.Generator().manual_seed(len(found))
    if found.is_floating_point():
        return 2 * torch.rand(found.shape, generator=generator)
    return torch.randint(32, 180, found.shape, generator=generator)


def _cumulative_counts(found: Tensor, *_: Any) -> Tensor:
    return torch.arange(1, len(found) + 1)


def _flags(found: Tensor, names: Mapping[str, Any], script: Script) -> Tensor:
    """Which rows go on; see ``Script``. Before them whether a rank was told to stop, and whether
    any goes on that shares the experts."""
    live, decoder = names["live"], names["self"]
    if script.to_the_bound and live.step == 2:
        live.step = max(2, live.bound.tokens - (script.passes - 2))
    end = live.bound.tokens if script.to_the_bound else min(script.passes, live.bound.tokens)
    left = end - live.step
    told = [False] * (decoder.stop is not None)
    anywhere = [left > 0] * (decoder.experts is not None)
    rows = range(len(found) - len(told) - len(anywhere))
    goes_on = [left > 0 and (row % 3 > 0 or 2 * left > script.passes) for row in rows]
    return torch.tensor(told + anywhere + goes_on)


def _responses(found: Tensor, names: Mapping[str, Any], script: Script) -> Tensor:
    if found.dim() == 1:
        lengths = torch.linspace(script.shortest, script.longest, len(found)).round().long()
        return lengths.clamp(max=names["self"].bound.tokens)
    if found.dtype == torch.bool:
        return torch.ones_like(found)
    if found.is_floating_point():
        return torch.full_like(found, -1.0)
    generator = torch.Generator().manual_seed(found.shape[1])
    return torch.randint(32, 180, found.shape, generator=generator)


def _sums(found: Tensor, *_: Any) -> Tensor:
    """Positions, tokens and positions that tell, of the global batch; or the tokens of a tree."""
    return torch.full_like(found, 100)


def _difference(found: Tensor, *_: Any) -> Tensor:
    return torch.tensor([0.0, 1.0, 0.0])  # sum, tokens, numbers that are not finite


def _log_probs(found: Tensor, *_: Any) -> Tensor:
    """Of the truth, and whether it is the likeliest; or which rollout each row is of, as laid out
    on the host."""
    if not found.is_floating_point():
        return found
    return -torch.linspace(1, 2, found.shape[-1], dtype=found.dtype).expand(found.shape)


def _is_trained(found: Tensor, names: Mapping[str, Any], _: Script) -> Tensor:
    """Whether there is anything to train, validate, test on, as rank 0 would say: the first."""
    return found if hasattr(names["args"], "do_train") else torch.ones_like(found)


def _other_samples(found: Tensor, names: Mapping[str, Any], _: Script) -> Tensor:
    """The sizes of all ranks' samples, then the bytes of those that arrive: copies of this rank's
    own."""
    if found.dtype != torch.uint8:
        return names["own"].to("cpu").repeat(names["ranks"], 1)
    sent = names["sent"]
    content = b"".join(sent[sample % len(sent)] for sample in names["arrived"])
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


ANSWERS: dict[str, Answer] = {
    "job.metrics.write_metrics": _zeros,
    "job.user_batch._complete": _batch,
    "job.user_batch._mask_problem": _zeros,
    "job.user_batch.raise_together": _zeros,
    "rollout.generate._Decoder._take_tokens": _flags,
    "rollout.live_rollouts.LiveRollouts.responses": _responses,
    "rollout.memory._largest": _as_it_is,
    "rollout.prefill.EntropyHistogram.__init__": _cumulative_counts,
    "rollout.prefill.read_trunk": _entropies_and_predictions,
    "step._check_trunk_fits": _as_it_is,
    "step._grow": _sums,
    "update.agreement.agree": _zeros,
    "update.logprob_check.check_log_probs": _difference,
    "update.packing.repack": _other_samples,
    "update.truth._read_truth": _log_probs,
}

# Of Megatron, what is neither zero nor copied there by this rank.
MEGATRON_ANSWERS: dict[str, Answer] = {
    "megatron.training.training.build_train_valid_test_data_loaders": _is_trained,
}


def answer_reads(script: Script) -> None:
    """Let the host read by ``script`` from now on; the device is asked, and waited for, as well."""
    for name in READS:
        setattr(Tensor, name, _scripted(getattr(Tensor, name), script))

    # Read on the host, where an event says that they have arrived.
    from megatron_rmt.rollout.late_read import LateRead

    read_late = LateRead.__call__

    def scripted(late: LateRead, flags: Tensor) -> list[bool] | None:
        found = read_late(late, flags)
        if found is None:
            return None
        place, names = _reader()
        answer = ANSWERS[place.removeprefix("megatron_rmt.")]
        return answer(torch.tensor(found), names, script).tolist()

    LateRead.__call__ = scripted


def _scripted(read: Callable[..., Any], script: Script) -> Callable[..., Any]:
    def scripted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not tensor.is_cuda or isinstance(tensor, FakeTensor):
            return read(tensor, *args, **kwargs)
        place, names = _reader()
        if place.startswith("megatron_rmt."):
            answer = ANSWERS.get(place.removeprefix("megatron_rmt."))
            if answer is None:
                raise AssertionError(
                    f"{place} reads the device, which waits for it; if it must, say in "
                    "tests/null_cuda/answers.py what it finds there."
                )
        else:
            # Norms, losses, whether a gradient overflowed; of a compiler, constants.
            usual = _zeros if tensor.is_floating_point() else _as_it_is
            answer = MEGATRON_ANSWERS.get(place, usual)
        # The one copy and wait of this read.
        found = tensor.detach().to("cpu")
        return read(answer(found, names, script), *args, **kwargs)

    return scripted


def _reader() -> tuple[str, Mapping[str, Any]]:
    """The function of Megatron, RMT or torch's compiler that reads, and its local variables."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(READERS):
            function = frame.f_code.co_qualname.split(".<locals>")[0]
            return f"{module}.{function}", frame.f_locals
        frame = frame.f_back
    return "", {}
