"""Patching the real Megatron, and refusing one that is not what the patches were written for."""

import argparse
import functools
import importlib
import importlib.metadata
import pickle
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.api import CheckpointException

import megatron_rmt
from megatron_rmt.job import patches, resume
from megatron_rmt.job.not_taken import Progress
from megatron_rmt.job.processes import save_worker
from megatron_rmt.job.settings import GROUP_TITLE


def _current() -> dict[tuple[str, str], Callable[..., Any]]:
    return {(entry.module, entry.name): entry.find()[1] for entry in patches.PATCHES}


@pytest.fixture(autouse=True)
def unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron as it was before anyone patched it, and as it was found afterwards."""
    for entry in patches.PATCHES:
        owner, symbol = entry.find()
        original = getattr(symbol, "megatron_rmt_original", symbol)
        monkeypatch.setattr(owner, entry.attribute, original)


def test_patching_wraps_each_symbol_and_keeps_what_it_is():
    before = _current()
    megatron_rmt.patch()
    for key, symbol in _current().items():
        assert symbol is not before[key]
        assert symbol.megatron_rmt_original == before[key]
        assert symbol.__name__ == key[1].split(".")[-1]
        assert symbol.__doc__ == before[key].__doc__


def test_patching_twice_wraps_once():
    megatron_rmt.patch()
    first = _current()
    megatron_rmt.patch()
    assert _current() == first


def test_megatrons_parser_then_knows_the_flags():
    from megatron.training import arguments

    megatron_rmt.patch()
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    assert [group.title for group in parser._action_groups].count(GROUP_TITLE) == 1
    assert parser.parse_args(["--rmt", "--rmt-group-size", "4"]).rmt_group_size == 4


def test_the_wheels_compiled_helper_is_not_compiled_again():
    from megatron.core.datasets import utils

    importlib.import_module("megatron.core.datasets.helpers_cpp")
    megatron_rmt.patch()
    # The original runs make, which fails in a wheel: it would raise SystemExit.
    utils.compile_helpers()


def _refuse_with_a_text(args: argparse.Namespace) -> None:
    raise AssertionError("--rmt goes with nothing")


def _refuse_without_one(args: argparse.Namespace) -> None:
    raise AssertionError


def _refuse_in_lines(args: argparse.Namespace) -> None:
    raise ValueError("Cannot specify\n  both")


def _fail(args: argparse.Namespace) -> None:
    len(None)


def test_what_megatron_refuses_is_one_sentence():
    text = "Megatron refuses these flags: "
    for refuse, said in (
        (_refuse_with_a_text, "--rmt goes with nothing"),
        (_refuse_without_one, "raise AssertionError"),
        (_refuse_in_lines, "Cannot specify both"),
        (_fail, "TypeError: object of type 'NoneType' has no len() (in: len(None))"),
    ):
        with pytest.raises(SystemExit) as error:
            patches._validate_args(refuse, argparse.Namespace(rmt=True))
        assert str(error.value) == text + said
        with pytest.raises((AssertionError, ValueError, TypeError)):
            patches._validate_args(refuse, argparse.Namespace(rmt=False))


def test_what_the_models_configuration_refuses_is_one_sentence(monkeypatch):
    def refuse(args: argparse.Namespace) -> None:
        args.padded = True
        raise ValueError("Expert bias\n wants a sigmoid")

    monkeypatch.setattr("megatron.training.arguments.core_transformer_config_from_args", refuse)
    args = argparse.Namespace()
    with pytest.raises(SystemExit) as error:
        patches._check_configuration(args)
    assert str(error.value) == "Megatron refuses these flags: Expert bias wants a sigmoid"
    assert vars(args) == {}


def _nothing_is_patched() -> bool:
    return not any(hasattr(symbol, "megatron_rmt_original") for symbol in _current().values())


@pytest.mark.parametrize("version", ["0.18.3", "0.20.0", "0.20.0rc1", "1.19.0"])
def test_another_version_is_refused(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    message = (
        f"megatron_rmt.patch() supports megatron-core >=0.19,<0.20 but found {version}; "
        "install a supported release."
    )
    with pytest.raises(RuntimeError) as error:
        megatron_rmt.patch()
    assert str(error.value) == message
    assert _nothing_is_patched()


@pytest.mark.parametrize("version", ["0.19.0", "0.19.9", "0.19.0rc2", "0.19.2+local"])
def test_releases_of_the_supported_range_are_accepted(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    megatron_rmt.patch()


def test_unpatching_puts_everything_back():
    before = _current()
    megatron_rmt.unpatch()
    assert _current() == before
    megatron_rmt.patch()
    assert all(symbol is not before[key] for key, symbol in _current().items())
    megatron_rmt.unpatch()
    assert _current() == before
    megatron_rmt.patch()
    assert all(symbol is not before[key] for key, symbol in _current().items())


def test_unpatching_leaves_somebody_elses_wrapper_alone(monkeypatch):
    from megatron.training import training

    megatron_rmt.patch()
    monkeypatch.setattr(
        training, "train_step", functools.wraps(training.train_step)(lambda *args: None)
    )
    ours = _current()
    with pytest.raises(RuntimeError, match=r"found megatron.training.training.train_step wrapped"):
        megatron_rmt.unpatch()
    assert _current() == ours


def test_a_symbol_that_is_only_called_is_checked_too(monkeypatch):
    from megatron.core.models.gpt.gpt_model import GPTModel

    monkeypatch.setattr(GPTModel, "forward", lambda self, input_ids: None)
    with pytest.raises(RuntimeError, match=r"GPTModel.forward with parameters .*output_processor"):
        megatron_rmt.patch()
    assert _nothing_is_patched()


def test_the_save_worker_of_megatron_is_replaced_only_while_it_is_started(monkeypatch):
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    monkeypatch.setattr(PersistentAsyncCaller, "_persistent_process", None)
    loop, started = PersistentAsyncCaller.async_loop, []

    class Context:
        JoinableQueue = Queue = list

        class Process:
            def __init__(self, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
                started.append(target)
                assert pickle.loads(pickle.dumps(target)) is target

            def start(self) -> None:
                pass

    monkeypatch.setattr("torch.multiprocessing.get_context", lambda mode: Context)
    megatron_rmt.patch()
    PersistentAsyncCaller._get_process(0)
    assert started == [save_worker]
    assert PersistentAsyncCaller.async_loop is loop


@pytest.mark.parametrize("entry", patches.PATCHES, ids=lambda entry: entry.name)
def test_a_missing_symbol_is_named_and_nothing_is_patched(monkeypatch, entry):
    owner, _ = entry.find()
    with monkeypatch.context() as context:
        context.delattr(owner, entry.attribute)
        with pytest.raises(RuntimeError) as error:
            megatron_rmt.patch()
    version = importlib.metadata.version("megatron-core")
    expected = f"expected {entry.module}.{entry.name} but megatron-core {version} has no such"
    assert expected in str(error.value)
    assert _nothing_is_patched()


@pytest.mark.parametrize(
    "entry", [entry for entry in patches.PATCHES if entry.parameters], ids=lambda entry: entry.name
)
def test_another_signature_is_named_and_nothing_is_patched(monkeypatch, entry):
    with monkeypatch.context() as context:
        context.setattr(entry.find()[0], entry.attribute, lambda options, state: None)
        with pytest.raises(RuntimeError) as error:
            megatron_rmt.patch()
    assert f"expected {entry.module}.{entry.name} with parameters" in str(error.value)
    assert ", ".join(entry.parameters.split()) in str(error.value)
    assert "has options, state;" in str(error.value)
    assert "\n" not in str(error.value)
    assert _nothing_is_patched()


def test_a_missing_module_is_named_and_nothing_is_patched(monkeypatch):
    gone = patches.Symbol("megatron.training.no_such_module", "step")
    monkeypatch.setattr(patches, "PATCHES", (*patches.PATCHES, gone))
    with pytest.raises(RuntimeError, match=r"expected megatron.training.no_such_module.step but"):
        megatron_rmt.patch()
    monkeypatch.undo()


def test_settings_that_could_not_be_read_early_are_compared_when_megatron_loads(monkeypatch):
    args = argparse.Namespace(load="run", rmt=True, train_iters=12, seed=7, rank=0)
    stored = argparse.Namespace(rmt=True, train_iters=6, seed=7)
    early: list[Any] = [None]
    monkeypatch.setattr("megatron.training.get_args", lambda: args)
    monkeypatch.setattr("megatron.training.get_tokenizer", lambda: None)
    monkeypatch.setattr(patches, "read_prompt", lambda settings, tokenizer: None)
    monkeypatch.setattr(patches, "stored_arguments", lambda given: early[0])
    monkeypatch.setattr(resume, "rendering", lambda prompt: {})
    seen = []

    def load() -> None:
        patches._check_checkpoint_args(lambda given, **named: seen.append(given), stored)

    with pytest.raises(SystemExit, match=r"^--load run was trained .* 12 and was 6; pass what"):
        load()
    early[0] = stored
    load()
    early[0], args.rmt = None, False
    load()
    assert seen == [stored] * 3


@pytest.mark.faults
@pytest.mark.usefixtures("single_process_megatron")
def test_a_save_that_is_kept_is_held_and_one_that_fails_ends_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = Namespace(rmt=True, save=str(tmp_path))
    monkeypatch.setattr("megatron.training.get_args", lambda: options)
    monkeypatch.setattr(patches, "refuse_what_is_not_finite", lambda *_: None)
    monkeypatch.setattr(patches, "PROGRESS", Progress())
    full = OSError(28, "No space left on device")

    def save(iteration: int, model: Any, optimizer: Any, non_persistent_ckpt: bool = False) -> None:
        if iteration == 9:
            raise full

    patches._save_checkpoint(save, 3, None, None, non_persistent_ckpt=True)
    assert patches.PROGRESS.held is None
    patches._save_checkpoint(save, 4, None, None)
    assert patches.PROGRESS.held == 4
    sentence = (
        r"RMT: the checkpoint .* is not written \(rank 0: .*No space left on device; .* MB are"
    )
    with pytest.raises(SystemExit, match=sentence):
        patches._save_checkpoint(save, 9, None, None)
    assert patches.PROGRESS.held == 4


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("Missing key in checkpoint state_dict: a._extra_state/shard_0_1.", "log_all, which goes"),
        ("Missing key in checkpoint state_dict: a.weight.", "copy it again"),
    ],
)
def test_a_checkpoint_that_is_not_loaded_says_what_to_do(reason: str, remedy: str):
    def load(
        load_dir: str, args: Namespace, rank0: bool, state: Any, iteration: int, release: bool
    ) -> None:
        raise CheckpointException("load", {0: (RuntimeError(reason), None)})

    with pytest.raises(SystemExit, match=f"is not loaded: {re.escape(reason)}; .*{remedy}"):
        patches._load_global_dist_base_checkpoint(load, "folder", Namespace(), False, {}, 1, True)
