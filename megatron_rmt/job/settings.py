"""From ``Settings`` to a run: the ``--rmt-*`` flags, the YAML file of them, the bounds they keep.

``--rmt-config`` names a YAML file whose settings count as if they had been given as flags:

    group-size: 4            # --rmt-group-size 4
    force-close: true        # --rmt-force-close
    entropy-thresholds: [0.5, 1.0, 1.5]

The file is read while the command line is parsed, as defaults of the flags: whatever the command
line holds wins. A switch that the file turns on cannot be turned off there.
"""

import contextlib
import functools
import importlib.metadata
import io
import typing
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from megatron.training.argument_utils import ArgumentGroupFactory
from omegaconf import OmegaConf

from megatron_rmt.algorithm.curriculum import SELECTIONS, has_reserve
from megatron_rmt.algorithm.settings import Settings, argument_name
from megatron_rmt.job.text_files import read_text_file

GROUP_TITLE = "reinforcement mid-training (RMT)"
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def flag_name(name: str) -> str:
    """The flag of the setting ``name``."""
    return "--" + argument_name(name).replace("_", "-")


def as_typed(value: Any) -> str:
    """A value as one would type it behind its flag."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def stated_default(field: Field[Any]) -> str:
    """The default as one would type it, or what its absence means."""
    if field.type is bool:
        return "off"
    return field.metadata["unset"] if field.default is None else as_typed(field.default)


class FlagFactory(ArgumentGroupFactory):
    """Megatron's maker of flags, with our names, with tuples, and with a fuller help.

    The help is a setting's docstring, then its unit, default and source.
    """

    def _format_arg_name(self, config_attr_name: str, prefix: str | None = None) -> str:
        return flag_name(config_attr_name)

    def _extract_type(self, config_type: Any) -> dict[str, Any]:
        if typing.get_origin(config_type) is not tuple:
            return super()._extract_type(config_type)
        kinds = typing.get_args(config_type)
        return {"type": kinds[0], "nargs": "+" if kinds[-1] is ... else len(kinds)}

    def _build_argparse_kwargs_from_field(self, attribute: Field[Any]) -> dict[str, Any]:
        keywords = super()._build_argparse_kwargs_from_field(attribute)
        keywords["dest"] = argument_name(attribute.name)
        if isinstance(attribute.default, tuple):
            keywords["default"] = list(attribute.default)  # what nargs makes of words
        unit = f", in {attribute.metadata['unit']}" if attribute.metadata["unit"] else ""
        default, source = stated_default(attribute), attribute.metadata["source"]
        keywords["help"] += f"{unit} (default {default}; {source})."
        return keywords


FLAGS = FlagFactory(Settings)


def add_rmt_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the ``--rmt-*`` group to Megatron's parser. Harmless when called twice."""
    if all(group.title != GROUP_TITLE for group in parser._action_groups):
        FLAGS.build_group(parser, GROUP_TITLE)
        _read_config_when_parsing(parser)
        _shorten_errors(parser)
    return parser


def _shorten_errors(parser: ArgumentParser) -> None:
    """For RMT's flags leave out the usage, which for Megatron's parser is hundreds of lines."""
    show = parser.error

    def error(message: str) -> NoReturn:
        if message.startswith("argument --rmt"):
            parser.exit(2, f"{message}; --help says what it takes.\n")
        show(message)

    parser.error = error


