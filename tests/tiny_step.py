"""Two tiny samples and what a step knows of them, for the tests of its decisions."""

import dataclasses
from argparse import Namespace
from typing import Any

import torch

from megatron_rmt.algorithm.curriculum import choose_by_tier
from megatron_rmt.algorithm.losses import token_losses
from megatron_rmt.algorithm.rewards import Evidence, Metric, match
from megatron_rmt.algorithm.schedules import Schedule
from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.mid_training import MidTraining
from megatron_rmt.prompt.prompt import Prompt
from megatron_rmt.prompt.template import Template
from megatron_rmt.rollout.responses import Rollout
from megatron_rmt.rollout.trunk import Sample
from megatron_rmt.update import report, scoring
from megatron_rmt.update.tree import ReasonedSample
from tests.packed import Responses, Trunk, build_trunk, reasoned

BYTES = [b"", b"", *(bytes([letter]) for letter in b"abcdefgh"), b"</t>", b" "]
TEMPLATE = Template("test", "ff", "{budget}", "</t>", "next")
CLOSE = 10


def settings_of_step(**changes: Any) -> Settings:
    options = {
        "positions_per_sample": 4,
        "group_size": 2,
        "answer_tokens": 3,
        "length_reward_weight": 0.25,
        "log_samples_interval": 1,
    }
    return Settings(**options | changes)


def tiny_prompt(answer_tokens: int = 3, template: Template = TEMPLATE) -> Prompt:
    """Tokens are letters, a space and the end of thought; a digit is the token of its number."""

    def encode(text: str) -> list[int]:
        if text == "</t>":
            return [CLOSE]
        return [int(of) if of.isdigit() else BYTES.index(of.encode()) for of in text]

    return Prompt(template, encode, BYTES, [0], 0, answer_tokens)


def tiny_run(**changes: Any) -> MidTraining:
    """A run without a model."""
    settings = settings_of_step(**changes)
    return MidTraining(
        args=Namespace(),
        settings=settings,
        policy=None,
        prompt=tiny_prompt(settings.answer_tokens),
        baseline=None,
        reward=match,
        select=choose_by_tier,
        loss=token_losses,
        seed=5,
    )


def tiny_trunk(preamble: list[int] = (9, 9), length: int = 40) -> Trunk:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, 10, (2, length + 1), generator=generator)
    text[0, 17] = 0
    loss_mask = (torch.rand(2, length, generator=generator) < 0.8).float()
    return build_trunk(
        text[:, :-1],
        torch.arange(length).repeat(2, 1),
        text[:, 1:],
        loss_mask,
        preamble=list(preamble),
        end_of_document=0,
        separate_documents=True,
    )


def tiny_schedule(iteration: int = 0, **changes: Any) -> Schedule:
    options = {
        "progress": 0.0,
        "budget": 4,
        "probabilities": (0.6, 0.3, 0.1),
        "positions_per_sample": 4,
        "group": 2,
        "warm_up": False,
        "thought_from_text": False,
    }
    options |= changes
    budgets = {"tier_budgets": (options["budget"],) * 3}
    return Schedule(iteration, **budgets | options)


def readable_rows(trunk: Trunk | Sample, count: int) -> list[int]:
    """Rows with three tokens of text behind them in their document."""
    return [
        row
        for first, limit in trunk.documents
        for row in range(max(1, first), limit - 3)
        if all(BYTES[label] for label in trunk.labels[row : row + 3].tolist())
    ][:count]


@dataclasses.dataclass(frozen=True)
class Scored:
    """Responses, what they earned, and what a step reports of them."""

    run: MidTraining
    schedule: Schedule
    reasoned: list[ReasonedSample]
    evidence: Evidence
    metrics: dict[str, Metric]

    @property
    def rewards(self) -> list[list[float]]:
        return [position.rewards for of in self.reasoned for position in of.positions]

    @property
    def advantages(self) -> list[list[float]]:
        return [position.advantages for of in self.reasoned for position in of.positions]


def score(run: MidTraining, schedule: Schedule, samples: list[ReasonedSample]) -> Scored:
    """As a step does, of responses that have not been read."""
    positions = [position for of in samples for position in of.positions]
    for position in positions:
        position.responses = [run.prompt.read(own.tokens.tolist()) for own in position.rollouts]
    evidence = scoring.gather_evidence(run.prompt, samples, schedule, _no_model)
    scoring.score(positions, evidence, run.reward, run.settings, warm_up=schedule.warm_up)
    metrics = report.response_metrics(positions, evidence, run.settings, schedule, run.prompt)
    return Scored(run, schedule, samples, evidence, metrics)


def _no_model() -> Any:
    raise AssertionError("no reward of these tests asks for log-probs")


def four_responses(trunk: Trunk, rows: list[int]) -> Responses:
    """Two positions, a group of two: right after 2 tokens of 4; never closed; wrong; right."""
    right = [int(trunk.labels[row]) for row in rows]
    wrong = 2 if right[1] != 2 else 3
    texts = [[[2, 2, 10, right[0]], [2] * 8], [[2, 10, wrong], [2, 2, 2, 2, 10, right[1]]]]
    tokens = torch.zeros(2, 2, 8, dtype=torch.int64)
    lengths = torch.zeros(2, 2, dtype=torch.int64)
    for position, group in enumerate(texts):
        for rollout, text in enumerate(group):
            tokens[position, rollout, : len(text)] = torch.tensor(text)
            lengths[position, rollout] = len(text)
    drawn = torch.ones(2, 2, 8, dtype=torch.bool)
    drawn[1, 1, 4] = False
    return Responses(tokens, lengths, drawn, torch.zeros(2, 2, 8))


def scored(warm_up: bool = False, **changes: Any) -> Scored:
    """``four_responses`` to the first readable rows, scored."""
    trunk = tiny_trunk([])
    rows = readable_rows(trunk, 2)
    samples = reasoned(trunk, rows, four_responses(trunk, rows))
    return score(tiny_run(**changes), tiny_schedule(warm_up=warm_up), samples)


def rollout(tokens: list[int], drawn: list[int]) -> Rollout:
    """One response by hand."""
    values = torch.tensor(tokens), torch.tensor(drawn).bool(), torch.zeros(len(tokens))
    return Rollout(*(value.numpy() for value in values))
