"""The model's passes over held-out documents, by the engine that training uses.

Imported once Megatron has been started (``model_on_hand``).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor
from tqdm import tqdm

from evaluation import NOT_COUNTED, Record
from evaluation_documents import Document, draw_positions
from megatron_rmt.algorithm.curriculum import tiers
from megatron_rmt.algorithm.rewards import is_right
from megatron_rmt.mid_training import MidTraining
from megatron_rmt.model.gpt import generating
from megatron_rmt.prompt.prompt import Prompt
from megatron_rmt.rollout.generate import RolloutSettings, generate
from megatron_rmt.rollout.kv_cache import KeyValueStore
from megatron_rmt.rollout.live_rollouts import RolloutPosition
from megatron_rmt.rollout.prefill import read_trunk
from megatron_rmt.rollout.responses import Rollout
from megatron_rmt.rollout.trunk import NO_LABEL, Sample
from megatron_rmt.update.scoring import continuation

# Documents whose trunks are held at a time; their rollouts are bounded by --rollouts-at-once.
DOCUMENTS_AT_ONCE = 16


@dataclass(frozen=True)
class Reasoning:
    """How documents are read and positions predicted.

    length: tokens read of each document. positions: most drawn in each. budget: asked for. samples:
    of each position. at_once: rollouts held at a time. seed: of positions and responses.
    """

    length: int
    positions: int
    budget: int
    samples: int
    at_once: int
    seed: int


def document_sample(tokens: Tensor, labels: Tensor | None = None, first: int = 0) -> Sample:
    """``tokens`` ``[rows]`` as one document, of which the rows from ``first`` on predict ``labels``
    (None: the tokens that follow), and the others nothing."""
    labels = tokens[1:] if labels is None else labels
    rows = torch.arange(len(tokens))
    return Sample(
        index=0,
        tokens=tokens,
        position_ids=rows,
        labels=F.pad(labels, (first, len(tokens) - first - len(labels)), value=NO_LABEL),
        loss_mask=torch.ones(len(tokens)),
        columns=rows,
        documents=((0, len(tokens)),),
    )


def in_prompt(prompt: Prompt, ids: Sequence[int]) -> list[int]:
    """A document of token ``ids`` as it stands in a prompt, behind the template's preamble."""
    before, replaced = prompt.before(ids)
    return [*before, *ids[replaced:]]


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
    ids, prompt, top_k = document.ids[: how.length], run.prompt, run.settings.entropy_top_k
    bare = document_sample(torch.tensor(ids))
    asked = in_prompt(prompt, ids)
    # The splits and the plain prediction are those of the bare text under every template.
    if asked != ids:
        read_trunk(
            run.policy, [document_sample(torch.tensor(asked))], store, first_row, top_k=top_k
        )
        store, first_row = KeyValueStore(len(ids)), 0
    entropies, predictions = read_trunk(run.policy, [bare], store, first_row, top_k=top_k)
    if not torch.isfinite(entropies).all():
        raise ValueError(
            f"--load: the model's entropies on line {document.line} are not finite; its weights or "
            "precision are broken."
        )
    right = (predictions == bare.labels)[:-1].int().tolist()
    next_token = "".join(map(str, [0, *right]))
    if earlier is not None:
        difficulty, positions = earlier.difficulty, earlier.positions
    else:
        exceeded = (tiers(entropies, run.settings.entropy_thresholds)[:-1] + 1).tolist()
        has_bytes = prompt.has_bytes[bare.tokens].tolist()
        difficulty = NOT_COUNTED + "".join(
            str(digit) if has_bytes[token] and token >= document.first else NOT_COUNTED
            for token, digit in enumerate(exceeded, start=1)
        )
        answerable = prompt.answerable[bare.tokens].tolist()
        drawable = "".join(
            digit if fits else NOT_COUNTED
            for digit, fits in zip(difficulty, answerable, strict=True)
        )
        positions = draw_positions(drawable, how.positions, how.seed, document.line)
    counted = torch.tensor([digit != NOT_COUNTED for digit in difficulty[1:]], dtype=torch.bool)
    return Record(
        line=document.line,
        id=document.digest,
        tokens=len(ids),
        dropped=len(document.ids) - len(ids),
        difficulty=difficulty,
        next_token=next_token,
        entropy=float(entropies[:-1][counted].double().sum()),
        positions=positions,
    )


