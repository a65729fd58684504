"""Going on from a checkpoint: which one, whether it can be loaded, and under the same settings."""

import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from examples import post_train
from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.job.checkpoints import save_problem
from megatron_rmt.job.data_files import marks_of_data
from megatron_rmt.job.resume import (
    MAY_CHANGE,
    TRACKER,
    behind_doors,
    changed_data,
    changed_doors,
    changed_settings,
    check_same_settings,
    checkpoint_folder,
    checkpoint_problems,
    rendering,
    stored_arguments,
)
from tests.tiny_run import PRETRAIN, RMT, TinyInputs, run

pytestmark = pytest.mark.faults

PROMPT = SimpleNamespace(
    preamble=[1, 2],
    stem=lambda budget: [3, budget],
    close=[4],
    stop=[0],
    bytes_of=[b"", b"a", b"b", b"c", b"d"],
    template=SimpleNamespace(answer="next"),
    rendering=lambda: {"head": "It is 1 May 2025. Think", "stem": "{budget}", "close": "</think>"},
)


def _args(load: Path | str | None = None, **changes: Any) -> Namespace:
    values = {
        "load": load and str(load),
        "pretrained_checkpoint": None,
        "non_persistent_ckpt_type": None,
        "non_persistent_global_ckpt_dir": None,
        "exit_on_missing_checkpoint": False,
        "ckpt_step": None,
        "finetune": False,
        "rank": 0,
        "rmt": True,
        "train_iters": 6,
        "seed": 7,
    }
    return Namespace(**values | changes)


def _saved(folder: Path, tracker: str | bytes | None, *iterations: int) -> Path:
    for iteration in iterations:
        (folder / f"iter_{iteration:07d}").mkdir(parents=True)
        whole = folder / f"iter_{iteration:07d}/metadata.json"
        whole.write_text('{"sharded_backend": "torch_dist"}')
    if tracker is not None:
        content = tracker.encode() if isinstance(tracker, str) else tracker
        (folder / TRACKER).write_bytes(content)
    return folder


@pytest.mark.parametrize("tracker", ["4", "4\n", " 0004 "])
def test_what_the_tracker_names_is_loaded(tracker: str, tmp_path: Path):
    load = _saved(tmp_path, tracker, 2, 4)
    assert checkpoint_folder(load, None) == load / "iter_0000004"
    assert checkpoint_folder(load, 2) == load / "iter_0000002"
    assert [*checkpoint_problems(_args(load))] == []
    assert [*checkpoint_problems(_args(load, ckpt_step=2))] == []


def test_nothing_saved_yet_is_a_first_start_unless_a_checkpoint_is_asked_for(tmp_path: Path):
    # A first save that was cut off leaves a folder and no tracker.
    load = _saved(tmp_path, None, 2)
    for place in (load, tmp_path / "nowhere", "msc://bucket/run", None):
        assert [*checkpoint_problems(_args(place))] == []
        assert stored_arguments(_args(place)) is None
    assert checkpoint_folder(load, None) is None
    (problem,) = checkpoint_problems(_args(load, exit_on_missing_checkpoint=True))
    assert problem == (
        f"--load is {load} and --exit-on-missing-checkpoint is set, but there is no {TRACKER} in "
        "it; pass the folder of a checkpoint."
    )
    # Elsewhere there is one to begin with, or may be.
    whole = str(_saved(tmp_path / "whole", "4", 4))
    for named in ({"pretrained_checkpoint": whole}, {"non_persistent_ckpt_type": "local"}):
        args = _args(load, exit_on_missing_checkpoint=True, **named)
        assert [*checkpoint_problems(args)] == []


def test_what_a_run_that_begins_with_weights_alone_was_trained_with_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stored = Namespace(seed=3)
    monkeypatch.setattr(
        "megatron.core.dist_checkpointing.load_common_state_dict", lambda _: {"args": stored}
    )
    load = _saved(tmp_path, "4", 4)
    assert stored_arguments(_args(load)) is stored
    assert stored_arguments(_args(load, finetune=True)) is None
    assert stored_arguments(_args("msc://bucket/run")) is None


@pytest.mark.parametrize(
    ("tracker", "said"),
    [
        ("", "holds '' instead of an iteration"),
        ("\n", "holds '' instead of an iteration"),
        ("garbage", "holds 'garbage' instead of an iteration"),
        ("4.0", "holds '4.0' instead of an iteration"),
        ("-1", "holds '-1' instead of an iteration"),
        ("4 5", "holds '4 5' instead of an iteration"),
        ("\u0664", "instead of an iteration"),
        ("9" * 5000, "instead of an iteration"),
        (b"\xff\xfe4", "cannot be read (it is no text)"),
        (b"\x00" * 8, "instead of an iteration"),
    ],
)
@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
def test_a_tracker_that_names_no_iteration_is_refused(
    flag: str, tracker: str | bytes, said: str, tmp_path: Path
):
    load = _saved(tmp_path, tracker, 2, 4)
    named = {flag[2:].replace("-", "_"): str(load)}
    (problem,) = checkpoint_problems(_args(**named))
    assert problem.startswith(f"{flag} is {load}, but {load / TRACKER} ")
    assert said in problem
    assert problem.endswith(
        f"; write the number of a whole checkpoint into {TRACKER} (saved: iter_0000002, "
        "iter_0000004), or leave the flag out to begin anew."
    )
    assert "\n" not in problem
    assert stored_arguments(_args(load)) is None


