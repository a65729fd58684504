"""``docs/hyperparameters.md`` names every flag, with the default that holds."""

import re
import shlex
from dataclasses import Field, fields

import pytest

from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.job.settings import flag_name, stated_default
from tests.distributed import REPOSITORY

PAGE = (REPOSITORY / "docs/hyperparameters.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `(--rmt[a-z-]*)` \| ([^|]*?) \|", PAGE, re.MULTILINE))


def test_the_page_lists_exactly_the_flags():
    flags = [flag_name(field.name) for field in fields(Settings)]
    assert sorted(ROWS) == sorted(flags)
    named = set(re.findall(r"--rmt[a-z-]*[a-z]", PAGE))
    assert named <= set(flags)


@pytest.mark.parametrize("field", fields(Settings), ids=lambda field: field.name)
def test_the_page_states_the_default(field: Field):
    assert ROWS[flag_name(field.name)].strip("`") == stated_default(field)


def test_the_recipe_has_the_papers_values():
    recipe = (REPOSITORY / "examples/pretrain_rmt.args").read_text(encoding="utf-8")
    words = shlex.split(recipe, comments=True)
    rows = re.findall(r"^\| (`--[^|]*) \| ([^|]*) \| `examples", PAGE, re.MULTILINE)
    assert len(rows) == 6
    for flags, values in rows:
        names = re.findall(r"`(--[a-z0-9-]+)`", flags)
        for name, value in zip(names, re.findall(r"[\d.e-]*\d", values), strict=False):
            assert float(words[words.index(name) + 1]) == float(value), name
