"""The files of the model that a tokenizer came with, and what they say of it."""

import json
from pathlib import Path
from typing import Any

from megatron_rmt.prompt.token_bytes import transformers_tokenizer


def file_beside(tokenizer: Any, name: str) -> Path | None:
    """The file ``name`` of the directory, or the hub's repository, that ``tokenizer`` was read
    from; None where it is not on this machine.

    tokenizer: of ``transformers``, or Megatron's.
    """
    inner = transformers_tokenizer(tokenizer)
    place = getattr(tokenizer, "path", None) if inner is None else inner.name_or_path
    if not place:
        return None
    path = Path(place)
    if path.exists():
        found = (path if path.is_dir() else path.parent) / name
        return found if found.is_file() else None
    from transformers.utils import cached_file

    try:
        cached = cached_file(str(place), name, local_files_only=True)
    except (OSError, ValueError):
        return None
    return None if cached is None else Path(cached)


def declared_ends(tokenizer: Any) -> set[int]:
    """The token ids at which ``generation_config.json`` and ``config.json`` beside the tokenizer
    say that a text ends (``eos_token_id``: one or several).

    Raises:
        ValueError: such a file is not JSON.
    """
    found: set[Any] = set()
    for name in ("generation_config.json", "config.json"):
        path = file_beside(tokenizer, name)
        if path is None:
            continue
        try:
            declared = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError):
            raise ValueError(f"{path} is not a JSON object; repair it or copy it again.") from None
        found.update(declared if isinstance(declared, list) else [declared])
    return {end for end in found if isinstance(end, int)}
