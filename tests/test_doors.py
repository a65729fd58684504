"""Functions in the place of ours, by name or by path; what cannot be called is refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rmt.algorithm.curriculum import SELECTIONS
from megatron_rmt.algorithm.doors import depends_on, find, values_of
from megatron_rmt.algorithm.rewards import REWARDS

MODULE = """
def mine(evidence):
    return "mine"

def with_a_default(evidence, scale=2.0):
    return "with a default"

def of_anything(*anything):
    return "of anything"

class Judge:
    def __call__(self, evidence):
        return "a judge"

judge = Judge()

def of_nothing():
    pass

def of_two(evidence, scale):
    pass

def of_a_keyword(evidence, *, scale):
    pass

number = 3
"""


def ours(evidence: Any) -> str:
    return "ours"


def other(evidence: Any) -> str:
    return "the other"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a user's module."""
    (tmp_path / "door_of_a_user.py").write_text(MODULE)
    (tmp_path / "door_that_fails.py").write_text("1 / 0\n")
    (tmp_path / "door_that_exits.py").write_text("import sys\n\nsys.exit(0)\n")
    (tmp_path / "door_that_says_much.py").write_text("raise ValueError('a\\nb')\n")
    (tmp_path / "door_that_is_no_python.py").write_text("def (:\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "door_of_a_user"


def _find(name: str) -> Callable[..., Any]:
    return find("--rmt-reward", name, {"match": ours, "other": other})


def _refusal(name: str) -> str:
    """One sentence with flag and value."""
    with pytest.raises(ValueError, match=f"^--rmt-reward is {re.escape(name)}[,;] ") as refused:
        _find(name)
    message = str(refused.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def test_a_known_name_is_the_known_function():
    assert _find("match") is ours
    assert _find("other") is other
    assert find("--rmt-reward", "match", REWARDS) is REWARDS["match"]
    assert find("--rmt-select", "tiers", SELECTIONS) is SELECTIONS["tiers"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mine", "mine"),
        ("with_a_default", "with a default"),
        ("of_anything", "of anything"),
        ("judge", "a judge"),
    ],
)
def test_an_importable_path_is_what_it_names(module, name, says):
    assert _find(f"{module}:{name}")(None) == says


def test_a_function_says_what_it_depends_on_and_stays_what_it_is():
    marked = depends_on(SCALE="2")(other)
    assert (marked, values_of(marked), values_of(ours)) == (other, {"SCALE": "2"}, {})


@pytest.mark.parametrize("name", ["mtach", "door_of_a_user", "door_of_a_user.mine", ":mine", "a:"])
@pytest.mark.usefixtures("module")
def test_what_is_neither_a_name_nor_a_path_is_told_both(name):
    assert _refusal(name).endswith("; pass match, other, or your own as module:function.")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no_such_door:mine", "ModuleNotFoundError: No module named 'no_such_door'"),
        ("door_that_fails:mine", "ZeroDivisionError: division by zero"),
        ("door_that_is_no_python:mine", "SyntaxError: "),
        ("door_that_exits:mine", "SystemExit: 0"),
        ("door_that_says_much:mine", "ValueError: a b"),
        (
            "door_of_a_user:none",
            "AttributeError: module 'door_of_a_user' has no attribute 'none'",
        ),
        (
            "door_of_a_user:Judge.judge",
            "AttributeError: module 'door_of_a_user' has no attribute 'Judge.judge'",
        ),
    ],
)
@pytest.mark.usefixtures("module")
def test_what_cannot_be_imported_is_refused_with_the_reason(path, reason):
    message = _refusal(path)
    assert f"which cannot be imported ({reason}" in message
    assert message.endswith("); pass a module on PYTHONPATH and a function in it.")


@pytest.mark.parametrize("name", ["of_nothing", "of_two", "of_a_keyword", "number"])
def test_what_cannot_be_called_like_ours_is_refused_with_our_signature(module, name):
    message = _refusal(f"{module}:{name}")
    assert "which cannot be called as ours(evidence: Any) -> str is; give it these" in message
