"""The trunk: samples of one micro-batch with their documents and preambles."""

import dataclasses

import pytest
import torch

from megatron_rmt.model.blocks import Block
from megatron_rmt.rollout.trunk import (
    NO_LABEL,
    Sample,
    UserBatch,
    build_trunk,
    first_rows,
    trunk_blocks,
)

END_OF_DOCUMENT = 0
# End-of-document tokens stand at columns 3 and 7 of the first sample and end the second one.
SPANS = [[(0, 4), (4, 8), (8, 12)], [(0, 12)]]


def _batch(seed: int = 0, samples: int = 2, length: int = 12) -> UserBatch:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, 50, (samples, length + 1), generator=generator)
    text[0, 3] = text[0, 7] = text[-1, length - 1] = END_OF_DOCUMENT
    positions = torch.arange(length).repeat(samples, 1)
    loss_mask = (text[:, :-1] != END_OF_DOCUMENT).float()
    return UserBatch(text[:, :-1], positions, text[:, 1:], loss_mask)


def _trunk(head: list[int] = (), separate: bool = True) -> list[Sample]:
    return build_trunk(
        _batch(),
        [70, 71],
        preamble=list(head),
        end_of_document=END_OF_DOCUMENT,
        separate_documents=separate,
    )


@pytest.mark.parametrize("head", [[], [41, 42, 43]])
def test_trunk_of_separate_documents(head):
    batch, trunk = _batch(), _trunk(head)
    assert [sample.index for sample in trunk] == [70, 71]
    for number, (sample, spans) in enumerate(zip(trunk, SPANS, strict=True)):
        assert len(sample.documents) == len(spans)
        tokens, positions = batch.tokens[number], batch.position_ids[number]
        labels, loss_mask = batch.labels[number], batch.loss_mask[number]
        size = 0
        for (first, limit), (start, end) in zip(sample.documents, spans, strict=True):
            assert (first, limit) == (size, size + len(head) + end - start)
            size = limit
            assert sample.tokens[first:limit].tolist() == head + tokens[start:end].tolist()
            assert sample.labels[first:limit].tolist() == (
                [NO_LABEL] * len(head) + labels[start:end].tolist()
            )
            assert sample.loss_mask[first:limit].tolist() == (
                [0.0] * len(head) + loss_mask[start:end].tolist()
            )
            assert sample.columns[first:limit].tolist() == (
                [-1] * len(head) + list(range(start, end))
            )
            assert sample.position_ids[first:limit].tolist() == list(
                range(int(positions[start]), int(positions[start]) + limit - first)
            )
            assert {sample.document_of(row) for row in range(first, limit)} == {(first, limit)}
        assert len(sample) == size


BEGIN = 60


@pytest.mark.parametrize(
    ("head", "fronts", "columns"),
    [
        # Where there is no head the data's own stays, once.
        ([], [[], [], []], [range(4), range(5, 8), range(8, 12)]),
        (
            [41, 42],
            [[BEGIN, 41, 42], [BEGIN, 41, 42], [41, 42]],
            [range(1, 4), range(6, 8), range(8, 12)],
        ),
        ([BEGIN, 41], [[BEGIN, 41]] * 3, [range(1, 4), range(6, 8), range(8, 12)]),
    ],
)
def test_the_begin_token_stands_once_and_first_whatever_head_and_document_bring(
    head: list[int], fronts: list[list[int]], columns: list[range]
):
    batch = _batch()
    # The first document brings one, the second two, the third none; the second sample is a window
    # from the middle of a document.
    batch.tokens[0, [0, 4, 5]] = BEGIN
    sample, window = build_trunk(
        batch,
        [70, 71],
        preamble=head,
        begin=(BEGIN,),
        end_of_document=END_OF_DOCUMENT,
        separate_documents=True,
    )
    starts = [start for start, _ in SPANS[0]]
    for (first, limit), front, own, start in zip(
        sample.documents, fronts, columns, starts, strict=True
    ):
        rows, own = slice(first, limit), list(own)
        assert sample.columns[rows].tolist() == [-1] * len(front) + own
        assert sample.tokens[rows].tolist() == front + batch.tokens[0, own].tolist()
        assert sample.tokens[rows].tolist().count(BEGIN) == (BEGIN in [*front, *head] or start < 8)
        unknown = [NO_LABEL] * len(front)
        assert sample.labels[rows].tolist() == unknown + batch.labels[0, own].tolist()
        assert sample.loss_mask[rows].tolist() == (
            [0.0] * len(front) + batch.loss_mask[0, own].tolist()
        )
        assert sample.position_ids[rows].tolist() == list(range(start, start + limit - first))
    assert window.tokens.tolist() == [*head, *batch.tokens[1].tolist()]
    assert len(sample) <= 12 + 3 * len(head)


def test_no_head_stands_before_a_plain_sample():
    batch = dataclasses.replace(_batch(), plain=(False, True))
    how = {"end_of_document": END_OF_DOCUMENT, "separate_documents": True}
    told, plain = build_trunk(batch, [70, 71], preamble=[41, 42], **how)
    assert (told.plain, plain.plain) == (False, True)
    assert torch.equal(told.tokens, _trunk([41, 42])[0].tokens)
    bare = _trunk()[1]
    assert not bare.plain
    for name in ("tokens", "position_ids", "labels", "loss_mask", "columns"):
        assert torch.equal(getattr(plain, name), getattr(bare, name))
    assert plain.documents == bare.documents


