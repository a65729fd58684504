"""The automaton that follows responses while they are generated, one table look-up a token.

It obeys the same rules as ``response.read_response``, which reads them afterwards.
"""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_rmt.prompt.template import BOX, MAXIMUM_BOX_DEPTH, Template


def _search_table(pattern: bytes) -> np.ndarray:
    """Knuth-Morris-Pratt as a table: [len(pattern), 256] -> bytes of the pattern matched so far."""
    table = np.zeros((len(pattern), 256), dtype=np.int32)
    for matched in range(len(pattern)):
        for byte in range(256):
            seen = pattern[:matched] + bytes([byte])
            table[matched, byte] = next(
                length for length in range(len(seen), -1, -1) if seen.endswith(pattern[:length])
            )
    return table


def _byte_automaton(template: Template) -> tuple[np.ndarray, int]:
    """Transitions [states, 256] over bytes, and how many states, from 0 on, are in the thought.

    States in order: progress in `close`; progress in `\\boxed{` and depth 1 to 8 in the box, or the
    one state of a "next" answer; done.
    """
    close = template.close.encode()
    answer = len(close)
    answer_states = len(BOX) + MAXIMUM_BOX_DEPTH if template.answer == "boxed" else 1
    done = answer + answer_states
    table = np.empty((done + 1, 256), dtype=np.int32)
    # A complete match of `close` leads to the state after its last, which opens the answer.
    table[:answer] = _search_table(close)
    table[done] = done
    if template.answer == "next":
        table[answer] = answer
        return table, answer
    box = answer + len(BOX)
    table[answer:box] = answer + _search_table(BOX)
    for state in range(box, done):
        table[state] = state
        # One brace deeper than the last depth is `done` as well.
        table[state, ord("{")] = state + 1
        table[state, ord("}")] = state - 1 if state > box else done
    return table, answer


class ResponseGrammar:
    """`state = grammar.next_state[state, token]` advances all rows.

    A row starts at `grammar.start`, or at `grammar.after_thought` where the prompt has closed the
    thought. A token without bytes leaves the state as it is.

    Attributes:
        next_state: int32 [states, vocab].
        start: the state before the first token.
        after_thought: the state of an open answer of which nothing is there yet.
        thinking: bool [states], the thought is open.
        done: bool [states], the answer is complete or an end token came. A "next" answer is only
            ended by an end token here: the caller counts its tokens.

    Args:
        template: what `close` and the answer look like.
        token_bytes: bytes of each token id, b"" for special tokens.
        end_token_ids: tokens that end a response.
        device: of the tensors.
    """

    def __init__(
        self,
        template: Template,
        token_bytes: list[bytes],
        end_token_ids: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        by_byte, answer = _byte_automaton(template)
        states = len(by_byte)
        lengths = np.array([len(token) for token in token_bytes])
        # Longest first: the tokens that have a byte in some column are the first ones.
        order = np.argsort(-lengths, kind="stable")
        ends = np.cumsum(lengths)
        starts = (ends - lengths)[order]
        text = np.frombuffer(b"".join(token_bytes), dtype=np.uint8)
        by_token = np.repeat(np.arange(states, dtype=np.int32)[:, None], len(token_bytes), axis=1)
        for column in range(lengths.max(initial=0)):
            longer = np.count_nonzero(lengths > column)
            byte = text[starts[:longer] + column]
            by_token[:, :longer] = by_byte[by_token[:, :longer], byte]
        next_state = np.empty_like(by_token)
        next_state[:, order] = by_token
        next_state[:, list(end_token_ids)] = states - 1

        self.start, self.after_thought = 0, answer
        self.next_state = torch.from_numpy(next_state).to(device)
        self.thinking = torch.arange(states, device=device) < answer
        self.done = torch.arange(states, device=device) == states - 1