def reason(
    run: MidTraining,
    documents: Sequence[Document],
    records: Sequence[Record],
    first_rows: Sequence[int],
    store: KeyValueStore,
    how: Reasoning,
) -> None:
    """Predict the positions of ``records`` with and without a thought and add what came out.

    ``store`` holds the documents from their ``first_rows`` on.
    """
    wanted = [
        (document, record, first_row, token)
        for document, record, first_row in zip(documents, records, first_rows, strict=True)
        for token in record.positions
    ]

    def before(document: Document, token: int) -> int:
        """How many tokens of the prompt stand before ``token`` of the document."""
        ids = document.ids[: how.length]
        return len(in_prompt(run.prompt, ids)) - len(ids) + token

    size = max(1, how.at_once // how.samples)
    for start in range(0, len(wanted), size):
        chunk = wanted[start : start + size]
        positions = [
            RolloutPosition(
                sample=document.line,
                column=token,
                first=first_row,
                limit=first_row + before(document, token),
                next_position=before(document, token),
            )
            for document, _, first_row, token in chunk
        ]
        for thinks in (True, False):
            settings = RolloutSettings(
                group=how.samples,
                budget=how.budget,
                seed=how.seed,
                # Another draw for each of the two.
                iteration=int(not thinks),
                temperature=run.settings.temperature,
                greedy=run.settings.greedy,
                thinks=thinks,
            )
            groups = generate(run.policy, run.prompt, store, positions, settings)
            for (document, record, _, token), group in zip(chunk, groups, strict=True):
                _judge(run.prompt, document, record, token, group, thinks)


def _judge(
    prompt: Prompt,
    document: Document,
    record: Record,
    token: int,
    group: Sequence[Rollout],
    thinks: bool,
) -> None:
    """Read the responses at one position and append their sums to ``record``."""
    # Of the whole document: a prediction may reach beyond --seq-length.
    whole = document_sample(torch.tensor(document.ids))
    true_tokens = continuation(prompt, whole, token - 1)
    truth = [prompt.bytes_of[true] for true in true_tokens]
    boxed = prompt.template.answer == "boxed"
    already = [] if thinks else prompt.close
    read = [prompt.read([*already, *rollout.tokens.tolist()]) for rollout in group]
    matches = sum(is_right(response, truth, boxed=boxed) for response in read)
    well_formed = sum(response.well_formed for response in read)
    if thinks:
        record.thought.append(matches)
        record.thought_length.append(sum(response.thought_length for response in read))
        record.well_formed.append(well_formed)
        record.closed_by_itself.append(
            sum(
                response.closed and bool(rollout.drawn.all())
                for response, rollout in zip(read, group, strict=True)
            )
        )
    else:
        record.no_thought.append(matches)
        record.no_thought_well_formed.append(well_formed)


def measure(
    run: MidTraining,
    work: Sequence[tuple[Document, Record | None]],
    how: Reasoning,
    show_progress: bool,
) -> list[Record]:
    """One record for each document, in order, on every rank. Collective over all ranks."""
    # Replicas that share experts must run forward passes together, so they do the same work.
    shared_experts = run.args.expert_model_parallel_size > 1
    replicas = 1 if shared_experts else parallel_state.get_data_parallel_world_size()
    own = work[parallel_state.get_data_parallel_rank() % replicas :: replicas]
    most = max([how.positions, *(len(r.positions) for _, r in work if r is not None)])
    wave = min(DOCUMENTS_AT_ONCE, max(1, how.at_once // max(1, most * how.samples)))
    records: list[Record] = []
    bar = tqdm(
        total=len(own), unit="document", disable=None if show_progress else True, file=sys.stderr
    )
    with generating(run.policy.model), bar:
        for start in range(0, len(own), wave):
            documents, earlier = zip(*own[start : start + wave], strict=True)
            lengths = [len(in_prompt(run.prompt, d.ids[: how.length])) for d in documents]
            ends = np.cumsum(lengths).tolist()
            first_rows = [0, *ends[:-1]]
            store = KeyValueStore(trunk_tokens=ends[-1])
            read = [
                read_document(run, document, record, store, row, how)
                for document, record, row in zip(documents, earlier, first_rows, strict=True)
            ]
            reason(run, documents, read, first_rows, store, how)
            records += read
            bar.update(len(read))
    if replicas == 1:
        return records
    gathered: list[list[Record]] = [[]] * replicas
    dist.all_gather_object(gathered, records, group=parallel_state.get_data_parallel_group())
    return sorted((r for part in gathered for r in part), key=lambda record: record.line)