def _read_config_when_parsing(parser: ArgumentParser) -> None:
    """Let ``parser`` take defaults from the file that the command line names, if it names one.

    A file that cannot be used ends the program with exit code 2 and one line on stderr.
    """
    parse = parser.parse_known_args
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--rmt-config", nargs="?")  # `parser` refuses it without a value

    @functools.wraps(parse)
    def parse_known_args(
        args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> tuple[Namespace, list[str]]:
        path = finder.parse_known_args(args)[0].rmt_config
        if path is not None:
            try:
                parser.set_defaults(**read_config(path))
            except ValueError as error:
                parser.exit(2, f"{error}\n")
        parsed, rest = parse(args, namespace)
        if getattr(parsed, "yaml_cfg", None) and (parsed.rmt or parsed.rmt_config):
            # Megatron then takes all its arguments from that file, and would forget these.
            parser.exit(2, "--yaml-cfg is given; RMT's flags do not work with it, pass flags.\n")
        return parsed, rest

    parser.parse_known_args = parse_known_args


def read_config(path: str) -> dict[str, Any]:
    """The settings of a YAML file, by attribute of the parsed arguments.

    Keys are the flags without ``--rmt-``; ``rmt: true`` is ``--rmt``.

    Raises:
        ValueError: the file cannot be read, is not YAML or holds a key twice; or, one sentence for
            each and all of them: a key is unknown, a value has the wrong type.
    """
    remedy = "pass UTF-8 lines like 'group-size: 8', each key once"
    try:
        text = read_text_file(Path(path))
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            # A few lines of them can stand for more values than there is memory.
            raise ValueError("it repeats a part of itself (*)")
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except Exception as error:
        # YAML's constructors raise whatever Python's conversions of a value raise.
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        reason = reason or type(error).__name__
        raise ValueError(f"--rmt-config is {path}; cannot read it: {reason}; {remedy}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"--rmt-config is {path}; {remedy}.")

    by_key = {one.name.replace("_", "-"): one for one in fields(Settings) if one.name != "config"}
    problems, values = [], {}
    stray = [str(key) for key in content if key not in by_key]
    if stray:
        are = "is no setting" if len(stray) == 1 else "are no settings"
        known = ", ".join(by_key)
        problems.append(f"{path}: {', '.join(stray)} {are} of RMT; known are {known}.")
    for key, value in content.items():
        if key not in by_key:
            continue
        try:
            values[argument_name(by_key[key].name)] = _typed(value, by_key[key])
        except ValueError as expected:
            problems.append(f"{path}: {key} is {value!r}; pass {expected}.")
    if problems:
        raise ValueError(" ".join(problems))
    return values


def _typed(value: Any, field: Field[Any]) -> Any:
    """``value``, of a YAML file, as the parser would give it.

    Stricter than OmegaConf's typed merge, for which 1 is true and 3 a text.

    Raises:
        ValueError: it is something else than the field holds; says what to pass.
    """
    takes = FLAGS._extract_type(field.type)
    kind, number, choices = takes["type"], takes.get("nargs"), takes.get("choices")
    parts = value if number and isinstance(value, list) else [value]
    # A number may be text: YAML's own word for infinity is .inf, everybody else's inf.
    from_types = (int, float, str) if kind is float else (kind,)
    wanted = max(1, len(parts)) if number == "+" else number or 1
    if len(parts) == wanted and all(type(part) in from_types for part in parts):
        with contextlib.suppress(ValueError):
            typed = [kind(part) for part in parts]
            if number or choices is None or value in choices:
                return typed if number else typed[0]
    if number:
        raise ValueError("a list of texts" if number == "+" else f"a list of {number} numbers")
    raise ValueError(f"one of {', '.join(choices)}" if choices else _EXPECTED[kind])


def setting_problems(args: Namespace) -> Iterator[str]:
    """One sentence with flag, value and remedy for each setting outside its interval, and for each
    that does not go with another."""
    settings = Settings.of(args)
    for field in fields(Settings):
        value, interval = getattr(settings, field.name), field.metadata["interval"]
        parts = value if isinstance(value, tuple) else (value,)
        if not interval or value is None or all(lies_in(part, interval) for part in parts):
            continue
        remedy = f"pass {'numbers' if len(parts) > 1 else 'a number'} in {interval}"
        if field.default is None:
            remedy += f", or leave it out ({field.metadata['unset']})"
        if field.metadata["because"]:
            remedy += f": {field.metadata['because']}"
        yield f"{flag_name(field.name)} is {as_typed(value)}; {remedy}."

    at_most = {
        "minimum_budget": "--rmt-initial-budget",
        "curriculum_start": "--rmt-curriculum-end",
        "warmup_iters": "--train-iters",
        "positions_per_sample": "--seq-length",
    }
    for name, limit in at_most.items():
        value, most = getattr(settings, name), getattr(args, limit[2:].replace("-", "_"), None)
        if most is not None and value > most:
            yield f"{flag_name(name)} is {value}; pass at most {limit} ({most})."
    for name in ("start_probabilities", "end_probabilities"):
        shares = getattr(settings, name)
        if abs(sum(shares) - 1) >= 1e-6:
            yield f"{flag_name(name)} is {as_typed(shares)}; pass three numbers whose sum is 1."
    easy, medium, hard = settings.entropy_thresholds
    if easy >= medium or medium >= hard:
        yield (
            f"--rmt-entropy-thresholds is {as_typed(settings.entropy_thresholds)}; pass three "
            "ascending numbers."
        )
    quantiles, ceiling = settings.threshold_quantiles, settings.entropy_ceiling
    if quantiles is not None and quantiles != tuple(sorted(set(quantiles))):
        yield (f"--rmt-threshold-quantiles is {as_typed(quantiles)}; pass three ascending numbers.")
    if quantiles is not None and settings.entropy_thresholds != Settings.entropy_thresholds:
        yield (
            f"--rmt-threshold-quantiles is {as_typed(quantiles)} and --rmt-entropy-thresholds is "
            f"{as_typed(settings.entropy_thresholds)}; pass one of them."
        )
    if quantiles is None and ceiling is not None and ceiling <= easy:
        yield (
            f"--rmt-entropy-ceiling is {ceiling:g}; pass more than the first of "
            f"--rmt-entropy-thresholds ({easy:g}), else no position is ever chosen."
        )
    if args.train_iters is None and not args.train_samples:
        yield "--train-iters is not set; RMT's schedules need it, or --train-samples."
    if settings.reward == "match" and settings.target_tokens > settings.answer_tokens:
        yield (
            f"--rmt-target-tokens is {settings.target_tokens}; pass at most --rmt-answer-tokens "
            f"({settings.answer_tokens}), in which an answer has to say them."
        )
    if settings.baseline_decay is not None and settings.reward == "match":
        yield (
            f"--rmt-baseline-decay is {settings.baseline_decay}, which --rmt-reward match does not "
            "use; pass --rmt-reward information-gain, or leave it out."
        )
    reserve, select = settings.reserve_positions, settings.select
    if reserve is not None and select in SELECTIONS and not has_reserve(SELECTIONS[select]):
        yield (
            f"--rmt-reserve-positions is {reserve}, which --rmt-select {select} does not use; pass "
            "--rmt-select gain-variance, or leave it out."
        )
    if settings.metrics_file and Path(settings.metrics_file).is_dir():
        yield f"--rmt-metrics-file is {settings.metrics_file}, a folder; pass a file in it."


def lies_in(value: float, interval: str) -> bool:
    """Whether ``value`` lies in an interval as written in mathematics; NaN lies in none."""
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def readable_help(parser: ArgumentParser) -> ArgumentParser:
    """Let ``--help`` work: Megatron 0.19.2 has a plain % in a help text, and argparse raises."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        try:
            formatter._expand_help(action)
        except (KeyError, TypeError, ValueError):
            action.help = (action.help or "").replace("%", "%%")
    return parser


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes; those that are absent left out."""
    found = {}
    for name in ("megatron_rmt", "megatron-core", "torch", "transformers", "transformer-engine"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
