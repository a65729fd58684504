"""``--rmt-config``: a YAML file whose settings count as if they had been given as flags.

    group-size: 4            # --rmt-group-size 4
    force-close: true        # --rmt-force-close
    entropy-thresholds: [0.5, 1.0, 1.5]

The file is read while the command line is parsed, as defaults of the flags: whatever the command
line holds wins. A switch that the file turns on cannot be turned off there.
"""

import functools
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

CONFIG = "--rmt-config"


class Setting(Protocol):
    """What a flag says of its values; see ``megatron_rmt.job.settings.Flag``."""

    name: str
    kind: type
    metavar: tuple[str, ...]

    @property
    def attribute(self) -> str: ...


def read_config_when_parsing(parser: ArgumentParser, flags: Sequence[Setting]) -> None:
    """Let ``parser`` take defaults from the file that the command line names, if it names one.

    A file that cannot be used ends the program with exit code 2 and one line on stderr.
    """
    parse = parser.parse_known_args

    @functools.wraps(parse)
    def parse_known_args(
        args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> tuple[Namespace, list[str]]:
        words = sys.argv[1:] if args is None else list(args)
        try:
            path = _named_file(words)
            if path is not None:
                parser.set_defaults(**read_config(path, flags))
        except ValueError as error:
            parser.exit(2, f"{error}\n")
        parsed, rest = parse(words, namespace)
        if getattr(parsed, "yaml_cfg", None) and ("--rmt" in words or path is not None):
            # Megatron then takes all its arguments from that file, and would forget these.
            parser.exit(2, "--yaml-cfg is given; RMT's flags do not work with it, pass flags.\n")
        return parsed, rest

    parser.parse_known_args = parse_known_args


def _named_file(words: Sequence[str]) -> Path | None:
    path = None
    for index, word in enumerate(words):
        if word.startswith(f"{CONFIG}="):
            path = word.partition("=")[2]
        elif word == CONFIG:
            if index + 1 == len(words):
                raise ValueError(f"{CONFIG} names no file; pass a YAML file.")
            path = words[index + 1]
    return None if path is None else Path(path)


def read_config(path: Path, flags: Sequence[Setting]) -> dict[str, Any]:
    """The settings of the file, by attribute of the parsed arguments.

    Keys are the flags without ``--rmt-``; ``rmt: true`` is ``--rmt``.

    Raises:
        ValueError: the file cannot be read, or a key is unknown or stands twice, or a value has
            the wrong type; one sentence for each, all of them.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"{CONFIG} is {path}; cannot read it: {reason}.") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{CONFIG} is {path}; it is not YAML: {reason}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{CONFIG} is {path}; pass a file of lines like 'group-size: 8'.")

    by_key = {flag.name.removeprefix("--rmt-").removeprefix("--"): flag for flag in flags}
    del by_key["config"]
    problems, values = [], {}
    keys = [key.value for key, _ in node.value]
    problems += [
        f"{path}: {key} stands there twice; keep one." for key in sorted({*_repeated(keys)})
    ]
    for key, value in content.items():
        flag = by_key.get(key)
        if flag is None:
            problems.append(f"{path}: {key} is no setting of RMT; known are {', '.join(by_key)}.")
            continue
        expected, accepted = _typed(value, flag)
        if not expected:
            values[flag.attribute] = accepted
        else:
            problems.append(f"{path}: {key} is {value!r}; pass {expected}.")
    if problems:
        raise ValueError(" ".join(problems))
    return values


def _repeated(keys: Sequence[str]) -> list[str]:
    return [key for index, key in enumerate(keys) if key in keys[:index]]


def _typed(value: Any, flag: Setting) -> tuple[str, Any]:
    """("", the value as the parser would give it), or (what is expected, None)."""
    if flag.metavar:
        numbers = [_number(number) for number in value] if isinstance(value, list) else []
        if len(numbers) == len(flag.metavar) and None not in numbers:
            return "", numbers
        return f"a list of {len(flag.metavar)} numbers", None
    if flag.kind is bool:
        return ("", value) if isinstance(value, bool) else ("true or false", None)
    if flag.kind is int:
        right = isinstance(value, int) and not isinstance(value, bool)
        return ("", value) if right else ("a whole number", None)
    if flag.kind is float:
        return ("a number", None) if _number(value) is None else ("", _number(value))
    return ("", value) if isinstance(value, str) else ("text", None)


def _number(value: Any) -> float | None:
    # YAML takes 1e-6, which has no point, for text.
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None
