"""The settings as flags in Megatron's own parser, as a YAML file, and against their bounds."""

import argparse
import functools
import math
import os
import re
import typing
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import Field, fields
from typing import Any

import pytest
import yaml
from megatron.training.arguments import add_megatron_arguments

from megatron_rmt.algorithm.settings import Settings, argument_name
from megatron_rmt.job.settings import (
    FLAGS,
    GROUP_TITLE,
    add_rmt_arguments,
    flag_name,
    read_config,
    readable_help,
    setting_problems,
    stated_default,
    versions,
)
from megatron_rmt.model.tree_attention import BACKENDS

FIELDS = {field.name: field for field in fields(Settings)}
every_field = pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)


@functools.cache
def _parser() -> argparse.ArgumentParser:
    # A patched Megatron adds the flags itself.
    add = getattr(add_megatron_arguments, "megatron_rmt_original", add_megatron_arguments)
    return readable_help(add_rmt_arguments(add(argparse.ArgumentParser(allow_abbrev=False))))


def _small_parser() -> argparse.ArgumentParser:
    """One whose defaults a test may change."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--yaml-cfg")
    parser.add_argument("--lr", type=float)
    return add_rmt_arguments(parser)


def _takes(field: Field) -> dict[str, Any]:
    """Type, number and choices of a setting's values."""
    return FLAGS._extract_type(field.type)


def test_defaults_are_the_papers():
    args = _parser().parse_args(["--rmt"])
    assert Settings.of(args).trains_with_rl
    paper = {
        "rmt_group_size": 8,
        "rmt_temperature": 0.8,
        "rmt_initial_budget": 800,
        "rmt_minimum_budget": 1,
        "rmt_budget_decay": 0.2,
        "rmt_curriculum_start": 0.3,
        "rmt_curriculum_end": 0.7,
        "rmt_ntp_coefficient": 0.1,
        "rmt_entropy_thresholds": [0.5, 1.0, 1.5],
    }
    assert paper.items() <= vars(args).items()


def test_parsed_arguments_without_rmt_hold_the_defaults():
    assert Settings.of(_parser().parse_args([])) == Settings() == Settings.of(Namespace())


def _group() -> Any:
    groups = [group for group in _parser()._action_groups if group.title == GROUP_TITLE]
    assert len(groups) == 1
    return groups[0]


def test_help_shows_all_flags_in_one_group():
    names = [action.option_strings for action in _group()._group_actions]
    assert names == [[flag_name(name)] for name in FIELDS]
    assert {"--rmt", "--rmt-group-size"} <= {name for (name,) in names}
    _, _, section = _parser().format_help().partition(f"{GROUP_TITLE}:")
    for name in FIELDS:
        assert f"  {flag_name(name)}" in section


def test_adding_the_flags_twice_is_harmless():
    add_rmt_arguments(_parser())
    assert len(_group()._group_actions) == len(FIELDS)


def test_a_percent_sign_in_a_help_text_does_not_break_help():
    parser = argparse.ArgumentParser(prog="x")
    parser.add_argument("--plain", help="headroom (e.g. 1.10 = 10%).")
    parser.add_argument("--good", help="%(prog)s of 10 %%, default %(default)s", default=3)
    parser.add_argument("--hidden", help=argparse.SUPPRESS)
    text = readable_help(parser).format_help()
    assert "headroom (e.g. 1.10 = 10%)." in text
    assert "x of 10 %, default 3" in text
    assert "hidden" not in text


