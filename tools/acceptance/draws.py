"""The tokens that are drawn: their distribution, and the same ones over a split vocabulary."""

import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from acceptance.check import Found, Machine
from acceptance.program import run_program
from megatron_rmt.algorithm.rng import uniforms
from megatron_rmt.rollout.sampling import sample_tokens

TEMPERATURE = 0.8
# Chance that a right sampler falls short; the draws are the same each time.
LEAST_P = 1e-4
CUTS: dict[str, dict[str, float]] = {
    "whole": {},
    "top-k": {"top_k": 20},
    "top-p": {"top_p": 0.9},
    "both": {"top_k": 50, "top_p": 0.8},
}


def _scores(columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    return 2 * torch.randn(columns, generator=generator)


def _numbers(draws: int, device: torch.device) -> Tensor:
    draw = torch.arange(draws, device=device)
    return uniforms(11, 2, draw // 64, draw % 64, draw * 0, draw * 0)


def expected(scores: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Probabilities fp64 of the tokens of ``scores`` ``[columns]``."""
    whole = (scores.double() / TEMPERATURE).softmax(-1)
    descending, order = whole.sort(descending=True)
    if top_k is not None:
        descending[top_k:] = 0
    if top_p is not None:
        before = descending.cumsum(-1) - descending
        descending[before >= top_p * descending.sum()] = 0
    return torch.zeros_like(whole).index_copy_(0, order, descending / descending.sum())


def p_value(tokens: Tensor, probabilities: Tensor) -> float:
    """Of the chi-square test of drawn ``tokens``; 0 where one was drawn that cannot be."""
    count = torch.bincount(tokens.cpu(), minlength=len(probabilities)).double()
    if bool((count[probabilities == 0] > 0).any()):
        return 0.0
    mean = probabilities * len(tokens)
    # Rare tokens count together.
    rare = mean < 10
    cells = [torch.cat([x[~rare], x[rare].sum()[None]]) if rare.any() else x for x in (count, mean)]
    kept = cells[1] > 0
    squares = ((cells[0] - cells[1])[kept].square() / cells[1][kept]).sum()
    return float(torch.special.gammaincc((kept.sum() - 1) / 2, squares / 2))


def distribution(machine: Machine) -> Found:
    """Chi-square of many draws from one row of scores against softmax in float64."""
    draws, columns = (2**18, 1001) if machine.on_gpu else (2**13, 201)
    scores = _scores(columns)
    logits = scores.to(machine.device).expand(draws, -1)
    found = {}
    for name, cut in CUTS.items():
        tokens, log_probs = sample_tokens(
            logits,
            _numbers(draws, machine.device),
            temperature=TEMPERATURE,
            vocab_start=0,
            tp_group=None,
            **cut,
        )
        found[f"p, {name}"] = p_value(tokens, expected(scores, **cut))
    whole = (scores.double() / TEMPERATURE).log_softmax(-1)
    off = float((log_probs.cpu() - whole[tokens.cpu()]).abs().max())
    worst = min(found, key=lambda name: found[name])
    passed = found[worst] > LEAST_P and off < 1e-5
    value = f"{found[worst]:.2g} ({worst}), log-probs off by {off:.1g}"
    return Found(passed, value, f"> {LEAST_P:g}, < 1e-05", found | {"log-probs": off})


def split_vocabulary(machine: Machine) -> Found:
    """The same tokens and log-probs from two ranks that hold half of the vocabulary each."""
    target = machine.folder / "split.json"
    words = ["--module", "acceptance.draws", str(target), "gpu" if machine.on_gpu else "cpu"]
    run_program(machine, "split", 2, words, limit=120)
    return Found.below(json.loads(target.read_text(encoding="utf-8")), 1e-5)


def _rank(target: Path, on_gpu: bool) -> None:
    """On each of two ranks; the first writes how many tokens are others, and by how much log-probs
    differ at most."""
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    draws, columns, middle = 2**10, 5003, 2560
    generator = torch.Generator().manual_seed(4)
    logits = (2 * torch.randn(draws, columns, generator=generator)).to(device)
    own = [slice(0, middle), slice(middle, columns)][rank]
    found = {}
    for name, cut in CUTS.items():
        settings = {"temperature": TEMPERATURE} | cut
        numbers = _numbers(draws, device)
        alone = sample_tokens(logits, numbers, vocab_start=0, tp_group=None, **settings)
        split = sample_tokens(
            logits[:, own].contiguous(),
            numbers,
            vocab_start=own.start,
            tp_group=torch.distributed.group.WORLD,
            **settings,
        )
        found[f"other tokens, {name}"] = float((alone[0] != split[0]).sum())
        found[f"log-probs, {name}"] = float((alone[1] - split[1]).abs().max())
    if rank == 0:
        target.write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), sys.argv[2] == "gpu")
