"""What a run goes on from: the checkpoint that ``--load`` names, and the settings behind it.

Megatron stores all arguments with a checkpoint, ``--rmt-*`` among them, and RMT adds how the prompt
was rendered (``args.rmt_prompt_rendering``), what functions of the user depend on
(``args.rmt_doors``) and marks of the token files (``args.rmt_data``): of the data Megatron keeps
nothing but the number of samples taken. A resumed run repeats the one that was not stopped, digit
for digit, only if all that decides what a step computes is as it was; so a difference is refused by
name, unless ``--rmt-allow-changed-settings`` is given.
"""

import hashlib
import itertools
import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rmt.algorithm.curriculum import SELECTIONS
from megatron_rmt.algorithm.doors import find, values_of
from megatron_rmt.algorithm.losses import LOSSES
from megatron_rmt.algorithm.rewards import REWARDS
from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.job.data_files import marks_of_data
from megatron_rmt.job.settings import as_typed, flag_name
from megatron_rmt.job.text_files import read_text_file
from megatron_rmt.mid_training import steps_of_run
from megatron_rmt.prompt.prompt import Prompt

TRACKER = "latest_checkpointed_iteration.txt"
# Settings that decide where and how a step is computed or reported, and not what it computes.
MAY_CHANGE = frozenset(
    {
        "rmt",
        "config",
        "allow_changed_settings",
        "no_digests",
        "logprob_tolerance",
        "max_bad_steps",
        "rollout_kv_gib",
        "max_tokens",
        "attention",
        "head_chunk_size",
        "eval_interval",
        "eval_data",
        "eval_documents",
        "eval_positions_per_document",
        "eval_positions",
        "eval_samples",
        "metrics_file",
        "log_samples_interval",
    }
)
# Settings of which the rendered prompt says more, where both runs have it.
_RENDERED = frozenset(map(flag_name, ("template", "no_chat")))
_SHOWN = 40
# Where, in --load, Megatron looks for checkpoints that are saved often and not kept.
_OFTEN = "non_persistent"


def checkpoint_problems(args: Namespace) -> Iterator[str]:
    """One sentence if what ``--load`` or ``--pretrained-checkpoint`` names cannot be gone on from.

    Megatron ends on some of these with exit code 0, as if the training were over.
    """
    places = {"--load": args.load, "--pretrained-checkpoint": args.pretrained_checkpoint}
    if args.non_persistent_ckpt_type == "global":
        own = args.non_persistent_global_ckpt_dir
        places["--non-persistent-global-ckpt-dir"] = own or (args.load and f"{args.load}/{_OFTEN}")
    for flag, place in places.items():
        if not place or "://" in place:
            continue
        # Those that are not kept are loaded if they are the newest.
        step = None if flag.startswith("--non-persistent") else args.ckpt_step
        try:
            folder = checkpoint_folder(Path(place), step)
        except ValueError as error:
            yield f"{flag} is {place}, but {error}."
            continue
        if folder is not None and not (folder.is_dir() and any(folder.iterdir())):
            yield (
                f"{flag} is {place}, but there is no {folder.name} in it, which "
                f"{_reason(step, folder)} says to load; {_choices(Path(place))}."
            )
        elif folder is not None and (reason := _half_there(folder)):
            yield (
                f"{flag} is {place}, but {folder.name} in it, which {_reason(step, folder)} says "
                f"to load, is no whole checkpoint ({reason}); {_choices(Path(place))}."
            )
        alone = not (args.pretrained_checkpoint or args.non_persistent_ckpt_type)
        if folder is None and args.exit_on_missing_checkpoint and alone:
            yield (
                f"--load is {place} and --exit-on-missing-checkpoint is set, but there is no "
                f"{TRACKER} in it; pass the folder of a checkpoint."
            )


def checkpoint_folder(load: Path, step: int | None) -> Path | None:
    """The folder in ``load`` that Megatron would load; None if nothing was saved yet.

    step: the iteration that ``--ckpt-step`` asks for, if any.

    Raises:
        ValueError: the file that names it cannot be read.
    """
    tracker, word = load / TRACKER, None
    try:
        word = read_text_file(tracker).strip()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ValueError(f"{tracker} cannot be read ({reason}); {_choices(load)}") from None
    if word == "release":
        return load / word
    if word is not None and not (word.isascii() and word.isdecimal() and len(word) < 19):
        raise ValueError(
            f"{tracker} holds {word[:_SHOWN]!r} instead of an iteration; {_choices(load)}"
        )
    chosen = step or word
    return None if chosen is None else load / f"iter_{int(chosen):07d}"


