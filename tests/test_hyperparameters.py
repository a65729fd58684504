"""``docs/hyperparameters.md`` names every flag, with the default that holds."""

import re
import shlex

import pytest

from megatron_rmt.job.settings import FLAGS, Flag
from tests.distributed import REPOSITORY

PAGE = (REPOSITORY / "docs/hyperparameters.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `(--rmt[a-z-]*)` \| ([^|]*?) \|", PAGE, re.MULTILINE))


def test_the_page_lists_exactly_the_flags():
    assert sorted(ROWS) == sorted(flag.name for flag in FLAGS)
    named = set(re.findall(r"--rmt[a-z-]*[a-z]", PAGE))
    assert named <= {flag.name for flag in FLAGS}


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_the_page_states_the_default(flag: Flag):
    assert ROWS[flag.name].strip("`") == flag.stated_default


def test_the_recipe_has_the_papers_values():
    recipe = (REPOSITORY / "examples/pretrain_rmt.args").read_text(encoding="utf-8")
    words = shlex.split(recipe, comments=True)
    rows = re.findall(r"^\| (`--[^|]*) \| ([^|]*) \| `examples", PAGE, re.MULTILINE)
    assert len(rows) == 6
    for flags, values in rows:
        names = re.findall(r"`(--[a-z0-9-]+)`", flags)
        for name, value in zip(names, re.findall(r"[\d.e-]*\d", values), strict=False):
            assert float(words[words.index(name) + 1]) == float(value), name