@every_field
def test_help_states_meaning_unit_default_and_source(field: Field):
    name = flag_name(field.name)
    (action,) = [a for a in _group()._group_actions if a.option_strings == [name]]
    meaning, _, ending = action.help.rpartition(" (default ")
    default, _, source = ending.removesuffix(").").partition("; ")
    assert len(meaning) > 10
    assert source in ("paper", "RPT", "ours", "ablation of the paper")
    held = _parser().get_default(argument_name(field.name))
    if field.type is bool:
        assert (default, held) == ("off", False)
    elif held is None:
        assert default == field.metadata["unset"] != ""
    else:
        words = default.split() if "nargs" in _takes(field) else [default]
        parsed = _parser().parse_args([name, *words])
        assert getattr(parsed, argument_name(field.name)) == held
    assert default == stated_default(field)
    unit = field.metadata["unit"]
    assert (unit != "") == (field.metadata["interval"] != "")
    assert meaning.endswith(f", in {unit}" if unit else "")


def test_the_attentions_are_those_of_the_model():
    assert typing.get_args(Settings.__annotations__["attention"]) == ("auto", *BACKENDS)


def _refused_by_the_parser(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        _parser().parse_args(["--rmt", *words])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.endswith("; --help says what it takes.\n")
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize(
    "name", [n for n, f in FIELDS.items() if _takes(f)["type"] in (int, float)]
)
def test_a_value_of_another_type_is_refused_in_one_line(name: str, capsys):
    takes, flag = _takes(FIELDS[name]), flag_name(name)
    message = _refused_by_the_parser([flag, *["much"] * takes.get("nargs", 1)], capsys)
    assert message.startswith(f"argument {flag}: invalid {takes['type'].__name__} value: 'much';")


@pytest.mark.parametrize("name", ["attention", "warmup_thought"])
def test_another_choice_is_refused_in_one_line(name: str, capsys):
    message = _refused_by_the_parser([flag_name(name), "dense"], capsys)
    assert message.startswith(f"argument {flag_name(name)}: invalid choice: 'dense' (choose from ")
    assert all(choice in message for choice in _takes(FIELDS[name])["choices"])


def test_a_file_that_is_not_named_is_refused_in_one_line(capsys):
    message = _refused_by_the_parser(["--rmt-config"], capsys)
    assert message.startswith("argument --rmt-config: expected one argument;")


def test_without_rmt_steps_are_megatrons():
    for words in ([], ["--rmt", "--rmt-no-rl"]):
        assert not Settings.of(_parser().parse_args(words)).trains_with_rl
    assert not Settings.of(Namespace()).trains_with_rl


def test_versions_say_what_computes():
    found = versions()
    assert found["megatron-core"].startswith("0.19.")
    assert {"megatron_rmt", "torch", "transformers"} <= found.keys()


Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path) -> Write:
    def write_file(text: str) -> str:
        path = tmp_path / "rmt.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file


def _other(field: Field) -> tuple[list[str], object]:
    """Another value than the default: as words behind the flag, and in the file."""
    takes = _takes(field)
    if takes.get("nargs") == "+":
        return ["x y", "z"], ["x y", "z"]
    if "nargs" in takes:
        return ["1", "2.5", "1e3"], [1, 2.5, "1e3"]
    if "choices" in takes:
        return [takes["choices"][-1]], takes["choices"][-1]
    values = {bool: ([], True), int: (["3"], 3), float: (["0.25"], 0.25), str: (["x y"], "x y")}
    return values[takes["type"]]


OTHER = {name: _other(field) for name, field in FIELDS.items() if name != "config"}


def _key(name: str) -> str:
    return name.replace("_", "-")


@pytest.mark.parametrize("name", OTHER)
def test_a_setting_in_the_file_equals_the_flag(write: Write, name: str):
    words, value = OTHER[name]
    parser, file = _small_parser(), write(yaml.dump({_key(name): value}))
    by_flag = parser.parse_args(["--lr", "1", flag_name(name), *words])
    assert vars(by_flag) != vars(parser.parse_args(["--lr", "1"]))
    by_file = parser.parse_args(["--lr", "1", "--rmt-config", file])
    by_file.rmt_config = None
    assert vars(by_file) == vars(by_flag)


