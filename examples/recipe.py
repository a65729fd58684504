"""Put a recipe's flags and the command line together, and become the pre-training script.

A recipe (``pretrain_rmt.args``) is a text file of flags: ``#`` starts a comment, ``${NAME}`` and
``${NAME:-default}`` are environment variables, ``@file`` reads another recipe in, found beside this
one or from the working directory. A flag given again replaces what stood before it. Run by
``pretrain_rmt.sh`` once per rank; the process stays the same, so torchrun watches the training.
"""

import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def recipe_flags(recipe: Path, given: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The flags of ``recipe``, without those that the command line ``given`` replaces.

    Raises:
        ValueError: the recipe or a file that it names is missing, or a variable is not set.
    """
    replaced = {word.split("=", 1)[0] for word in given if word.startswith("--")}
    groups: dict[str, tuple[list[str], Path]] = {}
    for words, origin in _read(recipe, environment):
        name = words[0].split("=", 1)[0]
        groups.pop(name, None)
        groups[name] = (words, origin)
    return [
        _expand(word, words[0], origin, environment)
        for name, (words, origin) in groups.items()
        if name not in replaced
        for word in words
    ]


def _read(recipe: Path, environment: Mapping[str, str]) -> Iterator[tuple[list[str], Path]]:
    """Each flag with its values, and the file where it stands."""
    for words in _split(recipe):
        if not words[0].startswith("@"):
            yield words, recipe
            continue
        named = Path(_expand(words[0][1:], words[0], recipe, environment))
        beside = recipe.parent / named
        yield from _read(beside if beside.is_file() else named, environment)


def _split(path: Path) -> list[list[str]]:
    """The words of ``path``, one list for each flag and its values."""
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: CHECKPOINT must be a folder written by "
            "tools/convert_checkpoint.py, and RECIPE a file of flags."
        )
    groups: list[list[str]] = []
    for word in shlex.split(path.read_text(encoding="utf-8"), comments=True):
        if word.startswith(("--", "@")) or not groups:
            groups.append([word])
        else:
            groups[-1].append(word)
    return groups


def _expand(word: str, flag: str, recipe: Path, environment: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = environment.get(name) or default
        if found is None:
            raise ValueError(
                f"the environment variable {name} is not set, which {recipe.name} needs for "
                f"{flag}: set it, or give {flag} on the command line."
            )
        return found

    return _VARIABLE.sub(value, word)


def main() -> None:
    given = sys.argv[1:]
    recipe = Path(os.environ.get("RECIPE") or EXAMPLES / "pretrain_rmt.args")
    entry_point = os.environ.get("ENTRY_POINT") or str(EXAMPLES / "pretrain_rmt.py")
    try:
        flags = recipe_flags(recipe, given, os.environ)
    except ValueError as error:
        sys.exit(f"pretrain_rmt.sh: {error}")
    command = [sys.executable, "-u", entry_point, *flags, *given]
    if os.environ.get("RANK", "0") == "0":
        print("+", shlex.join(command), flush=True)
    # Megatron's examples set it: with several work queues, communication may overtake computation.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Trees and rollouts have other sizes in every step: without it the allocator holds a third more
    # than is in use. Leave it out with --use-nccl-ub, by naming another value.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # A run that names a wandb project is recorded here, and sent nowhere unless asked to.
    os.environ.setdefault("WANDB_MODE", "offline")
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