def test_trunk_of_whole_samples_ignores_ends_of_documents():
    for sample in _trunk([41], separate=False):
        assert sample.documents == ((0, 13),)
        assert {sample.document_of(row) for row in range(13)} == {(0, 13)}
        assert sample.loss_mask.dtype == torch.float32


def test_only_rows_with_a_label_and_a_loss_are_labelled():
    sample = _trunk([41, 42])[0]
    labels, loss_mask = sample.labels.clone(), sample.loss_mask.clone()
    labels[9], loss_mask[11] = NO_LABEL, 0.25
    changed = dataclasses.replace(sample, labels=labels, loss_mask=loss_mask)
    # Preambles have no labels, and the end of a document, but for the second, has no loss.
    unlabelled = {0, 1, 6, 7, 12, 13} | {9} | {5}
    assert {row for row in range(18) if not changed.labelled[row]} == unlabelled


def _split(tokens: list[int], loss_mask: list[float], separate: bool = True, **how) -> Sample:
    """One sample of a job, cut where it says; ``tokens`` has one more than there are columns."""
    text = torch.tensor([tokens])
    columns = torch.arange(len(tokens) - 1)[None]
    batch = UserBatch(text[:, :-1], columns, text[:, 1:], torch.tensor([loss_mask]))
    (sample,) = build_trunk(
        batch,
        [0],
        preamble=[41, 42],
        end_of_document=END_OF_DOCUMENT,
        separate_documents=separate,
        **how,
    )
    return sample


# What a sample holds (0 ends a document), its loss mask -> its spans, and those with a prompt.
PADDED = {
    "end tokens without loss": (
        [5, 6, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [(0, 6)],
        [(0, 6)],
    ),
    "end tokens with a loss": (
        [5, 6, 0, 0, 0, 0],
        [1, 1, 1, 1, 1],
        [(0, 3), (3, 4), (4, 5)],
        [(0, 3)],
    ),
    "another padding token": ([5, 6, 0, 9, 9, 9, 9], [1, 1, 0, 0, 0, 0], [(0, 6)], [(0, 6)]),
    "a masked document": (
        [5, 0, 6, 7, 0, 8, 9],
        [1, 1, 0, 0, 0, 1],
        [(0, 5), (5, 6)],
        [(0, 5), (5, 6)],
    ),
    "in front": ([0, 0, 0, 5, 6, 7], [0, 0, 0, 1, 1], [(0, 3), (3, 5)], [(3, 5)]),
    "the rest of a document": ([0, 5, 6, 0, 7], [0, 1, 1, 0], [(0, 1), (1, 4)], [(0, 1), (1, 4)]),
    "nothing counts": ([5, 6, 0, 7, 8], [0, 0, 0, 0], [(0, 4)], []),
}


@pytest.mark.parametrize("case", PADDED)
def test_padding_is_no_document_and_gets_no_prompt(case: str):
    tokens, loss_mask, spans, prompted = PADDED[case]
    sample = _split(tokens, loss_mask)
    found = [sample.columns[first:limit].tolist() for first, limit in sample.documents]
    heads = [own.count(-1) for own in found]
    assert [(own[head], own[-1] + 1) for own, head in zip(found, heads, strict=True)] == spans
    assert heads == [2 if span in prompted else 0 for span in spans]
    assert sample.tokens[sample.columns >= 0].tolist() == tokens[:-1]
    assert sample.tokens[sample.columns < 0].tolist() == [41, 42] * len(prompted)


def test_a_padded_sample_is_as_long_as_announced():
    padded = [5] * 24 + [END_OF_DOCUMENT] * 489
    sample = _split(padded, [1.0] * 24 + [0.0] * 488)
    assert len(sample) == 512 + 2


def test_the_true_tokens_end_where_the_text_ends():
    tokens = [5, 6, 7, -100, 9, 10, 99, 12, 13, 14, 15, 0, 16]
    loss_mask = [1, 1, 1, 1, 1, 1, 1, 1, 0.5, 0, 1, 1]
    sample = _split(tokens, loss_mask, separate=False, vocab_size=50)
    # Behind the two rows of the prompt: -100, 99 of a vocabulary of 50, and the loss mask of 0.
    found = [sample.true_tokens(2 + column, 64) for column in range(12)]
    assert found == [
        [6, 7], [7], [], [9, 10], [10], [], [12, 13, 14], [13, 14], [14], [], [0, 16], [16],
    ]  # fmt: skip
    assert [sample.true_tokens(2 + column, 1) for column in range(3)] == [[6], [7], []]
    assert sample.labelled[2:].tolist() == [bool(own) for own in found]
    assert NO_LABEL not in [token for own in found for token in own]


def test_samples_lie_end_to_end_and_each_document_is_a_block():
    trunk = _trunk([41, 42])
    assert [len(sample) for sample in trunk] == [18, 14]
    assert first_rows(trunk) == [0, 18]
    assert trunk_blocks(trunk) == [Block(0, 6), Block(6, 12), Block(12, 18), Block(18, 32)]
    assert first_rows([]) == trunk_blocks([]) == []


def test_as_many_indices_as_samples():
    with pytest.raises(ValueError, match="zip"):
        build_trunk(
            _batch(), [70], preamble=[], end_of_document=END_OF_DOCUMENT, separate_documents=True
        )
