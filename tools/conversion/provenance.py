"""Where converted weights come from: ``provenance.json`` beside them."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

PROVENANCE = "provenance.json"
DISTRIBUTIONS = ("megatron_rmt", "megatron-core", "torch", "transformers")


def write_provenance(
    directory: Path, source: str, iteration: str | None = None, arguments: Any = None
) -> None:
    """Say which weights these are.

    Args:
        directory: Where the weights are.
        source: What was converted.
        iteration: Name of the iteration's directory in a Megatron checkpoint.
        arguments: Arguments of the training job that saved it; its batch, seed and ``--rmt-*``
            settings are noted.
    """
    note: dict[str, Any] = {"source": source}
    if iteration is not None:
        word = iteration.removeprefix("iter_")
        note["iteration"] = int(word) if word.isdecimal() else word
    if arguments is not None:
        settings = vars(arguments)
        kept = ("load", "pretrained_checkpoint", "data_path", "seed", "global_batch_size", "lr")
        note["training"] = {key: settings[key] for key in kept if settings.get(key) is not None}
        note["training"]["samples"] = settings.get("consumed_train_samples")
        rmt = {key: value for key, value in settings.items() if key.split("_")[0] == "rmt"}
        if rmt.get("rmt"):
            note["rmt"] = rmt
    note["versions"] = {name: _version(name) for name in DISTRIBUTIONS}
    (directory / PROVENANCE).write_text(json.dumps(note, indent=2, default=str) + "\n")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
