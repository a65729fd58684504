"""The ``--rmt-*`` flags in Megatron's own parser."""

import argparse
import functools
from argparse import Namespace
from typing import Any

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_rmt.job.settings import (
    FLAGS,
    GROUP_TITLE,
    Flag,
    add_rmt_arguments,
    is_enabled,
    readable_help,
    rmt_settings,
    versions,
)


@functools.cache
def _parser() -> argparse.ArgumentParser:
    # A patched Megatron adds the flags itself.
    add = getattr(add_megatron_arguments, "megatron_rmt_original", add_megatron_arguments)
    return readable_help(add_rmt_arguments(add(argparse.ArgumentParser(allow_abbrev=False))))


def test_defaults_are_the_papers():
    args = _parser().parse_args(["--rmt"])
    assert is_enabled(args)
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
    assert paper.items() <= rmt_settings(args).items()


def _group() -> Any:
    groups = [group for group in _parser()._action_groups if group.title == GROUP_TITLE]
    assert len(groups) == 1
    return groups[0]


def test_help_shows_all_flags_in_one_group():
    names = [action.option_strings for action in _group()._group_actions]
    assert names == [[flag.name] for flag in FLAGS]
    _, _, section = _parser().format_help().partition(f"{GROUP_TITLE}:")
    for flag in FLAGS:
        assert f"  {flag.name}" in section


def test_adding_the_flags_twice_is_harmless():
    add_rmt_arguments(_parser())
    assert len(_group()._group_actions) == len(FLAGS)


def test_a_percent_sign_in_a_help_text_does_not_break_help():
    parser = argparse.ArgumentParser(prog="x")
    parser.add_argument("--plain", help="headroom (e.g. 1.10 = 10%).")
    parser.add_argument("--good", help="%(prog)s of 10 %%, default %(default)s", default=3)
    parser.add_argument("--hidden", help=argparse.SUPPRESS)
    text = readable_help(parser).format_help()
    assert "headroom (e.g. 1.10 = 10%)." in text
    assert "x of 10 %, default 3" in text
    assert "hidden" not in text


UNITLESS = {
    "--rmt-attention",
    "--rmt-config",
    "--rmt-metrics-file",
    "--rmt-seed",
    "--rmt-template",
    "--rmt-warmup-thought",
}


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_help_states_unit_default_and_source(flag: Flag):
    (action,) = [a for a in _group()._group_actions if a.option_strings == [flag.name]]
    assert action.help == flag.help
    _, _, ending = flag.help.rpartition(" (default ")
    default, _, source = ending.rstrip(").").partition("; ")
    assert source in ("paper", "RPT", "ours", "ablation of the paper")
    held = _parser().get_default(flag.attribute)
    if flag.kind is bool:
        assert (default, held) == ("off", False)
    elif held is None:
        assert default == flag.unset != ""
    else:
        words = default.split() if flag.metavar else [default]
        parsed = _parser().parse_args([flag.name, *words])
        assert getattr(parsed, flag.attribute) == held
    needs_unit = flag.kind is not bool and flag.name not in UNITLESS
    assert (f", in {flag.unit} (default" in flag.help and flag.unit != "") == needs_unit


@pytest.mark.parametrize(
    "flag", [flag for flag in FLAGS if flag.kind in (int, float)], ids=lambda flag: flag.name
)
def test_a_value_of_another_type_is_refused_in_one_line(flag: Flag, capsys):
    with pytest.raises(SystemExit) as end:
        _parser().parse_args(["--rmt", flag.name, *["much"] * max(len(flag.metavar), 1)])
    assert end.value.code == 2
    expected = f"argument {flag.name}: invalid {flag.kind.__name__} value: 'much'; --help says"
    assert capsys.readouterr().err.startswith(expected)


def test_without_rmt_steps_are_megatrons():
    assert not is_enabled(_parser().parse_args([]))
    assert not is_enabled(_parser().parse_args(["--rmt", "--rmt-no-rl"]))
    assert not is_enabled(Namespace())


def test_versions_say_what_computes():
    found = versions()
    assert found["megatron-core"].startswith("0.19.")
    assert {"megatron_rmt", "torch", "transformers"} <= found.keys()
