"""Hugging Face ``generate``, for ``rollout.py``, which calls it in a process of its own.

A Hugging Face model needs one in which the CPU does not stand in for CUDA.
"""

import functools
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def left_padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, ``[rows, longest]`` each."""
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return tokens, mask


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that the cache holds."""
    return sum(
        held.numel() * held.element_size()
        for layer in cache.layers
        for held in (layer.keys, layer.values)
    )


class Clock(StoppingCriteria):
    """Notes when each token has been drawn; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(tokens), dtype=torch.bool)


@torch.no_grad()
def generate(model: Any, prompts: list[list[int]], tokens: int, cache: str) -> dict[str, Any]:
    """Sample exactly ``tokens`` for each prompt at temperature 0.8.

    Returns seconds, those until the first token was drawn, and the bytes of keys and values."""
    ids, mask = left_padded(prompts)
    clock = Clock()
    began = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        temperature=0.8,
        top_k=0,
        top_p=1.0,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
        return_dict_in_generate=True,
        stopping_criteria=StoppingCriteriaList([clock]),
        **({"cache_implementation": "static"} if cache == "static" else {}),
    )
    assert output.sequences.shape[1] == ids.shape[1] + tokens
    return {
        "seconds": clock.times[-1] - began,
        "first_token_seconds": clock.times[0] - began,
        "key_value_bytes": cache_bytes(output.past_key_values),
    }


def start(directory: str, prompts: list[list[int]], threads: int) -> None:
    """Begin the process. directory: the model's. prompts: token ids."""
    global _directory, _prompts
    torch.set_num_threads(threads)
    _directory, _prompts = directory, prompts


def answer(tokens: int, rows: int | None, dtype: str, cache: str) -> dict[str, Any]:
    """``generate`` for the last ``rows`` prompts (None: all)."""
    return generate(_model(dtype), _prompts[-(rows or len(_prompts)) :], tokens, cache)


@functools.cache
def _model(dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(_directory, dtype=DTYPES[dtype]).eval()
