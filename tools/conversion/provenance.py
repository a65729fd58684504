"""Where converted weights come from: ``provenance.json`` beside them."""

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROVENANCE = "provenance.json"
DISTRIBUTIONS = ("megatron_rmt", "megatron-core", "torch", "transformers")


def write_provenance(
    directory: Path,
    source: str,
    iteration: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Say which weights these are.

    Args:
        directory: Where the weights are.
        source: What was converted.
        iteration: Name of the iteration's directory in a Megatron checkpoint.
        arguments: Arguments of the training job that saved it, if one did; its batch, seed and
            ``--rmt-*`` settings are noted.
    """
    note: dict[str, Any] = {"source": source}
    if iteration is not None:
        word = iteration.removeprefix("iter_")
        note["iteration"] = int(word) if word.isdecimal() else word
    if arguments:
        kept = ("load", "pretrained_checkpoint", "data_path", "seed", "global_batch_size", "lr")
        note["training"] = {key: arguments[key] for key in kept if arguments.get(key) is not None}
        note["training"]["samples"] = arguments.get("consumed_train_samples")
        rmt = {key: value for key, value in arguments.items() if key.split("_")[0] == "rmt"}
        if rmt.get("rmt"):
            note["rmt"] = rmt
    note["versions"] = {name: _version(name) for name in DISTRIBUTIONS}
    (directory / PROVENANCE).write_text(json.dumps(note, indent=2, default=str) + "\n")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
