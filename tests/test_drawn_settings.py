"""Settings of Megatron's, drawn at random from those that change training, in twos and threes: with
RMT each combination trains, or ends in one sentence before a model is built.
"""

import argparse
import math
import random
import re
from pathlib import Path

import pytest
from megatron.training.arguments import add_megatron_arguments

from tests.tiny_run import RMT, TinyInputs, run

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

SEED, SETTINGS = 18, 30
SIZES = (2, 3) * (SETTINGS // 5)
GROUPS = (
    "transformer configuration",
    "network size",
    "regularization",
    "training",
    "RNG and initialization",
    "learning rate and weight decay",
    "mixed precision",
    "distributed init",
    "data and dataloader",
    "validation",
    "moe",
    "experimental",
    "rerun engine",
)
# They mean nothing without what they belong to, which is refused or is no training.
OF_ANOTHER = "inference|exit|dsa|mamba|fsdp|tp-comm|kitchen|fp4|mxfp8|muon|rl-|mup-|linear-[kcv]"
# What a setting without choices is given; one that is not here and asks for a value is not drawn.
VALUES = {
    "--weight-decay": "0.1",
    "--clip-grad": "0.5",
    "--adam-beta1": "0.8",
    "--adam-beta2": "0.95",
    "--sgd-momentum": "0.5",
    "--norm-epsilon": "1e-6",
    "--glu-linear-offset": "0.5",
    "--activation-func-clamp-value": "7",
    "--init-method-std": "0.01",
    "--rotary-percent": "0.5",
    "--rotary-base": "50000",
    "--rotary-seq-len-interpolation-factor": "2",
    "--no-rope-freq": "2",
    "--window-size": "8,0",
    "--mtp-num-layers": "1",
    "--hidden-dropout": "0.1",
    "--attention-dropout": "0.1",
    "--micro-batch-size": "2",
    "--iterations-to-skip": "2",
    "--lr-warmup-fraction": "0.5",
    "--lr-warmup-init": "1e-5",
    "--decoupled-lr": "1e-4",
    "--start-weight-decay": "0.01",
    "--num-experts": "4",
    "--moe-aux-loss-coeff": "0.1",
    "--moe-z-loss-coeff": "0.1",
    "--moe-router-topk": "1",
    "--moe-layer-freq": "2",
    "--moe-shared-expert-intermediate-size": "32",
    "--moe-input-jitter-eps": "0.1",
    "--moe-expert-capacity-factor": "1",
    "--mlp-chunks-for-training": "2",
    "--recompute-num-layers": "1",
    "--train-sync-interval": "1",
    "--ddp-bucket-size": "1000",
    "--initial-loss-scale": "1024",
    "--eval-micro-batch-size": "2",
    "--num-workers": "0",
    "--cpu-offloading-num-layers": "1",
}


def _settings() -> list[tuple[str, ...]]:
    """Each setting that may be drawn, as words; one for each choice but the default."""
    add = getattr(add_megatron_arguments, "megatron_rmt_original", add_megatron_arguments)
    parser = add(argparse.ArgumentParser(allow_abbrev=False))
    found = []
    for group in parser._action_groups:
        for action in group._group_actions if group.title in GROUPS else ():
            name = action.option_strings[0]
            if re.search(OF_ANOTHER, name):
                continue
            if action.nargs == 0:
                found.append((name,))
            elif action.choices:
                # Some choices are members of an enumeration.
                words = (getattr(one, "name", str(one)) for one in action.choices)
                found += [(name, word) for word in words if word != str(action.default)]
            elif name in VALUES:
                found.append((name, VALUES[name]))
    return found


def drawn(seed: int) -> list[tuple[str, ...]]:
    """Combinations of settings, as words: ``SETTINGS`` of them in twos and threes."""
    settings = random.Random(seed).sample(sorted(_settings()), SETTINGS)
    combinations = []
    for size in SIZES:
        combinations.append(tuple(word for _ in range(size) for word in settings.pop()))
    return combinations


@pytest.mark.parametrize("words", drawn(SEED), ids=" ".join)
def test_a_combination_trains_or_ends_in_one_sentence(
    inputs: TinyInputs, tmp_path: Path, words: tuple[str, ...]
):
    flags = [*inputs.flags(), *RMT, "--load", str(tmp_path / "none"), "--train-iters", "2"]
    text = ""
    try:
        finished = run(tmp_path / "run", 1, [*flags, *words])
    except AssertionError as error:
        text = str(error)
    if text:
        ends = re.findall(r"SystemExit: (.+)$", text, re.MULTILINE)
        assert ends, text
        # 2: the parser's own, with its usage.
        assert ends[-1] == "2" or re.match(r"RMT cannot train|RMT, |Megatron refuses", ends[-1])
        return
    assert [line["iteration"] for line in finished.metrics] == [1, 2]
    for line in finished.metrics:
        assert math.isfinite(line["ntp loss"])
        assert line["branch tokens"] > 0 or line["entropy of chosen"] is None
