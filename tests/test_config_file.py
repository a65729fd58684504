"""``--rmt-config``: a file of settings that counts like flags."""

import argparse
import re
from pathlib import Path

import pytest
import yaml

from megatron_rmt.job.config_file import read_config
from megatron_rmt.job.settings import FLAGS, add_rmt_arguments, rmt_settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--yaml-cfg")
    parser.add_argument("--lr", type=float)
    return add_rmt_arguments(parser)


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str) -> str:
        path = tmp_path / "rmt.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file


# Another value than the default for each flag: as a flag and in the file.
OTHER: dict[str, tuple[list[str], object]] = {
    flag.name: {
        bool: ([], True),
        int: (["3"], 3),
        float: (["0.25"], 0.25),
        str: (["x y"], "x y"),
    }[flag.kind]
    if not flag.metavar
    else (["1", "2.5", "1e3"], [1, 2.5, "1e3"])
    for flag in FLAGS
    if flag.name != "--rmt-config"
}


@pytest.mark.parametrize("name", OTHER)
def test_a_setting_in_the_file_equals_the_flag(write, name: str):
    words, value = OTHER[name]
    key = name.removeprefix("--rmt-").removeprefix("--")
    by_flag = _parser().parse_args(["--lr", "1", name, *words])
    by_file = _parser().parse_args(["--lr", "1", "--rmt-config", write(yaml.dump({key: value}))])
    by_file.rmt_config = None
    assert vars(by_file) == vars(by_flag)
    assert vars(by_file) != vars(_parser().parse_args(["--lr", "1"]))


def test_all_settings_at_once_equal_all_flags(write):
    content = {
        name.removeprefix("--rmt-").removeprefix("--"): value for name, (_, value) in OTHER.items()
    }
    by_flags = _parser().parse_args(
        [w for name, (words, _) in OTHER.items() for w in (name, *words)]
    )
    by_file = _parser().parse_args([f"--rmt-config={write(yaml.dump(content))}"])
    by_file.rmt_config = None
    assert rmt_settings(by_file) == rmt_settings(by_flags)


@pytest.mark.parametrize("before", [True, False], ids=["flag first", "file first"])
def test_the_command_line_wins(write, before: bool):
    config = ["--rmt-config", write("group-size: 4\nbudget-decay: 5e-1\n")]
    flag = ["--rmt-group-size", "8"]
    args = _parser().parse_args([*flag, *config] if before else [*config, *flag])
    # 8 is also the default: it wins because it was given.
    assert (args.rmt_group_size, args.rmt_budget_decay) == (8, 0.5)


def test_an_empty_file_changes_nothing(write):
    args = _parser().parse_args(["--rmt-config", write("# nothing yet\n")])
    args.rmt_config = None
    assert vars(args) == vars(_parser().parse_args([]))


WRONG = {
    "group-siez: 4": "group-siez is no setting of RMT; known are rmt, positions-per-sample,",
    "group-size: many": "group-size is 'many'; pass a whole number.",
    "group-size: 4.0": "group-size is 4.0; pass a whole number.",
    "group-size: true": "group-size is True; pass a whole number.",
    "temperature: hot": "temperature is 'hot'; pass a number.",
    "no-ntp: 1": "no-ntp is 1; pass true or false.",
    "template: 3": "template is 3; pass text.",
    "entropy-thresholds: [1, 2]": "entropy-thresholds is [1, 2]; pass a list of 3 numbers.",
    "entropy-thresholds: 1 2 3": "entropy-thresholds is '1 2 3'; pass a list of 3 numbers.",
    "config: other.yaml": "config is no setting of RMT",
    "group-size: 4\ngroup-size: 8": "group-size stands there twice; keep one.",
    "- group-size": "pass a file of lines like 'group-size: 8'.",
    "group-size: [": "it is not YAML: while parsing",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_file_ends_the_program_with_one_sentence(write, capsys, text: str):
    path = write(text)
    with pytest.raises(SystemExit) as end:
        _parser().parse_args(["--rmt", "--rmt-config", path])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert path in message
    assert WRONG[text] in message
    assert message.count("\n") == 1


def test_all_that_is_wrong_with_a_file_is_said_at_once(write):
    text = "\n".join(text for text in WRONG if re.fullmatch(r"[a-z-]+: [^\[\n]*", text))
    text = text.replace("group-size: 4.0\ngroup-size: true\n", "")
    with pytest.raises(ValueError, match="group-siez") as error:
        read_config(Path(write(text)), FLAGS)
    for key in ("group-siez", "group-size", "temperature", "no-ntp", "template", "config"):
        assert f" {key} is " in str(error.value)


def test_a_missing_file_is_named(capsys):
    with pytest.raises(SystemExit):
        _parser().parse_args(["--rmt-config", "nowhere/rmt.yaml"])
    expected = "--rmt-config is nowhere/rmt.yaml; cannot read it: No such file or directory.\n"
    assert capsys.readouterr().err == expected


def test_megatrons_own_yaml_would_forget_rmt(capsys):
    with pytest.raises(SystemExit):
        _parser().parse_args(["--rmt", "--yaml-cfg", "megatron.yaml"])
    assert "--yaml-cfg is given; RMT's flags do not work with it" in capsys.readouterr().err
    assert _parser().parse_args(["--yaml-cfg", "megatron.yaml"]).yaml_cfg == "megatron.yaml"
