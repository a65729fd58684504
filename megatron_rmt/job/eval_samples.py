"""What thoughts are worth on samples of Megatron's own evaluations (``--rmt-eval-samples``), beside
the loss that ``--eval-iters`` measures on the validation and the test split.

The first batches are kept as Megatron's evaluation reads them, and seen once more through the job's
forward step: of the data nothing is used up, and the validation loss stays Megatron's. What is
measured, and how, is that of held-out documents (``held_out``).
"""

import functools
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_rmt.algorithm.schedules import schedule_of_step
from megatron_rmt.job.held_out import log_held_out, measure_held_out
from megatron_rmt.job.metrics import amend_metrics, metrics_path
from megatron_rmt.job.user_batch import foreign_token_problem, take_batches
from megatron_rmt.mid_training import MidTraining, steps_of_run
from megatron_rmt.model.gpt import chunks_of
from megatron_rmt.probe import HeldOut, Text, draw_positions
from megatron_rmt.rollout.trunk import UserBatch, build_trunk

Values = dict[str, float | None]


class KeepingIterator:
    """``iterator``, and the first ``most`` batches that it has yielded."""

    def __init__(self, iterator: Iterator[Any], most: int) -> None:
        self._iterator, self._most = iterator, most
        self.kept: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self._iterator)
        if len(self.kept) < self._most:
            # A job may change the one that it is given.
            self.kept.append(dict(batch) if isinstance(batch, Mapping) else batch)
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)


def evaluate_with_thoughts(
    original: Callable[..., Any], call: dict[str, Any], run: MidTraining, steps: int
) -> tuple[Any, Values]:
    """What Megatron's ``evaluate`` (``call``: its arguments) returns, and what held-out documents
    are measured by, on the first ``--rmt-eval-samples`` of its samples. Collective over all ranks.

    steps: how many the model was trained for, which decide the budget.

    Raises:
        BatchError: see ``take_batches``.
    """
    args, chunks = run.args, call["model"]
    interleaved = isinstance(call["data_iterator"], list)
    given = call["data_iterator"] if interleaved else [call["data_iterator"]]
    count = batches_to_keep(args, run.settings.eval_samples, call.get("eval_iters"))
    kept = [None if own is None else KeepingIterator(own, count) for own in given]
    result = original(**call | {"data_iterator": kept if interleaved else kept[0]})
    if result[-1] or not count:
        # Megatron has run out of time.
        return result, {}
    batches = take_batches(
        call["forward_step_func"],
        [None if own is None else iter(own.kept) for own in kept],
        chunks,
        chunks_of(run.policy.model),
        count,
        end_of_document=run.prompt.end_of_document,
        separate_documents=args.reset_attention_mask,
        token_problem=functools.partial(
            foreign_token_problem, args=args, vocab_size=run.policy.vocab_size
        ),
    )
    held_out = _of_all_ranks(run, batches)
    schedule = schedule_of_step(run.settings, max(0, steps - 1), steps_of_run(args))
    return result, measure_held_out(run, held_out, schedule.budget)


def batches_to_keep(args: Namespace, samples: int, eval_iters: int | None) -> int:
    """Micro-batches of each data-parallel rank that together hold so many ``samples``, if an
    evaluation reads as many."""
    if eval_iters is None:
        eval_iters = args.eval_iters
    size, ranks = args.eval_micro_batch_size, parallel_state.get_data_parallel_world_size()
    read = eval_iters * (args.eval_global_batch_size // (size * ranks))
    return min(read, -(-samples // (size * ranks)))


def _of_all_ranks(run: MidTraining, batches: Sequence[UserBatch]) -> HeldOut:
    """The first ``--rmt-eval-samples`` of all data-parallel ranks, in the order in which
    Megatron deals them out."""
    rank = parallel_state.get_data_parallel_rank()
    ranks = parallel_state.get_data_parallel_world_size()
    own = []
    for number, batch in enumerate(batches):
        size = len(batch.tokens)
        first = (number * ranks + rank) * size
        own += texts_of_batch(run, batch, range(first, first + size))
    gathered = [own] * ranks
    if ranks > 1:
        dist.all_gather_object(gathered, own, group=parallel_state.get_data_parallel_group())
    found = sorted((one for of in gathered for one in of), key=lambda one: one[0])
    found = [(text, tokens) for number, text, tokens in found if number < run.settings.eval_samples]
    return HeldOut([text for text, _ in found], [tokens for _, tokens in found])


def texts_of_batch(
    run: MidTraining, batch: UserBatch, numbers: Sequence[int]
) -> list[tuple[int, Text, list[int]]]:
    """(number of the sample, one of its documents, tokens of that to be predicted), of each
    document in which something is; a pure function of batch, numbers and settings."""
    found = []
    separate = run.args.reset_attention_mask
    trunk = build_trunk(
        batch,
        numbers,
        preamble=(),
        end_of_document=run.prompt.end_of_document,
        separate_documents=separate,
        vocab_size=run.policy.vocab_size,
    )
    for sample in trunk:
        documents = []
        for first, limit in sample.documents:
            ids, labels = (own[first:limit].tolist() for own in (sample.tokens, sample.labels))
            counts = sample.labelled[first:limit].tolist()
            fits = [
                row + 1
                for row in range(len(ids) - 1)
                if counts[row]
                and labels[row] == ids[row + 1]
                and run.prompt.answerable[labels[row]]
            ]
            documents += [(first, ids, fits)] if fits else []
        # As many positions a sample as a held-out document has, spread over its documents.
        every = [(at, token) for at, (_, _, fits) in enumerate(documents) for token in fits]
        count = run.settings.eval_positions_per_document
        drawn = draw_positions(range(len(every)), count, run.seed, sample.index)
        for at, (first, ids, _) in enumerate(documents):
            tokens = [token for own, token in (every[i] for i in drawn) if own == at]
            if tokens:
                # Draws of a document are keyed by where it stands.
                number = sample.index * run.args.seq_length + first
                found.append((sample.index, Text(number, ids, len(ids)), tokens))
    return found


def report_evaluation(args: Namespace, values: Sequence[Values], prefix: str, steps: int) -> None:
    """Print and log what each validation set of an evaluation was measured by. The last rank.

    prefix: with which Megatron prints the losses.
    """
    split = "test" if prefix.endswith("test set") else "validation"
    path, amended = metrics_path(args), {}
    for number, own in enumerate(values):
        name = split
        if args.multiple_validation_sets:
            names = args.validation_set_names
            name += f"-{names[number] if names else number}"
        of = {key.replace("held-out", name, 1): value for key, value in own.items()}
        told = [f"{key}: {value:.6E}" for key, value in of.items() if value is not None]
        if told:
            print(f" RMT at {prefix} | {' | '.join(told)} |", flush=True)
        log_held_out(of, steps)
        amended |= of
    if path is not None and amended:
        amend_metrics(path, steps, amended)
