"""What another release changed is found by its sources, and the page of symbols is complete."""

import re
import sys
from pathlib import Path

import pytest

from tests.distributed import REPOSITORY
from tests.tiny_checkpoints import TOOLS

sys.path.insert(0, str(TOOLS))

import compare_megatron
from compare_megatron import INSTALLED, Touched, difference, parameters, touched_symbols

PAGE = (REPOSITORY / "docs/releases.md").read_text(encoding="utf-8")

OLD = {
    "__init__.py": "from .steps import train_step, Model as Net\n",
    "steps.py": (
        "def train_step(forward, data, *, seed=1):\n"
        "    'What it does.'\n"
        "    return forward(data)\n"
        "class Model:\n"
        "    def __init__(self, width): ...\n"
        "    def forward(self, tokens, mask=None):\n"
        "        return tokens\n"
        "LIMIT = 3\n"
    ),
}


def _tree(root: Path, **changes: str) -> Path:
    folder = root / "megatron/training"
    folder.mkdir(parents=True)
    (root / "megatron/__init__.py").touch()
    for name, text in OLD.items():
        for before, now in changes.items():
            text = text.replace(before, now)
        (folder / name).write_text(text)
    return root


def _difference(tmp_path: Path, symbol: Touched, changes: dict[str, str]) -> str | None:
    base, other = _tree(tmp_path / "base"), _tree(tmp_path / "other", **changes)
    return difference(symbol, other, base)


STEP = Touched("megatron.training", "train_step", "replaced", ("forward", "data"))
FORWARD = Touched("megatron.training", "Net.forward", "relied on", ("tokens",))


@pytest.mark.parametrize(
    ("symbol", "changes", "expected"),
    [
        (STEP, {}, None),
        (STEP, {"What it does": "Another text"}, None),
        (STEP, {"LIMIT = 3": "LIMIT = 4"}, None),
        (STEP, {"forward(data)": "forward(data, 1)"}, "code"),
        (STEP, {", seed=1": ", seed=1, group"}, "parameters: +group"),
        (STEP, {"seed": "key"}, "parameters: +key, -seed"),
        (STEP, {"data": "iterator"}, "gone: parameter data"),
        (STEP, {"def train_step": "def step"}, "gone"),
        (FORWARD, {"return tokens": "return mask"}, "code"),
        (FORWARD, {"forward(self": "run(self"}, "gone"),
        (FORWARD, {"class Model": "class Other"}, "gone"),
        (Touched("megatron.training.steps", "LIMIT", "used"), {"LIMIT = 3": "LIMIT = 4"}, "code"),
        (Touched("megatron.training", "Net", "used"), {"width": "size"}, "parameters: +size, -wid"),
        (Touched("megatron.nowhere", "x", "used"), {}, None),
    ],
)
def test_a_change_is_told_by_kind(
    tmp_path: Path, symbol: Touched, changes: dict[str, str], expected: str | None
):
    found = _difference(tmp_path, symbol, changes)
    assert found == expected or found.startswith(f"{expected}")


def test_every_symbol_is_found_in_the_release_that_is_installed():
    symbols = touched_symbols()
    assert {"replaced", "relied on", "used"} == {one.kind for one in symbols}
    for one in symbols:
        assert difference(one, INSTALLED) is None
        node = compare_megatron.definition(INSTALLED, one.module, one.name)
        assert node is not None, one
        assert set(one.needed) <= set(parameters(node)), one


def test_the_page_lists_every_symbol_and_no_other():
    listed = dict(re.findall(r"^\| `(megatron\.\S+)` \| (.+) \|$", PAGE, re.MULTILINE))
    assert listed == {str(one): one.kind for one in touched_symbols()}


def test_a_checkout_is_compared_and_what_is_gone_ends_with_1(tmp_path: Path, capsys, monkeypatch):
    base = _tree(tmp_path / "base")
    other = _tree(tmp_path / "other", **{"seed": "key", "class Model": "class Other"})
    for root in (base, other):
        (root / "megatron/core").mkdir()
        (root / "megatron/core/__init__.py").touch()
    monkeypatch.setattr(compare_megatron, "touched_symbols", lambda: [STEP, FORWARD])
    capsys.readouterr()
    own = compare_megatron.difference
    monkeypatch.setattr(
        compare_megatron, "difference", lambda symbol, checkout: own(symbol, checkout, base)
    )
    with pytest.raises(SystemExit) as end:
        compare_megatron.main([str(other)])
    assert end.value.code == 1
    assert capsys.readouterr().out.splitlines() == [
        "megatron.training.train_step: parameters: +key, -seed",
        "megatron.training.Net.forward: gone",
        "2 symbols: 0 the same, 1 gone",
    ]
    with pytest.raises(SystemExit) as end:
        compare_megatron.main([str(base)])
    assert end.value.code == 0
    with pytest.raises(SystemExit) as end:
        compare_megatron.main([str(tmp_path)])
    assert end.value.code == 2