def test_the_tracker_of_checkpoints_that_are_not_kept_is_read_too(tmp_path: Path):
    load = _saved(tmp_path, "2", 2)
    args = _args(load, non_persistent_ckpt_type="global")
    assert [*checkpoint_problems(args)] == []
    often = _saved(tmp_path / "non_persistent", "", 3)
    (problem,) = checkpoint_problems(args)
    flag = "--non-persistent-global-ckpt-dir"
    assert problem.startswith(f"{flag} is {often}, but {often / TRACKER} holds ''")
    (often / TRACKER).write_text("3")
    args.ckpt_step = 2
    assert [*checkpoint_problems(args)] == []
    args.non_persistent_global_ckpt_dir = str(tmp_path / "elsewhere")
    assert [*checkpoint_problems(args)] == []


@pytest.mark.parametrize(
    ("make", "reason"),
    [(os.mkdir, "Is a directory"), (os.mkfifo, "it is a pipe or a device, not a file")],
)
def test_a_tracker_that_is_no_file_is_refused(
    make: Callable[[Path], None], reason: str, tmp_path: Path
):
    make(tmp_path / TRACKER)
    (problem,) = checkpoint_problems(_args(tmp_path))
    assert f"cannot be read ({reason}); leave the flag out to begin anew, as nothing is" in problem


def test_a_deleted_or_empty_iteration_is_refused(tmp_path: Path):
    load = _saved(tmp_path, "6", 2, 4)
    (load / "iter_0000005").touch()
    (problem,) = checkpoint_problems(_args(load))
    assert problem.startswith(
        f"--load is {load}, but there is no iter_0000006 in it, which {TRACKER} says to load; write"
    )
    (load / "iter_0000006").mkdir()
    assert len([*checkpoint_problems(_args(load))]) == 1
    (problem,) = checkpoint_problems(_args(load, ckpt_step=3))
    assert "there is no iter_0000003 in it, which --ckpt-step 3 says to load;" in problem
    (load / TRACKER).write_text("release")
    (problem,) = checkpoint_problems(_args(load))
    assert f"there is no release in it, which {TRACKER} says to load;" in problem


@pytest.mark.parametrize("content", ["", "{", "[1]", "7", "null", "\xff", "[" * 5000, "{}"])
def test_a_checkpoint_whose_last_file_is_damaged_is_refused(content: str, tmp_path: Path):
    load = _saved(tmp_path, "4", 2, 4)
    (load / "iter_0000004/metadata.json").write_text(content, encoding="latin-1")
    (problem,) = checkpoint_problems(_args(load))
    assert problem == (
        f"--load is {load}, but iter_0000004 in it, which {TRACKER} says to load, is no whole "
        "checkpoint (metadata.json is damaged); write the number of a whole checkpoint into "
        f"{TRACKER} (saved: iter_0000002), or leave the flag out to begin anew."
    )
    assert [*checkpoint_problems(_args(load, ckpt_step=2))] == []


def test_a_checkpoint_that_is_half_there_is_refused(tmp_path: Path):
    load = _saved(tmp_path, "4", 2, 4)
    (load / "iter_0000004/metadata.json").rename(load / "iter_0000004/__0_0.distcp")
    (problem,) = checkpoint_problems(_args(load))
    assert "(there is no metadata.json, which is written last); write the number" in problem
    # Of Megatron's older format nothing is known.
    (load / "iter_0000004/mp_rank_00").mkdir()
    assert [*checkpoint_problems(_args(load))] == []


def test_a_folder_that_cannot_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert save_problem(None) is None
    assert save_problem("msc://bucket/run") is None
    assert os.listdir(tmp_path) == []
    assert save_problem(str(tmp_path / "new/run")) is None
    assert os.listdir(tmp_path / "new/run") == []
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file/run", Path("/proc/run"), Path("/dev/full/x")):
        problem = save_problem(str(place))
        assert problem.startswith(f"--save is {place}, which cannot be written to (")
        assert problem.endswith("pass a folder with room that this user may write to.")


def test_a_full_disk_is_found_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Full:
        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: Any) -> None:
            if self.written:  # when what was written is flushed
                raise OSError(28, "No space left on device")

        def write(self, content: bytes) -> None:
            self.written = content

        written = b""

    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: Full())
    assert "(No space left on device); pass a folder with room" in save_problem(str(tmp_path))


