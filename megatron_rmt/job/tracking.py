"""Logs are for people: what cannot be written is said once, and training goes on.

Files of our own, TensorBoard and wandb alike, whatever is wrong with them: a full or read-only
disk, a folder that is gone, a service that does not answer.
"""

import contextlib
import hashlib
import os
import re
import secrets
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# In --save: what the ids of its wandb runs are made of.
WANDB_KEY = "rmt_wandb_key.txt"

_told: set[str] = set()


@contextlib.contextmanager
def never_ending_training(what: str) -> Iterator[None]:
    """Errors inside are said once for each ``what``, on stderr."""
    try:
        yield
    except Exception as error:
        if what not in _told:
            _told.add(what)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            sentence = (
                f"RMT: {what} cannot be written ({reason}); training goes on, and lines of it may "
                "be missing: look at the disk, its rights or the network."
            )
            with contextlib.suppress(OSError):  # stderr may lie on the same disk
                print(sentence, file=sys.stderr, flush=True)


class Forgiving:
    """Stands in for a writer of logs (an object or a module); calls of it never raise.

    A call that fails returns None. It passes for the writer where Megatron asks what it is.
    """

    def __init__(self, writer: Any, what: str) -> None:
        self._writer, self._what = writer, what

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = None
        with never_ending_training(self._what):
            value = getattr(self._writer, name)
        if isinstance(value, type) or value is None or isinstance(value, str | int | float):
            return value
        return Forgiving(value, self._what)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with never_ending_training(self._what):
            return self._writer(*args, **kwargs)
        return None

    @property
    def __class__(self) -> type:
        return type(self._writer)

    def __eq__(self, other: object) -> bool:
        return self is other or self._writer is other

    def __hash__(self) -> int:
        return hash(self._writer)


def forgive_writer(name: str, what: str) -> None:
    """Let ``megatron.training.global_vars`` hold a writer, under ``name``, that never raises."""
    from megatron.training import global_vars

    writer = getattr(global_vars, name)
    if writer is not None:
        setattr(global_vars, name, Forgiving(writer, what))


def continue_wandb_run(args: Namespace) -> None:
    """Name the wandb run by ``--save`` and ``--wandb-exp-name``, so that a resumed job goes on in
    it. Nothing where the environment names one, or on ranks without wandb."""
    project = getattr(args, "wandb_project", None)
    if not (project and args.save) or args.rank != args.world_size - 1:
        return
    if os.environ.get("WANDB_RUN_ID"):
        return
    path = Path(args.save) / WANDB_KEY
    with never_ending_training(str(path)):
        key = path.read_text(errors="replace").strip() if path.exists() else ""
        if not re.fullmatch(r"[0-9a-f]{16}", key):
            key = secrets.token_hex(8)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{key}\n")
        name = repr((key, args.wandb_entity, project, args.wandb_exp_name))
        os.environ["WANDB_RUN_ID"] = hashlib.sha256(name.encode()).hexdigest()[:8]
        os.environ.setdefault("WANDB_RESUME", "allow")
