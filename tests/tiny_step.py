"""Two tiny samples and what a step knows of them, for the tests of its decisions."""

from argparse import Namespace
from typing import Any

import torch
from torch import Tensor

from megatron_rmt.algorithm.schedules import Schedule
from megatron_rmt.mid_training import MidTraining
from megatron_rmt.prompt.grammar import ResponseGrammar
from megatron_rmt.prompt.template import Template
from megatron_rmt.rollout.responses import Responses
from megatron_rmt.rollout.trunk import Trunk, build_trunk
from megatron_rmt.update import scoring


def step_args(**changes: Any) -> Namespace:
    options = {
        "train_iters": 100,
        "rmt_initial_budget": 800,
        "rmt_minimum_budget": 1,
        "rmt_budget_decay": 0.2,
        "rmt_no_budget_decay": False,
        "rmt_curriculum_start": 0.3,
        "rmt_curriculum_end": 0.7,
        "rmt_start_probabilities": [0.6, 0.3, 0.1],
        "rmt_end_probabilities": [0.1, 0.3, 0.6],
        "rmt_no_curriculum": False,
        "rmt_warmup_iters": 0,
        "rmt_warmup_thought": "drawn",
        "rmt_entropy_thresholds": [0.5, 1.0, 1.5],
        "rmt_positions_per_sample": 4,
        "rmt_group_size": 2,
        "rmt_answer_tokens": 3,
        "rmt_length_reward_weight": 0.25,
        "rmt_length_reward_maximum": 1.0,
        "rmt_no_length_reward": False,
        "rmt_log_samples_interval": 1,
    }
    return Namespace(**options | changes)


BYTES = [b"", b"", *(bytes([letter]) for letter in b"abcdefgh"), b"</t>", b" "]


TEMPLATE = Template("test", "", "{budget}", "</t>", "next")


def tiny_training(args: Namespace) -> MidTraining:
    return MidTraining(
        args=args,
        model=None,
        template=TEMPLATE,
        tokenizer=None,
        bytes_of=BYTES,
        has_bytes=torch.tensor([len(text) > 0 for text in BYTES]),
        grammar=ResponseGrammar(TEMPLATE, BYTES, [0]),
        preamble=[9, 9],
        close=[10],
        stop=[0],
        longest_position=200,
        seed=5,
    )


def tiny_trunk(head: list[int] = (9, 9), length: int = 40) -> Trunk:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, 10, (2, length + 1), generator=generator)
    text[0, 17] = 0
    loss_mask = (torch.rand(2, length, generator=generator) < 0.8).float()
    return build_trunk(
        text[:, :-1],
        torch.arange(length).repeat(2, 1),
        text[:, 1:],
        loss_mask,
        preamble=list(head),
        end_of_document=0,
        separate_documents=True,
    )


def step_plan(iteration: int = 0, **changes: Any) -> Schedule:
    options = {
        "budget": 4,
        "probabilities": (0.6, 0.3, 0.1),
        "positions_per_sample": 4,
        "group": 2,
        "warm_up": False,
        "thought_from_text": False,
    }
    return Schedule(iteration, **options | changes)


def readable_rows(trunk: Trunk, count: int) -> list[int]:
    """Rows with three tokens of text behind them in their document."""
    return [
        row
        for row in range(1, len(trunk) - 3)
        if all(BYTES[label] for label in trunk.labels[row : row + 3].tolist())
        and trunk.document_first[row] == trunk.document_first[row + 3]
    ][:count]


def scored(warm_up: bool = False, **changes: Any) -> tuple[Tensor, dict[str, Any], tuple]:
    """Two positions, a group of two: right after 2 tokens of 4; never closed; wrong; right."""
    training, trunk = tiny_training(step_args(**changes)), tiny_trunk([])
    labels = trunk.labels
    rows = readable_rows(trunk, 2)
    right = [int(labels[row]) for row in rows]
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
    responses = Responses(tokens, lengths, drawn, torch.zeros(2, 2, 8))
    step = step_plan(warm_up=warm_up)
    _, advantages, metrics = scoring.score(training, trunk, rows, responses, step)
    return advantages, metrics, (training, trunk, rows, responses, step)
