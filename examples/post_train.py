"""What ``post_train.sh`` puts behind RMT's doors: positions at answers, and a reward of the answer.

A document of the token files is a question, the marker (``MARKER`` in the environment, ``#### `` if
it is not set) and the answer, one line of up to 64 tokens. The model thinks where the text ends
with the marker, and is rewarded if it then says the rest of the document.
"""

import os

import torch
from torch import Tensor

from megatron_rmt.algorithm.curriculum import Candidates
from megatron_rmt.algorithm.doors import depends_on
from megatron_rmt.algorithm.rewards import Evidence, says

MARKER = os.environ.get("MARKER", "#### ").encode()


@depends_on(MARKER=MARKER.decode())
def answers(of: Candidates) -> list[int]:
    """Before the answer of each document, ascending; if they are more than ``of.count``, as many of
    them, drawn uniformly.

    Left out are documents that the sample may have cut: the first, and the last unless it ends
    before the sample does.
    """
    texts = [of.trunk(row) for row in range(len(of.tiers))]
    starts = [row for row, text in enumerate(texts) if row and not text.startswith(texts[row - 1])]
    found = []
    for first, limit in zip(starts, [*starts[1:], len(texts)], strict=True):
        # The token that ends a document adds no text.
        is_whole = limit < len(texts) or texts[limit - 2 : limit - 1] == texts[limit - 1 :]
        # A blank behind the marker may be part of the answer's first token.
        marked = [r for r in range(first, limit) if texts[r].rstrip().endswith(MARKER.rstrip())]
        if is_whole and marked and of.tiers[marked[-1]] >= 0:
            found.append(marked[-1])
    if len(found) <= of.count:
        return found
    in_order = sorted(zip(of.draws(len(found)), found, strict=True))
    return sorted(row for _, row in in_order[: of.count])


def exact(of: Evidence) -> Tensor:
    """1.0 where a response says the rest of the document, else 0.0: ``[positions, group]``."""
    right = [
        [says(response, b"".join(truth)) for response in group]
        for truth, group in zip(of.truth, of.responses, strict=True)
    ]
    return torch.tensor(right, dtype=torch.float32).view(of.thought_lengths.shape)