def _half_there(folder: Path) -> str | None:
    """What says that a checkpoint was not written to its end, or was damaged; in words."""
    last = folder / "metadata.json"
    if not last.exists():
        # Megatron's older format has a folder for each rank, and nothing that comes last.
        older = any(path.name.startswith("mp_rank_0") for path in folder.iterdir())
        return None if older else f"there is no {last.name}, which is written last"
    try:
        whole = "sharded_backend" in json.loads(last.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        whole = False
    return None if whole else f"{last.name} is damaged"


def _reason(step: int | None, folder: Path) -> str:
    return f"--ckpt-step {step}" if step and folder.name != "release" else TRACKER


def _choices(load: Path) -> str:
    folders = [path for path in load.glob("iter_*") if path.is_dir()]
    saved = sorted(path.name for path in folders if not _half_there(path))
    if not saved:
        return "leave the flag out to begin anew, as nothing is saved there"
    return (
        f"write the number of a whole checkpoint into {TRACKER} (saved: {', '.join(saved[-5:])}), "
        "or leave the flag out to begin anew"
    )


def rendering(prompt: Prompt) -> dict[str, str]:
    """What the model is asked with, for ``args.rmt_prompt_rendering``: the prompt's texts, the form
    of its answer, and a digest of its token ids and of the vocabulary."""
    ids = (prompt.preamble, prompt.stem(1), prompt.close, prompt.stop)
    digest = hashlib.sha256(repr((ids, prompt.bytes_of)).encode()).hexdigest()
    return {**prompt.rendering(), "answer": prompt.template.answer, "tokens": digest[:16]}


def behind_doors(settings: Settings) -> dict[str, str]:
    """What reward, selection and loss say that they depend on, for ``args.rmt_doors``.

    Raises:
        ValueError: see ``doors.find``.
    """
    doors = (
        ("--rmt-reward", settings.reward, REWARDS),
        ("--rmt-select", settings.select, SELECTIONS),
        ("--rmt-loss", settings.loss, LOSSES),
    )
    return {name: value for door in doors for name, value in values_of(find(*door)).items()}


def stored_arguments(args: Namespace) -> Any:
    """The arguments stored with the checkpoint that this run goes on from, read before a model is
    built; None where there are none, they cannot be read so early, or nothing of them counts
    (``--finetune``)."""
    if not args.load or args.finetune or "://" in args.load:
        return None
    try:
        folder = checkpoint_folder(Path(args.load), args.ckpt_step)
        return folder and dist_checkpointing.load_common_state_dict(folder).get("args")
    except (Exception, CheckpointException):
        return None  # another format, or damaged: Megatron reads it again, and says what it finds


def check_same_settings(args: Namespace, prompt: Prompt, stored: Any) -> None:
    """Refuse to go on from a run of RMT under other settings, or name them once.

    stored: arguments of the run that saved the checkpoint; None for none.

    Raises:
        ValueError: one sentence with each setting, its value, and what it was.
    """
    if stored is None or not Settings.of(stored).trains_with_rl:
        return
    changed = changed_settings(args, rendering(prompt), stored)
    changed += changed_doors(args, stored) + changed_data(args, stored)
    if not changed:
        return
    differ = f"--load {args.load} was trained with other settings: {'; '.join(changed)}"
    if not Settings.of(args).allow_changed_settings:
        raise ValueError(
            f"{differ}; pass what they were, or --rmt-allow-changed-settings to go on with these."
        )
    if args.rank == 0:
        print(f"RMT: {differ}; going on with these.", file=sys.stderr, flush=True)


def changed_settings(args: Namespace, rendered: Mapping[str, str], stored: Any) -> list[str]:
    """What differs from the run that ``stored`` these arguments, with both values."""
    now, then = _deciding(args), _deciding(stored)
    before = getattr(stored, "rmt_prompt_rendering", None)
    if before is not None:
        now, then = ({k: v for k, v in own.items() if k not in _RENDERED} for own in (now, then))
    changed = [
        f"{name} is {_typed(value)} and was {_typed(then[name])}"
        for name, value in now.items()
        if value != then[name]
    ]
    other = [name for name, value in rendered.items() if value != (before or rendered).get(name)]
    # Another text is other tokens, too.
    other = [name for name in other if name != "tokens" or other == ["tokens"]]
    return changed + [_changed_text(name, rendered[name], before.get(name, "")) for name in other]


def changed_doors(args: Namespace, stored: Any) -> list[str]:
    """What a function of the user depends on and is not as in the run that ``stored`` these
    arguments, with both values.

    Raises:
        ValueError: see ``doors.find``.
    """
    now, then = behind_doors(Settings.of(args)), getattr(stored, "rmt_doors", {})
    return [
        f"{name} is {value!r} and was {then[name]!r}"
        for name, value in now.items()
        if name in then and value != then[name]
    ]


def changed_data(args: Namespace, stored: Any) -> list[str]:
    """Whether the token files are others than those of the run that ``stored`` these arguments;
    they may have been moved.

    Raises:
        ValueError: see ``data_files.marks_of_data``.
    """
    now, then = marks_of_data(args), getattr(stored, "rmt_data", None)
    if then is None or [*now.values()] == [*then.values()]:
        return []
    replaced = [prefix for prefix in now if prefix in then and now[prefix] != then[prefix]]
    if replaced:
        return [f"{replaced[0]}.bin and .idx hold another corpus than they did"]
    named, before = (", ".join(prefixes) or "no token files" for prefixes in (now, then))
    return [f"the data flags name {named} and named {before}"]


def _deciding(args: Any) -> dict[str, Any]:
    """By flag, the settings that decide what a step computes."""
    settings = Settings.of(args)
    own = {
        flag_name(field.name): getattr(settings, field.name)
        for field in fields(Settings)
        if field.name not in MAY_CHANGE
    }
    of_megatron = {"train_iters": steps_of_run(args), "seed": getattr(args, "seed", None)}
    seed = of_megatron["seed"] if settings.seed is None else settings.seed
    return {
        **{"--" + name.replace("_", "-"): value for name, value in of_megatron.items()},
        **own,
        flag_name("seed"): seed,
    }


def _typed(value: Any) -> str:
    return "left out" if value is None else as_typed(value)


def _changed_text(name: str, now: str, then: str) -> str:
    """A rendered text that has changed, from shortly before the first difference on."""
    if name == "tokens":
        return (
            f"the tokenizer gives other tokens ({now} is the digest of vocabulary and prompt, and "
            f"was {then})"
        )
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(now, then, strict=False))
    first = max(0, len([*same]) - _SHOWN // 4)
    here, before = (repr(text[first : first + _SHOWN]) for text in (now, then))
    return f"the prompt's {name} has {here} at character {first} and had {before}"
