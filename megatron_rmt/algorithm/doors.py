"""The functions that a user may put in the place of ours: by name, or by an importable path."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Door = TypeVar("Door", bound=Callable[..., Any])


class DoorError(ValueError):
    """What such a function returned cannot be trained on; one sentence with the remedy."""


def depends_on(**values: str) -> Callable[[Door], Door]:
    """Marks a function, as a decorator: what it returns depends on these values, such as variables
    of the environment, so a run may go on only where they are as they were."""

    def mark(function: Door) -> Door:
        function.depends_on = values
        return function

    return mark


def values_of(function: Callable[..., Any]) -> dict[str, str]:
    """What ``depends_on`` marks ``function`` with; empty unless it is marked."""
    return getattr(function, "depends_on", {})


def find(flag: str, name: str, known: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function that ``flag`` names: one of ``known``, or ``module:function``.

    One of another's is called as those of ``known`` are, so it has to take as many arguments.

    Raises:
        ValueError: there is no such function, or it cannot be called like the known ones.
    """
    if name in known:
        return known[name]
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(
            f"{flag} is {name}; pass {', '.join(known)}, or your own as module:function."
        )
    try:
        function = getattr(importlib.import_module(module), attribute)
    # Whatever a module does when it is imported; a script without a guard may end the program.
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"{flag} is {name}, which cannot be imported ({reason}); pass a module on PYTHONPATH "
            "and a function in it."
        ) from None
    example = next(iter(known.values()))
    wanted = [*inspect.signature(example).parameters.values()]
    try:
        inspect.signature(function).bind(*wanted)
    except (TypeError, ValueError):
        raise ValueError(
            f"{flag} is {name}, which cannot be called as {example.__name__}"
            f"{inspect.signature(example)} is; give it these arguments."
        ) from None
    return function