def test_all_settings_at_once_equal_all_flags(write: Write):
    content = {_key(name): value for name, (_, value) in OTHER.items()}
    by_flags = _small_parser().parse_args(
        [w for name, (words, _) in OTHER.items() for w in (flag_name(name), *words)]
    )
    by_file = _small_parser().parse_args([f"--rmt-config={write(yaml.dump(content))}"])
    by_file.rmt_config = None
    assert vars(by_file) == vars(by_flags)


@pytest.mark.parametrize("before", [True, False], ids=["flag first", "file first"])
def test_the_command_line_wins(write: Write, before: bool):
    config = ["--rmt-config", write("group-size: 4\nbudget-decay: 5e-1\n")]
    flag = ["--rmt-group-size", "8"]
    args = _small_parser().parse_args([*flag, *config] if before else [*config, *flag])
    # 8 is also the default: it wins because it was given.
    assert (args.rmt_group_size, args.rmt_budget_decay) == (8, 0.5)


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1.0), ("1e-6", 1e-6), ("inf", math.inf), (".inf", math.inf)]
)
def test_numbers_may_be_written_as_for_a_flag(write: Write, text: str, value: float):
    read = read_config(write(f"logprob-tolerance: {text}"))["rmt_logprob_tolerance"]
    assert (read, type(read)) == (value, float)


def test_an_empty_file_changes_nothing(write: Write):
    args = _small_parser().parse_args(["--rmt-config", write("# nothing yet\n")])
    args.rmt_config = None
    assert vars(args) == vars(_small_parser().parse_args([]))


WRONG = {
    "group-siez: 4": "group-siez is no setting of RMT; known are rmt, positions-per-sample,",
    "group_size: 4": "group_size is no setting of RMT; known are rmt, positions-per-sample,",
    "group-size: many": "group-size is 'many'; pass a whole number.",
    "group-size: 4.0": "group-size is 4.0; pass a whole number.",
    "group-size: '4'": "group-size is '4'; pass a whole number.",
    "group-size: true": "group-size is True; pass a whole number.",
    "group-size: [4]": "group-size is [4]; pass a whole number.",
    "group-size:": "group-size is None; pass a whole number.",
    "temperature: hot": "temperature is 'hot'; pass a number.",
    "temperature: true": "temperature is True; pass a number.",
    "no-ntp: 1": "no-ntp is 1; pass true or false.",
    "template: 3": "template is 3; pass text.",
    "attention: dense": "attention is 'dense'; pass one of auto, sdpa, lse, flex.",
    "entropy-thresholds: [1, 2]": "entropy-thresholds is [1, 2]; pass a list of 3 numbers.",
    "entropy-thresholds: 1 2 3": "entropy-thresholds is '1 2 3'; pass a list of 3 numbers.",
    "entropy-thresholds: [1, 2, x]": "entropy-thresholds is [1, 2, 'x']; pass a list of 3 numbers.",
    "skip-sources: [3]": "skip-sources is [3]; pass a list of texts.",
    "skip-sources: []": "skip-sources is []; pass a list of texts.",
    "config: other.yaml": "config is no setting of RMT",
    "group-size: 4\ngroup-size: 8": "found duplicate key group-size in",
    "- group-size": "; pass UTF-8 lines like 'group-size: 8', each key once.",
    "3": "; pass UTF-8 lines like 'group-size: 8', each key once.",
    "group-size: [": "; cannot read it: while parsing a flow node",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_file_ends_the_program_with_one_sentence(write: Write, capsys, text: str):
    path = write(text)
    with pytest.raises(SystemExit) as end:
        _small_parser().parse_args(["--rmt", "--rmt-config", path])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert path in message
    assert WRONG[text] in message
    assert message.count("\n") == 1


def test_all_that_is_wrong_with_a_file_is_said_at_once(write: Write):
    lines = {text.split(":")[0]: text for text in WRONG if re.fullmatch(r"[a-z-]+: [^\[\n]*", text)}
    assert len(lines) >= 8
    with pytest.raises(ValueError, match="group-siez") as error:
        read_config(write("\n".join(lines.values())))
    said = str(error.value)
    stray = [key for key in lines if f"{key} is no setting" in WRONG[lines[key]]]
    assert len(stray) >= 2
    assert f"{', '.join(stray)} are no settings of RMT; known are rmt, " in said
    for key in lines.keys() - stray:
        assert f" {key} is " in said


def test_a_file_that_cannot_be_read_is_named(capsys, tmp_path):
    with pytest.raises(SystemExit):
        _small_parser().parse_args(["--rmt-config", "nowhere/rmt.yaml"])
    expected = "--rmt-config is nowhere/rmt.yaml; cannot read it: No such file or directory; pass "
    assert capsys.readouterr().err.startswith(expected)
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match=r"pipe.yaml; cannot read it: it is a pipe or a device"):
        read_config(str(pipe))
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("template: é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.yaml; cannot read it: 'utf-8' codec .*pass UTF-8"):
        read_config(str(latin))


