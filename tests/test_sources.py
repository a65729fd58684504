"""Which samples are of a corpus that trains on next tokens alone."""

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_rmt.job.sources import (
    NotingIterator,
    Sources,
    noting,
    sources_of_run,
    with_sources,
)
from megatron_rmt.job.user_batch import BatchError
from megatron_rmt.rollout.trunk import UserBatch
from tests.distributed import run_distributed

PREFIXES = ("/data/math", "/data/web", "/other/math")
BLEND = ["0.5", PREFIXES[0], "0.3", PREFIXES[1], "0.2", PREFIXES[2]]
FLAGS = ("data_path", "train_data_path", "data_args_path", "per_split_data_args_path")


def _args(skip: list[str], **given: Any) -> Namespace:
    names = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
    names += ("data_args_path", "per_split_data_args_path")
    return Namespace(**dict.fromkeys(names) | given, rmt_skip_sources=skip)


def _named_by(flag: str, words: list[str], folder: Path, skip: list[str]) -> Namespace:
    """The arguments of a job whose ``flag`` names ``words`` for training."""
    value: str | list[str] = words
    if flag.endswith("args_path"):
        value = str(folder / "words")
        text = " ".join(words)
        if "split" in flag:
            text = json.dumps({"train": text, "valid": "/data/held", "test": None})
        Path(value).write_text(text, encoding="utf-8")
    return _args(skip, **{flag: value})


@pytest.mark.parametrize("words", [BLEND, [*PREFIXES]], ids=["weights", "no weights"])
@pytest.mark.parametrize("flag", FLAGS)
def test_a_corpus_is_found_whichever_flag_names_the_blend(
    flag: str, words: list[str], tmp_path: Path
):
    for skip, numbers in (
        (["/data/web"], {1}),
        (["web", "/other/math"], {1, 2}),
        (["/data/math"], {0}),
    ):
        found = sources_of_run(_named_by(flag, words, tmp_path, skip))
        assert found == Sources(PREFIXES, frozenset(numbers))


def test_a_corpus_that_is_named_twice_is_skipped_twice():
    words = ["/data/web", "/data/math", "/data/web"]
    assert sources_of_run(_args(["web"], data_path=words)).skipped == {0, 2}


@pytest.mark.parametrize(
    ("skip", "words", "sentence"),
    [
        (["code"], BLEND, "code is no corpus of the training blend, which has /data/math, "),
        (["eb"], BLEND, "eb is no corpus"),
        (["math"], BLEND, "math is the last part of /data/math, /other/math: name one whole."),
        (["web"], None, "web is no corpus of the training blend, which has none: name one"),
        (["web"], ["/data/web"], "which leaves no corpus of the training blend; leave one"),
        ([*PREFIXES], BLEND, "which leaves no corpus of the training blend"),
    ],
)
def test_a_name_that_cannot_be_followed_is_refused(
    skip: list[str], words: list[str] | None, sentence: str
):
    with pytest.raises(ValueError, match="--rmt-skip-sources is ") as error:
        sources_of_run(_args(skip, data_path=words))
    assert sentence in str(error.value)


def test_corpora_of_validation_do_not_count():
    args = _args(["held"], train_data_path=[*PREFIXES], valid_data_path=["/data/held"])
    with pytest.raises(ValueError, match="held is no corpus of the training blend"):
        sources_of_run(args)


def _batch(numbers: Any) -> dict[str, Any]:
    return {"tokens": torch.zeros(2, 4)} | ({} if numbers is None else {"dataset_id": numbers})


def _read(batches: list[Any], most: int = 2) -> NotingIterator:
    iterator = noting(iter(batches))
    for _ in range(most):
        next(iterator)
    return iterator


def _user_batches() -> list[UserBatch]:
    values = torch.zeros(2, 4, dtype=torch.int64)
    return [UserBatch(values, values, values, torch.ones(2, 4)) for _ in range(2)]


SOURCES = Sources(PREFIXES, frozenset({1}))


def _plain(iterators: list[NotingIterator | None]) -> list[tuple[bool, ...]] | str:
    try:
        return [own.plain for own in with_sources(_user_batches(), iterators, SOURCES)]
    except BatchError as error:
        return str(error)


def test_batches_pass_unchanged():
    class Loader:
        position = 3

        def __iter__(self) -> Iterator[int]:
            return self

        def __next__(self) -> int:
            return 5

    iterator = noting(Loader())
    assert next(iterator) == 5
    assert next(iter(iterator)) == 5
    assert iterator.position == 3
    assert iterator.noted == [None, None]
    assert noting(None) is None


@pytest.mark.usefixtures("single_process_megatron")
def test_samples_of_a_skipped_corpus_are_plain():
    batches = [_batch(torch.tensor([0, 1])), _batch(torch.tensor([1, 2])), _batch(None)]
    assert _plain([_read(batches)]) == [(False, True), (True, False)]
    # Of two chunks of a model each may read, and one of them alone.
    assert _plain([None, _read(batches)]) == [(False, True), (True, False)]
    assert _plain([_read(batches), noting(iter(()))]) == [(False, True), (True, False)]


@pytest.mark.usefixtures("single_process_megatron")
@pytest.mark.parametrize(
    ("batches", "sentence"),
    [
        ([_batch(None), _batch(None)], "do not tell the corpus of each sample"),
        ([_batch(torch.tensor([0, 1])), _batch(None)], "do not tell the corpus"),
        ([_batch(torch.tensor([0])), _batch(torch.tensor([1]))], "do not tell the corpus"),
        ([torch.zeros(2), torch.zeros(2)], "do not tell the corpus"),
        ([_batch(torch.tensor([0, 1])), _batch(torch.tensor([3, 0]))], "of corpus 3 of 3;"),
    ],
)
def test_a_sample_of_an_unknown_corpus_is_refused(batches: list[Any], sentence: str):
    found = _plain([_read(batches)])
    assert isinstance(found, str)
    assert sentence in found
    assert found.endswith("or leave the flag out.")


@pytest.mark.usefixtures("single_process_megatron")
def test_a_forward_step_that_reads_more_than_it_trains_is_refused():
    batches = [_batch(torch.tensor([0, 1]))] * 3
    assert "do not tell the corpus" in _plain([_read(batches, most=3)])


def _on_tensor_parallel_rank(known: bool) -> list[tuple[bool, ...]] | str:
    """As in Megatron, one of the ranks reads."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    reads = torch.distributed.get_rank() == 0
    numbers = torch.tensor([1, 0]) if known else None
    return _plain([_read([_batch(numbers)] * 2) if reads else None])


@pytest.mark.multiprocess
def test_ranks_that_read_nothing_are_told():
    assert run_distributed(2, _on_tensor_parallel_rank, True) == [[(True, False)] * 2] * 2


@pytest.mark.faults
@pytest.mark.multiprocess
def test_an_unknown_corpus_ends_every_rank():
    first, second = run_distributed(2, _on_tensor_parallel_rank, False)
    assert first == second
    assert "do not tell the corpus" in first


def _on_data_parallel_rank() -> list[tuple[bool, ...]] | str:
    parallel_state.initialize_model_parallel()
    numbers = [torch.tensor([1, 0]), None][torch.distributed.get_rank()]
    return _plain([_read([_batch(numbers)] * 2)])


@pytest.mark.faults
@pytest.mark.multiprocess
def test_what_one_data_parallel_rank_does_not_know_ends_all():
    first, second = run_distributed(2, _on_data_parallel_rank)
    assert first == second
    assert "do not tell the corpus" in first
