"""Pickles of a checkpoint: data as they are, stand-ins for the rest, and nothing runs."""

import argparse
import collections
import io
import os
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem

from tests.tiny_checkpoints import TOOLS

sys.path.insert(0, str(TOOLS))

from conversion import inert_pickles

pytestmark = pytest.mark.faults

ABSENT = """
import enum
class Mode(enum.Enum):
    SLOW = "slow"
class Settings(dict):
    pass
class Names(list):
    pass
"""


class _RunsCode:
    """Unpickling it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def saved(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def plain(value: Any) -> io.BytesIO:
    return io.BytesIO(pickle.dumps(value))


FORMS = {"torch.save": (saved, inert_pickles.load_saved), "pickle": (plain, inert_pickles.load)}


@pytest.fixture
def absent() -> Iterator[types.ModuleType]:
    """A module that is there when something is pickled, and gone when it is read."""
    module = types.ModuleType("company_settings")
    exec(ABSENT, vars(module))
    sys.modules[module.__name__] = module
    yield module
    sys.modules.pop(module.__name__, None)


@pytest.mark.parametrize("form", FORMS)
def test_classes_that_are_not_at_hand_are_stood_in_for(absent: types.ModuleType, form: str):
    write, read = FORMS[form]
    arguments = argparse.Namespace(rotary_base=7, mode=absent.Mode.SLOW, path=Path("/a"))
    arguments.settings, arguments.names = absent.Settings(a=1), absent.Names([1, 2])
    file = write({"args": arguments, "iteration": 3})
    del sys.modules[absent.__name__]
    found = read(file)
    assert found["iteration"] == 3
    assert vars(found["args"]).keys() == vars(arguments).keys()
    assert found["args"].rotary_base == 7
    assert repr(found["args"].mode) == "company_settings.Mode('slow')"
    assert getattr(found["args"], "absent", None) is None
    assert absent.__name__ not in sys.modules


@pytest.mark.parametrize("form", FORMS)
def test_code_in_a_pickle_is_not_run(tmp_path: Path, form: str):
    write, read = FORMS[form]
    found = read(write([_RunsCode(tmp_path / "ran"), 5]))
    assert found[1] == 5
    assert not (tmp_path / "ran").exists()


def test_code_that_a_known_function_would_run_is_not_run(tmp_path: Path):
    """torch.storage._load_from_bytes unpickles without restriction."""

    class Nested:
        def __reduce__(self) -> tuple[Any, ...]:
            inner = saved(_RunsCode(tmp_path / "ran")).getvalue()
            return (torch.storage._load_from_bytes, (inner,))

    inert_pickles.load_saved(saved([Nested()]))
    assert not (tmp_path / "ran").exists()


def test_data_are_read_as_they_were():
    value = {
        "tensor": torch.arange(6.0).view(2, 3).T,
        "rounded": torch.tensor([1.5], dtype=torch.bfloat16),
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "set": {1, 2},
        "ordered": collections.OrderedDict(b=1, a=2),
        "nothing": [None, True, 1.5, "é", (1, 2)],
    }
    found = inert_pickles.load_saved(saved(value))
    for name in ("tensor", "rounded"):
        assert torch.equal(found.pop(name), value.pop(name))
    assert found == value
    assert list(found["ordered"]) == ["b", "a"]


def test_a_damaged_pickle_does_not_take_all_memory():
    """Object number 2**31 - 1: room for 32 GiB of numbers before it."""
    spoiled = b"\x80\x02]r\xff\xff\xff\x7f."
    with pytest.raises(MemoryError):
        inert_pickles.load(io.BytesIO(spoiled))
    assert inert_pickles.load(plain([1])) == [1]


def test_torchs_own_readers_run_nothing_while_asked_to(tmp_path: Path, absent: types.ModuleType):
    state = {
        "object": [absent.Mode.SLOW, _RunsCode(tmp_path / "ran")],
        "tensor": torch.arange(4.0),
    }
    dcp.save(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    torch.save(state, tmp_path / "saved.pt")
    del sys.modules[absent.__name__]
    before = filesystem.pickle, torch.load
    with inert_pickles.pickles_run_nothing():
        read = {"object": None, "tensor": torch.zeros(4)}
        dcp.load(read, checkpoint_id=tmp_path / "saved", no_dist=True)
        again = torch.load(tmp_path / "saved.pt", map_location="cpu")
        weights = torch.load(saved({"a": torch.ones(2)}), weights_only=True)
    assert (filesystem.pickle, torch.load) == before
    for found in (read, again):
        assert repr(found["object"][0]) == "company_settings.Mode('slow')"
        assert torch.equal(found["tensor"], torch.arange(4.0))
    assert torch.equal(weights["a"], torch.ones(2))
    assert not (tmp_path / "ran").exists()