def test_a_file_that_repeats_itself_without_end_is_refused_at_once(write: Write):
    """Thirty lines stand for 9**30 values."""
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x]"]
    for number in range(30):
        again = ", ".join([f"*a{number}"] * 9)
        lines.append(f"b{number}: &a{number + 1} [{again}]")
    with pytest.raises(ValueError, match=r"cannot read it: it repeats a part of itself \(\*\);"):
        read_config(write("\n".join(lines)))


def test_megatrons_own_yaml_would_forget_rmt(write: Write, capsys):
    own = ["--yaml-cfg", "megatron.yaml"]
    for words in (["--rmt"], ["--rmt-config", write("group-size: 4")]):
        with pytest.raises(SystemExit):
            _small_parser().parse_args([*own, *words])
        assert "--yaml-cfg is given; RMT's flags do not work with it" in capsys.readouterr().err
    assert _small_parser().parse_args(own).yaml_cfg == "megatron.yaml"


BOUNDED = [field for field in FIELDS.values() if field.metadata["interval"]]


def _at_the_ends(field: Field) -> Iterator[tuple[float, bool]]:
    """(value, whether it passes): both ends of a setting's interval and the next value each way."""
    interval, whole = field.metadata["interval"], _takes(field)["type"] is int
    low, high = (float(number) for number in interval[1:-1].split(", "))
    for end, outwards, closed in ((low, -1, interval[0] == "["), (high, 1, interval[-1] == "]")):
        if whole and math.isfinite(end):
            yield from (
                (int(end), closed),
                (int(end) + outwards, False),
                (int(end) - outwards, True),
            )
        elif not whole:
            yield end, closed
            yield math.nextafter(end, -outwards * math.inf), True
            if math.isfinite(end):
                yield math.nextafter(end, outwards * math.inf), False


@pytest.mark.parametrize("field", BOUNDED, ids=lambda field: field.name)
def test_each_setting_passes_inside_its_interval_and_nowhere_else(field: Field):
    cases = [*_at_the_ends(field), (math.nan, False)]
    assert [passes for _, passes in cases].count(True) >= 1
    for number, passes in cases:
        value = [*(field.default or (0.2, 0.4))[:2], number] if "nargs" in _takes(field) else number
        args = Namespace(train_iters=10, **{argument_name(field.name): value})
        refusals = [s for s in setting_problems(args) if f"in {field.metadata['interval']}" in s]
        assert len(refusals) == (not passes), number
        for sentence in refusals:
            assert re.match(
                f"{flag_name(field.name)} is .*{re.escape(str(number))}; pass ", sentence
            )


def test_every_number_but_the_seed_has_an_interval():
    numbers = {name for name, field in FIELDS.items() if _takes(field)["type"] in (int, float)}
    assert {field.name for field in BOUNDED} == numbers - {"seed"}


def test_defaults_are_within_their_bounds():
    assert [*setting_problems(Namespace(train_iters=10, seq_length=128))] == []
