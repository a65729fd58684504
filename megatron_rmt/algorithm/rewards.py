"""The reward of a response: r = (1 - w) * match + w * r_len (RMT, arXiv 2509.24375).

``REWARDS`` names what may stand in the place of the match; each sees one ``Evidence``. A reward of
the thought alone says so (``needs_no_answer``): then none is drawn, and all that is trained is the
thought.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

# [sum, count]: Megatron adds both over micro-batches and data-parallel ranks and divides.
Metric = tuple[float, float]


class ReadResponse(Protocol):
    """What was read from a response; see ``prompt.response.Response``."""

    thought_length: int
    closed: bool
    well_formed: bool
    prediction: bytes


@dataclass(frozen=True)
class Evidence:
    """What a reward sees: the responses to the chosen positions of one micro-batch.

    trunk: the text before a position, by its index. truth: how it really goes on, the bytes of each
    token, up to 64 tokens and to the end of the document. responses: ``[positions][group]``.
    thought_lengths: fp32 ``[positions, group]`` in tokens. budget: tokens of thought asked for,
    fp32 ``[positions, 1]``. boxed: answers are written in a box. target_tokens: how many of the
    true tokens are to be predicted. log_probs_of_truth: see ``log_prob_of_truth``; it runs the
    model.
    """

    trunk: Callable[[int], bytes]
    truth: Sequence[Sequence[bytes]]
    responses: Sequence[Sequence[ReadResponse]]
    thought_lengths: Tensor
    budget: Tensor
    boxed: bool
    log_probs_of_truth: Callable[[], tuple[Tensor, Tensor]]
    target_tokens: int = 1
    reports: dict[str, Metric] = field(default_factory=dict)

    def log_prob_of_truth(self, *, after_thought: bool) -> Tensor:
        """Nats a token, mean over the true tokens to be predicted, by the policy at temperature 1;
        on the CPU, fp32 or wider.

        after_thought: after the text, the thought and its end: ``[positions, group]``; else after
        the text alone: ``[positions, 1]``. One forward pass over the tree for both, the first time.

        Raises:
            DoorError: answers are boxed, so that the token does not stand right after the
                thought.
        """
        without, after = self.log_probs_of_truth()
        return after if after_thought else without[:, None]

    def report(self, name: str, values: Tensor) -> None:
        """Log the mean of ``values`` as "rmt ``name``", beside RMT's own metrics."""
        self.reports[f"rmt {name}"] = (float(values.sum()), float(values.numel()))


Reward = Callable[[Evidence], Tensor]


def match(of: Evidence) -> Tensor:
    """1.0 where a response predicts how the text goes on, else 0.0: ``[positions, group]``.

    Where several tokens are to be predicted, the share of them that its prediction begins with.
    """

    def worth(response: ReadResponse, truth: Sequence[bytes]) -> float:
        if of.target_tokens == 1:
            return float(is_right(response, truth, boxed=of.boxed))
        wanted = truth[: of.target_tokens]
        found = leading_tokens(response.prediction, wanted, boxed=of.boxed)
        return response.well_formed * found / max(1, len(wanted))

    return torch.tensor(
        [
            [worth(response, truth) for response in group]
            for truth, group in zip(of.truth, of.responses, strict=True)
        ]
    ).view(of.thought_lengths.shape)


def needs_no_answer(reward: Reward) -> Reward:
    """Marks a reward of the thought alone, as a decorator: a response ends with its thought."""
    reward.needs_answer = False
    return reward


def needs_answer(reward: Reward) -> bool:
    """Whether an answer is drawn after the thought: always, unless ``reward`` is marked."""
    return getattr(reward, "needs_answer", True)


@needs_no_answer
def information_gain(of: Evidence) -> Tensor:
    """How much likelier the thought makes the truth, in nats: ``[positions, group]``.

    RLP's reward (arXiv 2510.01265): log p(truth | text, thought) - log p(truth | text),
    both at temperature 1 by the policy as it stands. The tree's one pass gives both.
    """
    gain = of.log_prob_of_truth(after_thought=True) - of.log_prob_of_truth(after_thought=False)
    of.report("information gain", gain)
    return gain


# By name of --rmt-reward.
REWARDS: dict[str, Reward] = {"match": match, "information-gain": information_gain}


def is_right(response: ReadResponse, truth: Sequence[bytes], *, boxed: bool) -> bool:
    """Whether a well-formed response predicts the text; see ``matches``."""
    return response.well_formed and matches(response.prediction, truth, boxed=boxed)


def says(response: ReadResponse, answer: bytes) -> bool:
    """Whether a well-formed response says ``answer``, one line of text, and no more in its line.

    Blanks round either do not matter, nor do further lines of the response.
    """
    lines = response.prediction.strip().splitlines()
    return response.well_formed and bool(lines) and lines[0].rstrip() == answer.strip()


def matches(prediction: bytes, truth: Sequence[bytes], *, boxed: bool) -> bool:
    """Whether a prediction is a byte prefix of the truth that ends where a token ends.

    RPT's prefix matching (arXiv 2506.08007): it does not matter how the model's tokenizer would cut
    the prediction, and a prediction of several right tokens counts as well.

    boxed is lenient towards white space: a true token often starts with a space, while a model
    writes ``\\boxed{the}``. So a prediction that does not match as it is gets a second try,
    stripped of white space and against the truth without the white space that opens its first
    token. A first token of nothing but white space has to be predicted as it is: the text behind it
    is not the next token.

    Args:
        prediction: bytes of the predicted text; empty never matches.
        truth: bytes of each true token from the predicted position on.
    """
    if _is_prefix(prediction, truth):
        return True
    if not boxed or not truth or not truth[0].strip():
        return False
    return _is_prefix(prediction.strip(), [truth[0].lstrip(), *truth[1:]])


def leading_tokens(prediction: bytes, truth: Sequence[bytes], *, boxed: bool) -> int:
    """How many of the true tokens, from the first on, a prediction begins with.

    What follows them does not matter. boxed: white space as in ``matches``.
    """
    found = _leading(prediction, truth)
    if boxed and truth and truth[0].strip():
        found = max(found, _leading(prediction.strip(), [truth[0].lstrip(), *truth[1:]]))
    return found


def _leading(prediction: bytes, truth: Sequence[bytes]) -> int:
    ends = itertools.accumulate(truth)
    return sum(1 for _ in itertools.takewhile(prediction.startswith, ends))


def _is_prefix(prediction: bytes, truth: Sequence[bytes]) -> bool:
    """Whether ``prediction`` is the first tokens of ``truth``, one or more."""
    end = 0
    for token in truth:
        end += len(token)
        if end >= len(prediction):
            break
    return 0 < len(prediction) == end and b"".join(truth).startswith(prediction)


def length_reward(lengths: Tensor, budget: Tensor | int, maximum: float = 1.0) -> Tensor:
    """Triangular reward of thoughts' lengths l against the budget B (RMT's r_len).

    maximum * l / B on [0, B], maximum * (2 - l / B) on (B, 2B], 0 beyond.

    Args:
        lengths: tokens of each thought, any shape.
        budget: tokens asked for, above 0; a tensor's shape goes with that of ``lengths``.
        maximum: the reward at l = B.

    Returns:
        A floating-point tensor of the shape of ``lengths`` (fp32 for integers).
    """
    ratio = lengths / budget
    return maximum * torch.minimum(ratio, 2 - ratio).clamp(min=0)


def total_reward(match: Tensor, length_reward: Tensor, weight: float) -> Tensor:
    """(1 - weight) * match + weight * length_reward, elementwise; weight is w of the paper."""
    return (1 - weight) * match + weight * length_reward
