"""What thoughts are worth on held-out text, by the engine that training uses.

Positions of documents are predicted in four ways: at once, after a thought of the model's own,
after no thought (it is closed before its first token), and after the thought of another position.
If thoughts carry something of their own position, the second is above the others. Nothing here
trains, and all draws are pure functions of (seed, way, document, token, response, token of it).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from megatron_rmt.algorithm.rewards import is_right, says
from megatron_rmt.mid_training import MidTraining
from megatron_rmt.model.gpt import generating
from megatron_rmt.prompt.prompt import Prompt
from megatron_rmt.prompt.response import Response
from megatron_rmt.rollout.generate import RolloutSettings, generate
from megatron_rmt.rollout.kv_cache import KeyValueStore
from megatron_rmt.rollout.live_rollouts import RolloutPosition
from megatron_rmt.rollout.memory import in_bytes
from megatron_rmt.rollout.prefill import TrunkReading, read_trunk
from megatron_rmt.rollout.responses import Rollout, written
from megatron_rmt.rollout.trunk import NO_LABEL, Sample
from megatron_rmt.update.scoring import continuation
from megatron_rmt.update.tree import ChosenPosition, ReasonedSample
from megatron_rmt.update.truth import AfterText, predictions_of_truth

# Another draw for each way.
OWN, NONE, SWAPPED = range(3)
# Documents whose trunks are held at a time.
DOCUMENTS_AT_ONCE = 16


@dataclass(frozen=True)
class Text:
    """A held-out document.

    number: the key of its draws. ids: all its tokens. read: how many of them the model reads; what
    follows is truth alone. answers: what it marks as an answer, by the token that begins it.
    """

    number: int
    ids: Sequence[int]
    read: int
    answers: Mapping[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """A token of a document to be predicted from those before it.

    first_row: where the stored trunk has the document, as it stands in a prompt, begin.
    """

    text: Text
    token: int
    first_row: int


class Thought(NamedTuple):
    """tokens: of the response, up to the end of the thought and with it. length: of the thought, in
    tokens. closed: it has ended, by itself or by force."""

    tokens: tuple[int, ...]
    length: int
    closed: bool


@dataclass(frozen=True)
class Answered:
    """What one response says: response, as it is read; right: it predicts the text; whole: it says
    the answer that the text marks there, and no more; by_itself: the thought ended without force;
    thought: its own, None where it was given."""

    response: Response
    right: bool
    whole: bool
    by_itself: bool
    thought: Thought | None


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


def read_text(
    run: MidTraining,
    text: Text,
    store: KeyValueStore,
    first_row: int,
    *,
    with_log_probs: bool = False,
) -> TrunkReading:
    """What the model predicts after each token of the bare text, with_log_probs: also of the next
    one; its keys and values, as it stands in a prompt, go to ``store`` from ``first_row``."""
    ids, top_k = list(text.ids[: text.read]), run.settings.entropy_top_k
    asked = in_prompt(run.prompt, ids)
    # The plain prediction is that of the bare text under every template.
    if asked != ids:
        sample = document_sample(torch.tensor(asked))
        read_trunk(run.policy, [sample], store, first_row, top_k=top_k)
        store, first_row = KeyValueStore(len(ids)), 0
    sample = document_sample(torch.tensor(ids))
    return read_trunk(
        run.policy, [sample], store, first_row, top_k=top_k, with_log_probs=with_log_probs
    )


def answer(
    run: MidTraining,
    store: KeyValueStore,
    places: Sequence[Place],
    how: RolloutSettings,
    thoughts: Sequence[Sequence[Thought]] | None = None,
) -> list[list[Answered]]:
    """``how.group`` responses at each of ``places``, whose documents are in ``store``.

    thoughts: ``[places][group]`` that are written instead of drawn. Collective as ``generate``.
    """
    positions = [_rollout_position(run.prompt, place) for place in places]
    if thoughts is not None:
        positions = [
            replace(position, begun=tuple(thought.tokens for thought in own))
            for position, own in zip(positions, thoughts, strict=True)
        ]
    groups = generate(run.policy, run.prompt, store, positions, how)
    given = thoughts or [[None] * how.group] * len(places)
    return [
        [
            _read(run.prompt, place, how, rollout, own)
            for rollout, own in zip(group, of, strict=True)
        ]
        for place, group, of in zip(places, groups, given, strict=True)
    ]


def _rollout_position(prompt: Prompt, place: Place) -> RolloutPosition:
    text, token = place.text, place.token
    before = token + len(in_prompt(prompt, text.ids[: text.read])) - text.read
    return RolloutPosition(
        sample=text.number,
        column=token,
        first=place.first_row,
        limit=place.first_row + before,
        next_position=before,
    )


def _read(
    prompt: Prompt, place: Place, how: RolloutSettings, rollout: Rollout, given: Thought | None
) -> Answered:
    whole = document_sample(torch.tensor(place.text.ids))
    truth = [prompt.bytes_of[own] for own in continuation(prompt, whole, place.token - 1)]
    tokens = rollout.tokens.tolist()
    response = prompt.read(tokens if how.thinks else [*prompt.close, *tokens])
    right = is_right(response, truth, boxed=prompt.template.answer == "boxed")
    whole = says(response, place.text.answers.get(place.token, b""))
    own = None
    if given is not None:
        # One that was never closed is answered after no more than it would be where it was drawn.
        right, whole = right and given.closed, whole and given.closed
    elif how.thinks:
        own = Thought(_through_close(prompt, tokens), response.thought_length, response.closed)
    return Answered(response, right, whole, response.closed and bool(rollout.drawn.all()), own)


def _through_close(prompt: Prompt, tokens: Sequence[int]) -> tuple[int, ...]:
    """The first of ``tokens``, up to the one that ends the thought; all if none does."""
    close = prompt.template.close.encode()
    texts = itertools.accumulate(prompt.bytes_of[token] for token in tokens)
    thinking = sum(1 for _ in itertools.takewhile(lambda text: close not in text, texts))
    return tuple(tokens[: thinking + 1])


def swapped(thoughts: Sequence[Sequence[Thought]]) -> list[Sequence[Thought]]:
    """The thoughts of each position replaced by those of another: they move half way round, so that
    each is used once and none stays (with one position there is no other). What they are taken
    from and go to depends on nothing but how many there are."""
    half = len(thoughts) // 2
    return [*thoughts[half:], *thoughts[:half]]


def truth_after(
    run: MidTraining,
    text: Text,
    tokens: Sequence[int],
    thoughts: Sequence[Sequence[Thought]],
    budget: int,
) -> tuple[AfterText, AfterText]:
    """Log-probs of the true tokens and whether the first is the most likely one, alone and after
    each of ``thoughts`` ``[tokens][group]``, which are closed, and, last of the group, after none;
    see ``update.truth``. Collective as that.

    tokens: indices in the document, ascending, at least one.
    """
    prompt = run.prompt
    ids = list(text.ids[: min(text.read, tokens[-1] + prompt.target_tokens)])
    asked = in_prompt(prompt, ids)
    more = len(asked) - len(ids)
    positions, stem = [], prompt.stem(budget)
    for token, own in zip(tokens, thoughts, strict=True):
        rollouts = [written(one.tokens[: one.length]) for one in own]
        responses = [Response(one.length, True, True, b"") for one in own]
        none = written([]), Response(0, True, True, b"")
        group = [*rollouts, none[0]], [*responses, none[1]]
        positions.append(ChosenPosition(token + more - 1, budget, stem, *group))
    group = len(positions[0].rollouts)
    sample = document_sample(torch.tensor(asked))
    log_probs, likeliest = predictions_of_truth(
        run.policy, prompt, [ReasonedSample(sample, positions)], group
    )
    if asked != ids:
        silent = [ChosenPosition(token - 1, budget, stem) for token in tokens]
        bare = ReasonedSample(document_sample(torch.tensor(ids)), silent)
        plain = predictions_of_truth(run.policy, prompt, [bare], 1)
        log_probs = log_probs._replace(alone=plain[0].alone)
        likeliest = likeliest._replace(alone=plain[1].alone)
    return log_probs, likeliest


def draw_positions(tokens: Sequence[int], count: int, seed: int, line: int) -> list[int]:
    """Up to ``count`` of ``tokens``, uniformly drawn, ascending.

    A pure function of its arguments, so independent of the other documents and of the layout.
    """
    generator = np.random.default_rng([seed, line])
    drawn = generator.choice(tokens, size=min(count, len(tokens)), replace=False)
    return sorted(map(int, drawn))


@dataclass(frozen=True)
class HeldOut:
    """Documents that a run is measured on, and the tokens to be predicted in each, ascending."""

    texts: Sequence[Text]
    tokens: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Standing:
    """How well positions are predicted: sums over ``positions`` of them.

    next_token, thought, no_thought: right ones, at once, after a thought and after none. Where the
    answer stands right after the thought it is the most likely token, in a box it is drawn.
    gain: nats that the thought makes the truth likelier than the plain text does; NaN in a box.
    """

    positions: float
    next_token: float
    thought: float
    no_thought: float
    gain: float


def standing(run: MidTraining, held_out: HeldOut, budget: int) -> Standing:
    """Measure ``held_out`` with thoughts of ``budget`` tokens, one at each position.

    Collective over all ranks: data-parallel replicas share the documents, and sum up.
    """
    shared_experts = run.args.expert_model_parallel_size > 1
    replicas = 1 if shared_experts else parallel_state.get_data_parallel_world_size()
    own = range(parallel_state.get_data_parallel_rank() % replicas, len(held_out.texts), replicas)
    sums = torch.zeros(5, dtype=torch.float64)
    with generating(run.policy.model):
        for start in range(0, len(own), DOCUMENTS_AT_ONCE):
            part = [
                (held_out.texts[index], held_out.tokens[index])
                for index in own[start : start + DOCUMENTS_AT_ONCE]
            ]
            sums += _standing_of(run, part, budget)
    if replicas > 1:
        sums = sums.to(run.policy.device)
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    return Standing(*sums.tolist())


def _standing_of(
    run: MidTraining, part: Sequence[tuple[Text, Sequence[int]]], budget: int
) -> Tensor:
    """The sums of ``Standing`` over a few documents, fp64 ``[5]``."""
    boxed = run.prompt.template.answer == "boxed"
    lengths = [len(in_prompt(run.prompt, text.ids[: text.read])) for text, _ in part]
    store, first_row = KeyValueStore(sum(lengths)), 0
    places, right_at_once = [], 0
    for (text, tokens), length in zip(part, lengths, strict=True):
        predictions = read_text(run, text, store, first_row).predictions
        right_at_once += sum(int(predictions[token - 1]) == text.ids[token] for token in tokens)
        places += [Place(text, token, first_row) for token in tokens]
        first_row += length
    how = RolloutSettings(
        group=1,
        budget=budget,
        seed=run.seed,
        iteration=OWN,
        temperature=run.settings.temperature,
        greedy=run.settings.greedy,
        kv_bytes=in_bytes(run.settings.rollout_kv_gib),
    )
    answered = [group[0] for group in answer(run, store, places, how)]
    if boxed:
        none = answer(run, store, places, replace(how, iteration=NONE, thinks=False))
        right = (sum(own.right for own in answered), sum(own.right for (own,) in none))
        return torch.tensor([len(places), right_at_once, *right, torch.nan], dtype=torch.float64)
    sums = torch.zeros(5, dtype=torch.float64)
    thoughts = iter([own.thought] for own in answered)
    for text, tokens in part:
        own = [*itertools.islice(thoughts, len(tokens))]
        log_probs, likeliest = truth_after(run, text, tokens, own, budget)
        gain = log_probs.after_thought[:, 0] - log_probs.alone
        after = likeliest.after_thought.sum(0).tolist()
        sums += torch.tensor([len(tokens), 0.0, *after, float(gain.sum())], dtype=torch.float64)
    sums[1] = right_at_once
    return sums
