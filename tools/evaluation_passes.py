"""The model's passes over held-out documents, by the engine that training uses.

Imported once Megatron has been started (``model_on_hand``).
"""

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from tqdm import tqdm

from evaluation import NOT_COUNTED, Record
from evaluation_documents import Document
from megatron_rmt.algorithm.curriculum import tiers
from megatron_rmt.mid_training import MidTraining
from megatron_rmt.model.gpt import generating
from megatron_rmt.probe import (
    DOCUMENTS_AT_ONCE,
    NONE,
    OWN,
    SWAPPED,
    Place,
    Text,
    Thought,
    answer,
    draw_positions,
    in_prompt,
    read_text,
    swapped,
    truth_after,
)
from megatron_rmt.rollout.generate import RolloutSettings
from megatron_rmt.rollout.kv_cache import KeyValueStore

# Of one document: a group of thoughts for each of its positions.
ThoughtsOfDocument = Sequence[Sequence[Thought]]


@dataclass(frozen=True)
class Reasoning:
    """How documents are read and positions predicted.

    length: tokens read of each document. positions: most drawn in each. answers: positions are the
    tokens that begin an answer, not uncertain ones. budget: asked for. samples: of each
    position. swap: also with other positions' thoughts. at_once: rollouts held at a time. seed: of
    positions and responses.
    """

    length: int
    positions: int
    answers: bool
    budget: int
    samples: int
    swap: bool
    at_once: int
    seed: int


def read_document(
    run: MidTraining,
    document: Document,
    earlier: Record | None,
    store: KeyValueStore,
    first_row: int,
    how: Reasoning,
) -> Record:
    """Entropies and most likely tokens of one document, and the positions to reason at.

    The document's keys and values, as they stand in a prompt, go to ``store`` from ``first_row``
    on.
    """
    text, prompt = _text(document, how), run.prompt
    found = read_text(run, text, store, first_row, with_log_probs=True)
    entropies, predictions = found.entropies, found.predictions
    if not torch.isfinite(entropies).all():
        raise ValueError(
            f"--load: the model's entropies on line {document.line} are not finite; its weights or "
            "precision are broken."
        )
    tokens = torch.tensor(document.ids[: text.read])
    right = (predictions[:-1] == tokens[1:]).int().tolist()
    next_token = "".join(map(str, [0, *right]))
    if earlier is not None:
        difficulty, positions = earlier.difficulty, earlier.positions
    else:
        exceeded = (tiers(entropies, run.settings.entropy_thresholds)[:-1] + 1).tolist()
        has_bytes = prompt.has_bytes[tokens].tolist()
        difficulty = NOT_COUNTED + "".join(
            str(digit) if has_bytes[token] and token >= document.first else NOT_COUNTED
            for token, digit in enumerate(exceeded, start=1)
        )
        answerable = prompt.answerable[tokens].tolist()
        wanted = document.answers if how.answers else range(text.read)
        left_out = NOT_COUNTED if how.answers else NOT_COUNTED + "0"
        drawable = [
            token
            for token in wanted
            if token < text.read and answerable[token] and difficulty[token] not in left_out
        ]
        positions = draw_positions(drawable, how.positions, how.seed, document.line)
    counted = torch.tensor([digit != NOT_COUNTED for digit in difficulty[1:]], dtype=torch.bool)
    return Record(
        file=document.file,
        line=document.line,
        id=document.digest,
        tokens=text.read,
        dropped=len(document.ids) - text.read,
        difficulty=difficulty,
        next_token=next_token,
        entropy=float(entropies[:-1][counted].double().sum()),
        text_log_prob=float(found.log_probs[:-1][counted].double().sum()),
        positions=positions,
    )


def _text(document: Document, how: Reasoning) -> Text:
    return Text(document.line, document.ids, min(how.length, len(document.ids)), document.answers)


def _settings(run: MidTraining, how: Reasoning, way: int) -> RolloutSettings:
    return RolloutSettings(
        group=how.samples,
        budget=how.budget,
        seed=how.seed,
        iteration=way,
        temperature=run.settings.temperature,
        greedy=run.settings.greedy,
        thinks=way != NONE,
    )


