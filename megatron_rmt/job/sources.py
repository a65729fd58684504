"""From which corpus of a blend each sample of a step comes, for ``--rmt-skip-sources``.

Megatron's ``BlendedDataset`` gives each sample the number of its corpus, ``dataset_id``, which the
job's own ``get_batch`` drops. So it is noted on the way from the data iterator to the forward step:
whatever data flag names the corpora and in whatever order they are read, it is that of the sample.
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.job.user_batch import raise_together
from megatron_rmt.rollout.trunk import UserBatch

_UNKNOWN = -1


@dataclass(frozen=True)
class Sources:
    """The corpora of the training blend. prefixes: in the order of their numbers. skipped: numbers
    of those that ``--rmt-skip-sources`` names."""

    prefixes: tuple[str, ...]
    skipped: frozenset[int]


def sources_of_run(args: Namespace) -> Sources:
    """The corpora that the data flags name for training.

    Raises:
        ValueError: one sentence: a name is that of no corpus, or of several; or none is left.
    """
    # Imported here, as it is looked for when the patches are installed.
    from megatron.training.utils import get_blend_and_blend_per_split

    names = Settings.of(args).skip_sources or ()
    flag = f"--rmt-skip-sources is {' '.join(names)}"
    blend, of_splits = get_blend_and_blend_per_split(args)
    prefixes = tuple((blend or (of_splits or [None])[0] or [()])[0])
    skipped: set[int] = set()
    for name in names:
        exact = {prefix for prefix in prefixes if prefix == name}
        found = exact or {prefix for prefix in prefixes if PurePath(prefix).name == name}
        if len(found) > 1:
            raise ValueError(
                f"{flag}; {name} is the last part of {_listed(found)}: name one whole."
            )
        if not found:
            raise ValueError(
                f"{flag}; {name} is no corpus of the training blend, which has "
                f"{_listed(prefixes) or 'none'}: name one of them, or leave it out."
            )
        skipped |= {number for number, prefix in enumerate(prefixes) if prefix in found}
    if prefixes and len(skipped) == len(prefixes):
        raise ValueError(
            f"{flag}, which leaves no corpus of the training blend; leave one, or train without "
            "rollouts (--rmt-no-rl)."
        )
    return Sources(prefixes, frozenset(skipped))


def _listed(prefixes: Any) -> str:
    return ", ".join(sorted(prefixes))


class NotingIterator:
    """``iterator``, and from which corpus the samples of each batch come that it has yielded.

    noted: one list of numbers a batch, None where the batch does not tell.
    """

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self.noted: list[list[int] | None] = []

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self._iterator)
        numbers = batch.get("dataset_id") if isinstance(batch, Mapping) else None
        self.noted.append(None if numbers is None else torch.as_tensor(numbers).flatten().tolist())
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)


def noting(iterator: Iterator[Any] | None) -> NotingIterator | None:
    """``iterator`` as one that notes; None where this rank reads no data."""
    return None if iterator is None else NotingIterator(iterator)


def with_sources(
    batches: Sequence[UserBatch],
    iterators: Sequence[NotingIterator | None],
    sources: Sources,
) -> list[UserBatch]:
    """``batches``, with the samples of skipped corpora marked as plain.

    iterators: of each model chunk of this rank, through which the batches were taken. Collective
    over all ranks: one all-reduce of a number a sample over the ranks of a model, and one of an
    integer over all.

    Raises:
        BatchError: on all ranks, if the corpus of a sample is not known.
    """
    shape = (len(batches), len(batches[0].tokens))
    numbers = torch.full(shape, _UNKNOWN)
    for iterator in iterators:
        noted = [] if iterator is None else iterator.noted
        if len(noted) == shape[0] and all(own and len(own) == shape[1] for own in noted):
            numbers = torch.tensor(noted)
    group = parallel_state.get_model_parallel_group()
    if dist.get_world_size(group) > 1:
        # Where tensor-parallel ranks share what one of them reads, and middle stages read nothing.
        numbers = numbers.to(torch.cuda.current_device())
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)
        numbers = numbers.cpu()
    known = ((numbers >= 0) & (numbers < len(sources.prefixes))).all()
    raise_together([None if known else _unknown_problem(numbers, sources)])
    return [
        replace(batch, plain=tuple(number in sources.skipped for number in own))
        for batch, own in zip(batches, numbers.tolist(), strict=True)
    ]


def _unknown_problem(numbers: torch.Tensor, sources: Sources) -> str:
    if (numbers < 0).any():
        reason = "the batches of the data iterator do not tell the corpus of each sample"
    else:
        reason = f"a sample is of corpus {int(numbers.max())} of {len(sources.prefixes)}"
    return (
        f"--rmt-skip-sources is given, but {reason}; let each have its dataset_id, the number of "
        "its corpus in the training blend from 0, as Megatron's BlendedDataset does, or leave the "
        "flag out."
    )