def test_the_same_settings_are_gone_on_with():
    stored = _args(rmt_prompt_rendering=rendering(PROMPT), rmt_entropy_thresholds=[0.5, 1.0, 1.5])
    assert changed_settings(_args(), rendering(PROMPT), stored) == []
    check_same_settings(_args(), PROMPT, stored)
    # Spelt out or by its default.
    assert changed_settings(_args(rmt_seed=7), rendering(PROMPT), stored) == []


# Another value of each setting that decides what a step computes, and how it is typed.
CHANGES = {
    "train_iters": 12,
    "seed": 9,
    "rmt_temperature": 1.3,
    "rmt_no_curriculum": True,
    "rmt_budget_decay": 0.9,
    "rmt_group_size": 2,
    "rmt_initial_budget": 40,
    "rmt_entropy_thresholds": [0.1, 1.0, 1.5],
    "rmt_reward": "mine:reward",
    "rmt_top_k": 20,
    "rmt_warmup_iters": 3,
    "rmt_answer_tokens": 1,
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_changed_setting_is_named_with_both_values(name: str):
    value = CHANGES[name]
    changed = changed_settings(_args(**{name: value}), rendering(PROMPT), _args())
    flag, field = "--" + name.replace("_", "-"), name.removeprefix("rmt_")
    default = {"train_iters": 6, "seed": 7}.get(name, getattr(Settings(), field, None))
    typed = ["left out" if v is None else v for v in (value, default)]
    typed = [" ".join(map(str, v)) if isinstance(v, list | tuple) else v for v in typed]
    assert f"{flag} is {typed[0]} and was {typed[1]}" in changed
    assert len(changed) == 1 + (name == "seed")


def test_every_setting_is_either_compared_or_said_to_be_free():
    known = {field.name for field in fields(Settings)}
    assert known > MAY_CHANGE
    other = {bool: True, int: 77, float: 0.25, str: "other"}
    for field in fields(Settings):
        if field.name in {"rmt", "no_rl"}:
            continue
        value = (0.25,) * 3 if isinstance(field.default, tuple) else None
        for kind, example in other.items():
            if value is None and (field.type is kind or field.type == kind | None):
                value = example
        value = "text" if value is None else value
        changed = changed_settings(_args(**{f"rmt_{field.name}": value}), {}, _args())
        assert bool(changed) == (field.name not in MAY_CHANGE), field.name


def test_the_rendered_prompt_is_compared_instead_of_its_name():
    stored = _args(rmt_prompt_rendering=rendering(PROMPT), rmt_template="a/b.json")
    # The same template in another place.
    moved = _args(rmt_template="c/b.json", rmt_no_chat=True)
    assert changed_settings(moved, rendering(PROMPT), stored) == []
    tomorrow = rendering(PROMPT) | {"head": "It is 2 May 2025. Think", "tokens": "0" * 16}
    digest = rendering(PROMPT)["tokens"]
    assert changed_settings(_args(), tomorrow, stored) == [
        "the prompt's head has 'It is 2 May 2025. Think' at character 0 and had 'It is 1 May 2025. "
        "Think'",
    ]
    other_tokens = rendering(PROMPT) | {"tokens": "0" * 16}
    assert changed_settings(_args(), other_tokens, stored) == [
        f"the tokenizer gives other tokens ({'0' * 16} is the digest of vocabulary and prompt, and "
        f"was {digest})",
    ]
    # A checkpoint of a run that did not store it.
    assert changed_settings(moved, tomorrow, _args()) == [
        "--rmt-template is c/b.json and was rpt",
        "--rmt-no-chat is True and was False",
    ]


def test_another_vocabulary_gives_another_digest():
    other = SimpleNamespace(**vars(PROMPT) | {"bytes_of": [b"", b"a", b"b", b"c", b"e"]})
    assert rendering(other)["tokens"] != rendering(PROMPT)["tokens"]
    assert rendering(other) | {"tokens": ""} == rendering(PROMPT) | {"tokens": ""}


def test_changed_settings_are_refused_or_named_once(capsys: pytest.CaptureFixture[str]):
    stored, args = _args(), _args("run", train_iters=12, rmt_group_size=4)
    differ = (
        "--load run was trained with other settings: --train-iters is 12 and was 6; "
        "--rmt-group-size is 4 and was 8"
    )
    with pytest.raises(ValueError, match=r"^--load run was") as error:
        check_same_settings(args, PROMPT, stored)
    assert str(error.value) == (
        f"{differ}; pass what they were, or --rmt-allow-changed-settings to go on with these."
    )
    for rank in (0, 1):
        args.rmt_allow_changed_settings, args.rank = True, rank
        check_same_settings(args, PROMPT, stored)
    assert capsys.readouterr().err == f"RMT: {differ}; going on with these.\n"


def test_another_corpus_is_named_and_a_moved_one_is_the_same(tmp_path: Path):
    for name in ("here/a", "here/b", "there/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.idx").write_bytes(b"index of " + name[-1:].encode())
        (tmp_path / f"{name}.bin").write_bytes(b"tokens" * 30_000 + name[-1:].encode())
    here, other, there = (str(tmp_path / name) for name in ("here/a", "here/b", "there/a"))
    stored = _args(data_path=["0.5", here])
    stored.rmt_data = marks_of_data(stored)
    assert changed_data(_args(data_path=["0.7", here]), stored) == []
    assert changed_data(_args(data_path=[there]), stored) == []
    assert changed_data(_args(data_path=[other]), _args()) == [], "an older version saved none"
    (said,) = changed_data(_args(data_path=[other]), stored)
    assert said == f"the data flags name {other} and named {here}"
    (said,) = changed_data(_args(), stored)
    assert said == f"the data flags name no token files and named {here}"
    for file, content in ((f"{here}.idx", b"index of b"), (f"{here}.bin", b"tokens" * 30_000)):
        kept = Path(file).read_bytes()
        Path(file).write_bytes(content)
        (said,) = changed_data(_args(data_path=[here]), stored)
        assert said == f"{here}.bin and .idx hold another corpus than they did"
        # Of two the one that was replaced.
        both = _args(data_path=["1", other, "1", here])
        both.rmt_data = {other: marks_of_data(both)[other], here: "as it was"}
        assert changed_data(both, both) == [said]
        with pytest.raises(ValueError, match="hold another corpus than they did; pass what they"):
            check_same_settings(_args(data_path=[here]), PROMPT, stored)
        Path(file).write_bytes(kept)
    assert changed_data(_args(data_path=[here]), stored) == []


def test_what_a_function_of_the_user_depends_on_is_compared_by_name(
    monkeypatch: pytest.MonkeyPatch,
):
    asks, args = "examples.post_train:answers", _args("run", rmt_select="tiers")
    assert behind_doors(Settings.of(args)) == {}
    args = _args("run", rmt_select=asks)
    now = behind_doors(Settings.of(args))
    assert now == {"MARKER": post_train.MARKER.decode()}
    stored = _args(rmt_select=asks, rmt_doors=now)
    check_same_settings(args, PROMPT, stored)
    assert changed_doors(args, _args(rmt_select=asks)) == [], "an older version saved none"
    monkeypatch.setattr(post_train.answers, "depends_on", {"MARKER": "Answer: ", "OTHER": "new"})
    with pytest.raises(ValueError, match="with other settings: MARKER is 'Answer: ' and was '####"):
        check_same_settings(args, PROMPT, stored)
    args.rmt_allow_changed_settings = True
    check_same_settings(args, PROMPT, stored)


def test_a_checkpoint_of_something_else_is_a_first_start():
    args = _args(train_iters=12)
    for stored in (
        None,
        Namespace(train_iters=6, seed=1),
        _args(rmt=False),
        _args(rmt_no_rl=True),
    ):
        check_same_settings(args, PROMPT, stored)


@pytest.mark.multiprocess
def test_a_run_is_resumed_under_its_own_settings_only(inputs: TinyInputs, tmp_path: Path):
    saved = tmp_path / "saved"
    flags = ["--save", str(saved), "--save-interval", "1", "--exit-interval", "1"]
    run(tmp_path / "first", 1, [*inputs.flags(), *RMT, *flags])
    stored = stored_arguments(_args(saved))
    assert stored.rmt_prompt_rendering["close"] == "</think>"
    assert stored.rmt_data == marks_of_data(_args(data_path=[str(inputs.data)]))
    assert stored.rmt_doors == {}
    assert stored_arguments(_args(saved, finetune=True)) is None

    resumed = inputs.flags(resume_from=saved)
    changed = [*resumed, *RMT, "--rmt-temperature", "1.3", "--exit-interval", "2"]
    said = f"--load {saved} was trained with other settings: --rmt-temperature is 1.3 and was 0.8; "
    with pytest.raises(AssertionError) as error:
        run(tmp_path / "refused", 1, changed)
    assert f"{said}pass what they were, or --rmt-allow-changed-settings" in str(error.value)
    allowed = run(tmp_path / "allowed", 1, [*changed, "--rmt-allow-changed-settings"], PRETRAIN)
    assert [line["iteration"] for line in allowed.metrics] == [2]
    assert allowed.log.count(f"RMT: {said}going on with these.") == 1

    (saved / TRACKER).write_text("")
    with pytest.raises(AssertionError, match="holds '' instead of an iteration"):
        run(tmp_path / "empty", 1, [*resumed, *RMT])