def _chunks(
    documents: Sequence[Document],
    records: Sequence[Record],
    first_rows: Sequence[int],
    how: Reasoning,
) -> Iterator[list[tuple[Record, int, Place]]]:
    """The positions of documents, so many at a time as are held together: (record, number of the
    position in it, place)."""
    wanted = [
        (record, number, Place(_text(document, how), token, first_row))
        for document, record, first_row in zip(documents, records, first_rows, strict=True)
        for number, token in enumerate(record.positions)
    ]
    size = max(1, how.at_once // how.samples)
    return (wanted[start : start + size] for start in range(0, len(wanted), size))


def reason(
    run: MidTraining,
    documents: Sequence[Document],
    records: Sequence[Record],
    first_rows: Sequence[int],
    store: KeyValueStore,
    how: Reasoning,
) -> list[list[list[Thought]]]:
    """Predict the positions of ``records`` with and without a thought and add what came out.

    ``store`` holds the documents from their ``first_rows`` on. Returns the thoughts,
    ``[documents][positions][samples]``.
    """
    thoughts: list[list[list[Thought]]] = [[] for _ in records]
    number_of = {id(record): number for number, record in enumerate(records)}
    for chunk in _chunks(documents, records, first_rows, how):
        places = [place for *_, place in chunk]
        answered = answer(run, store, places, _settings(run, how, OWN))
        for (record, _, _), group in zip(chunk, answered, strict=True):
            thoughts[number_of[id(record)]].append([own.thought for own in group])
            lengths = [own.response.thought_length for own in group]
            record.thought_length.append(sum(lengths))
            record.closed_by_itself.append(sum(own.by_itself for own in group))
            if run.prompt.answer_tokens:
                record.thought.append(sum(own.right for own in group))
                record.well_formed.append(sum(own.response.well_formed for own in group))
            if run.prompt.answer_tokens and how.answers:
                record.whole_answer.append(sum(own.whole for own in group))
        if not run.prompt.answer_tokens:
            continue
        answered = answer(run, store, places, _settings(run, how, NONE))
        for (record, _, _), group in zip(chunk, answered, strict=True):
            record.no_thought.append(sum(own.right for own in group))
            record.no_thought_well_formed.append(sum(own.response.well_formed for own in group))
            if how.answers:
                record.no_thought_whole_answer.append(sum(own.whole for own in group))
    return thoughts


def reason_swapped(
    run: MidTraining,
    documents: Sequence[Document],
    records: Sequence[Record],
    thoughts: Sequence[ThoughtsOfDocument],
    how: Reasoning,
) -> None:
    """Predict the positions of ``records`` after the ``thoughts`` of others,
    ``[documents][positions][samples]``, and add what came out."""
    store, first_rows = _room(run, documents, how)
    for document, first_row in zip(documents, first_rows, strict=True):
        read_text(run, _text(document, how), store, first_row)
    of_record = {id(record): own for record, own in zip(records, thoughts, strict=True)}
    for chunk in _chunks(documents, records, first_rows, how):
        places = [place for *_, place in chunk]
        given = [of_record[id(record)][number] for record, number, _ in chunk]
        answered = answer(run, store, places, _settings(run, how, SWAPPED), given)
        for (record, _, _), group in zip(chunk, answered, strict=True):
            record.swapped.append(sum(own.right for own in group))


def ask_for_truth(
    run: MidTraining,
    document: Document,
    record: Record,
    own: ThoughtsOfDocument,
    others: ThoughtsOfDocument | None,
    how: Reasoning,
) -> None:
    """Add how likely the truth is at the positions of ``record``: alone, after its ``own`` thoughts
    and those of ``others``, and after none."""
    groups = [
        [*thoughts, *(others[number] if others is not None else [])]
        for number, thoughts in enumerate(own)
    ]
    size = max(1, how.at_once // (len(groups[0]) + 1)) if groups else 1
    for start in range(0, len(groups), size):
        part = slice(start, start + size)
        log_probs, likeliest = truth_after(
            run, _text(document, how), record.positions[part], groups[part], how.budget
        )
        record.log_prob += log_probs.alone.tolist()
        for kind, values in {
            "log_prob": log_probs.after_thought,
            "likeliest": likeliest.after_thought.int(),
        }.items():
            getattr(record, f"thought_{kind}").extend(values[:, : how.samples].sum(1).tolist())
            getattr(record, f"no_thought_{kind}").extend(values[:, -1].tolist())
            if others is not None:
                swapped_values = values[:, how.samples : -1]
                getattr(record, f"swapped_{kind}").extend(swapped_values.sum(1).tolist())


def _room(
    run: MidTraining, documents: Sequence[Document], how: Reasoning
) -> tuple[KeyValueStore, list[int]]:
    """A store for documents as they stand in prompts, and the rows at which they begin."""
    lengths = [len(in_prompt(run.prompt, own.ids[: how.length])) for own in documents]
    ends = np.cumsum(lengths).tolist()
    return KeyValueStore(trunk_tokens=ends[-1]), [0, *ends[:-1]]


def measure(
    run: MidTraining,
    work: Sequence[tuple[Document, Record | None]],
    how: Reasoning,
    show_progress: bool,
) -> list[Record]:
    """One record for each document of one file, in order, on every rank. Collective over all
    ranks."""
    # Replicas that share experts must run forward passes together, so they do the same work.
    shared_experts = run.args.expert_model_parallel_size > 1
    replicas = 1 if shared_experts else parallel_state.get_data_parallel_world_size()
    own = work[parallel_state.get_data_parallel_rank() % replicas :: replicas]
    most = max([how.positions, *(len(r.positions) for _, r in work if r is not None)])
    wave = min(DOCUMENTS_AT_ONCE, max(1, how.at_once // max(1, most * how.samples)))
    waves = [own[start : start + wave] for start in range(0, len(own), wave)]
    records: list[Record] = []
    thoughts: dict[int, list[list[Thought]]] = {}
    bar = tqdm(
        total=2 * len(own) if most else len(own),
        unit="document",
        disable=None if show_progress else True,
        file=sys.stderr,
    )
    with generating(run.policy.model), bar:
        for part in waves:
            documents, earlier = zip(*part, strict=True)
            store, first_rows = _room(run, documents, how)
            read = [
                read_document(run, document, record, store, row, how)
                for document, record, row in zip(documents, earlier, first_rows, strict=True)
            ]
            found = reason(run, documents, read, first_rows, store, how)
            thoughts |= {r.line: of for r, of in zip(read, found, strict=True)}
            records += read
            bar.update(len(read))
        others = _others(_of_all_replicas(thoughts, replicas)) if how.swap else None
        if most:
            _probe(run, waves, records, thoughts, others, how, bar)
    gathered = _of_all_replicas({record.line: record for record in records}, replicas)
    return [gathered[line] for line in sorted(gathered)]


def _probe(
    run: MidTraining,
    waves: Sequence[Sequence[tuple[Document, Record | None]]],
    records: Sequence[Record],
    thoughts: Mapping[int, ThoughtsOfDocument],
    others: Mapping[int, ThoughtsOfDocument] | None,
    how: Reasoning,
    bar: tqdm,
) -> None:
    """What can be measured once all thoughts are there."""
    remaining = iter(records)
    for part in waves:
        documents = [document for document, _ in part]
        own = list(itertools.islice(remaining, len(part)))
        if others is not None and run.prompt.answer_tokens:
            given = [others[record.line] for record in own]
            reason_swapped(run, documents, own, given, how)
        # In a box the truth does not stand right after the thought.
        if run.prompt.template.answer == "next":
            for document, record in zip(documents, own, strict=True):
                swap = None if others is None else others[record.line]
                ask_for_truth(run, document, record, thoughts[record.line], swap, how)
        bar.update(len(part))


def _others(
    thoughts: Mapping[int, ThoughtsOfDocument],
) -> dict[int, ThoughtsOfDocument] | None:
    """The thoughts of all documents, by line, with those of another position in the place of each;
    None where there are no two."""
    lines = sorted(thoughts)
    flat = [group for line in lines for group in thoughts[line]]
    if len(flat) < 2:
        return None
    moved = iter(swapped(flat))
    return {line: list(itertools.islice(moved, len(thoughts[line]))) for line in lines}


def _of_all_replicas(values: dict[int, Any], replicas: int) -> dict[int, Any]:
    """``values`` of all data-parallel ranks, on each."""
    if replicas == 1:
        return values
    gathered: list[dict[int, Any]] = [{}] * replicas
    dist.all_gather_object(gathered, values, group=parallel_state.get_data_parallel_group())
    return {key: value for part in gathered for key, value in part.items()}
