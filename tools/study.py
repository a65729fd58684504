"""Compare ways of training: each arm of a study, for each seed, trained and evaluated.

    python tools/study.py examples/studies/sums.yaml --output runs/sums
    python tools/study.py examples/studies/sums.yaml --output runs/sums --seeds 1 2 --arms RMT
    python tools/study.py examples/studies/sums.yaml --output runs/sums --tables

A study is a YAML file:

    model: runs/smollm2              # written by convert_checkpoint.py; where arms begin
    seeds: [1, 2, 3]
    reference: next token            # the arm that the others are compared with
    prepare:                         # commands, once for each seed
      - python tools/generate_computed_corpus.py --output {folder}/corpus --seed {seed}
    data: "{folder}/tokens/train"    # DATA of examples/pretrain_rmt.sh
    heldout: {sums: "{folder}/corpus/heldout.jsonl"}
    train: --seq-length 256          # flags of all arms
    reason: --rmt-force-close        # flags of the prompt, for arms with rollouts and evaluate.py
    positions: --documents 40        # flags of evaluate.py for the first arm
    evaluate: --budget 16            # flags of evaluate.py for all
    arms:
      pretrained: {flags: --rmt-no-rl --train-iters 80}
      RMT: {from: pretrained, flags: --train-iters 40, reason: true}
      next token: {from: pretrained, flags: --rmt-no-rl, time_of: RMT, step_time_of: pretrained}
    post_train:                      # GRPO on questions and answers, by examples/post_train.sh
      after: [next token, RMT]       # begins with each of these, and compares with the first
      prepare: [...]                 # of the questions, after the study's own
      data: "{folder}/questions/tokens/train"
      marker: "Answer: "             # MARKER and DATA of that script
      heldout: {questions: "{folder}/questions/heldout.jsonl"}
      flags: --train-iters 20        # all of its flags but those of the prompt
      positions: --positions answers

``{seed}`` and ``{folder}``, that of the seed, are put in everywhere. An arm begins with the model,
or with the weights of the arm in ``from``. ``time_of`` gives it as many steps as fit into the time
of another arm, by the time of a step of a third. ``examples/pretrain_rmt.sh`` trains each arm, with
the study's flags and then its own; a flag given twice counts where it stands last. Each is then
evaluated on each held-out file, at the positions of the first arm. ``post_train`` adds an arm "RMT,
post-trained" for each that it names; both are evaluated on its questions, whose other flags are the
study's unless it has ``reason`` or ``evaluate`` of its own.

A study that was stopped goes on where it was when started again: a stage that was completed by the
same command after the same stages is reused. The tables of what there is go to stdout and to
``study.json`` in ``--output``, which ``report.py`` shows. Start it behind ``nohup`` or in a batch
job: it takes hours. Seeds can run beside each other, one process each.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evaluation import Measured, read_output
from megatron_rmt.job.text_files import read_text_file
from study_tables import as_markdown, read_cost, tables_of

REPOSITORY = Path(__file__).resolve().parent.parent
WORDS = ("data", "train", "reason", "positions", "evaluate")


@dataclass(frozen=True)
class Arm:
    """One way of training. flags: of training, beside the study's. begin: the arm whose weights it
    starts with, "" for the model. reason: whether it has rollouts. time_of, step_time_of: see
    above, "" for as many steps as the flags say. post_train: whether by ``post_train.sh``."""

    name: str
    flags: str
    begin: str = ""
    reason: bool = False
    time_of: str = ""
    step_time_of: str = ""
    post_train: bool = False


@dataclass(frozen=True)
class PostTraining:
    """The section of that name; see above."""

    after: list[str]
    prepare: list[str]
    data: str
    marker: str
    heldout: dict[str, str]
    flags: str
    reason: str
    positions: str
    evaluate: str

    def arm_after(self, name: str) -> Arm:
        """The arm that begins with the weights of ``name``."""
        return Arm(f"{name}, post-trained", self.flags, name, reason=True, post_train=True)


@dataclass(frozen=True)
class Study:
    """What the YAML file says; see there."""

    model: str
    seeds: list[int]
    reference: str
    arms: list[Arm]
    heldout: dict[str, str]
    prepare: list[str]
    data: str
    train: str
    reason: str
    positions: str
    evaluate: str
    post_train: PostTraining | None


def read_study(path: Path) -> Study:
    """The study in ``path``.

    Raises:
        ValueError: one sentence about what in it cannot be meant.
    """
    try:
        content = yaml.safe_load(read_text_file(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a mapping, see --help.")

    def take(
        where: Mapping[str, Any], key: str, kind: type, place: str, default: Any = None
    ) -> Any:
        value = where.get(key, default)
        if type(value) is not kind:
            raise ValueError(f"{path}: {place}{key} is {value!r}; it must be a {kind.__name__}.")
        return value

    for key in content.keys() - set(Study.__dataclass_fields__):
        raise ValueError(f"{path}: {key!r} is unknown; see --help.")
    arms = list[Arm]()
    for name, own in take(content, "arms", dict, "").items():
        place = f"arms: {name}: "
        if not isinstance(own, dict):
            raise ValueError(f"{path}: {place}{own!r} must be a mapping with flags.")
        for key in own.keys() - {"flags", "from", "reason", "time_of", "step_time_of"}:
            raise ValueError(f"{path}: {place}{key!r} is unknown; see --help.")
        arm = Arm(
            str(name),
            take(own, "flags", str, place),
            take(own, "from", str, place, ""),
            take(own, "reason", bool, place, False),
            take(own, "time_of", str, place, ""),
            take(own, "step_time_of", str, place, ""),
        )
        if "/" in arm.name:
            raise ValueError(f"{path}: {place[:-2]} is no name of a file; leave out the /.")
        earlier = {one.name for one in arms} | {""}
        for key, value in (("from", arm.begin), *vars(arm).items()):
            if key in ("from", "time_of", "step_time_of") and value not in earlier:
                raise ValueError(f"{path}: {place}{key} is {value!r}; name an arm before it.")
        if bool(arm.time_of) != bool(arm.step_time_of):
            raise ValueError(f"{path}: {place}time_of and step_time_of belong together.")
        arms.append(arm)
    words = {key: take(content, key, str, "", "") for key in WORDS}
    heldout = _texts(take(content, "heldout", dict, ""))
    post_train = None
    if own := take(content, "post_train", dict, "", {}):
        place = "post_train: "
        for key in own.keys() - set(PostTraining.__dataclass_fields__):
            raise ValueError(f"{path}: {place}{key!r} is unknown; see --help.")
        post_train = PostTraining(
            after=[str(name) for name in take(own, "after", list, place)],
            prepare=[str(line) for line in take(own, "prepare", list, place, [])],
            data=take(own, "data", str, place),
            marker=take(own, "marker", str, place),
            heldout=_texts(take(own, "heldout", dict, place)),
            flags=take(own, "flags", str, place),
            reason=take(own, "reason", str, place, words["reason"]),
            positions=take(own, "positions", str, place),
            evaluate=take(own, "evaluate", str, place, words["evaluate"]),
        )
        for name in post_train.after or [""]:
            if name not in {arm.name for arm in arms}:
                raise ValueError(f"{path}: {place}after has {name!r}; name arms of the study.")
        for name in post_train.heldout.keys() & heldout.keys():
            raise ValueError(f"{path}: {place}heldout: {name!r} is one of the study's; rename it.")
        arms += map(post_train.arm_after, post_train.after)
        if len({arm.name for arm in arms}) < len(arms):
            raise ValueError(f"{path}: {place}after: an arm has that name already; rename it.")
    seeds = take(content, "seeds", list, "")
    if not arms or not seeds or any(type(seed) is not int for seed in seeds):
        raise ValueError(f"{path}: arms and seeds, whole numbers, must not be empty.")
    reference = take(content, "reference", str, "")
    if reference not in {arm.name for arm in arms}:
        raise ValueError(f"{path}: reference is {reference!r}; name one of the arms.")
    return Study(
        model=take(content, "model", str, ""),
        seeds=seeds,
        reference=reference,
        arms=arms,
        heldout=heldout,
        prepare=[str(line) for line in take(content, "prepare", list, "", [])],
        post_train=post_train,
        **words,
    )


def _texts(mapping: Mapping[Any, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in mapping.items()}


class Stages:
    """The stages of one seed, in order, each done once.

    A stage's stamp is the digest of its command and of those before it that it builds on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "stamps").mkdir(parents=True, exist_ok=True)
        self._lock = open(folder / "lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is at work in another process; wait for it.") from None

    def run(
        self,
        name: str,
        command: Sequence[str],
        after: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Run ``command`` unless it was done after the stage of stamp ``after``; its stamp.

        Raises:
            ValueError: it failed; its log is named.
        """
        key = json.dumps([list(command), dict(environment or {}), after])
        stamp = hashlib.sha256(key.encode()).hexdigest()
        place = self.folder / "stamps" / name.replace(" ", "-")
        if place.exists() and place.read_text() == stamp:
            return stamp
        log = self.folder / f"{name.replace(' ', '-')}.log"
        print(
            f"{time.strftime('%H:%M:%S')} {self.folder.name}: {name}", file=sys.stderr, flush=True
        )
        with open(log, "w") as stream:
            done = subprocess.run(
                command,
                cwd=REPOSITORY,
                env=os.environ | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        if done.returncode != 0:
            raise ValueError(f"{self.folder.name}: {name} failed, see {log}; then start it again.")
        place.write_text(stamp)
        return stamp


def run_seed(study: Study, seed: int, output: Path, arms: Sequence[str]) -> None:
    """All stages of one seed, of the arms named in ``arms`` and of those that they need.

    Raises:
        ValueError: a stage failed.
    """
    folder = (output / str(seed)).resolve()
    stages = Stages(folder)

    def put_in(text: str) -> str:
        return text.replace("{seed}", str(seed)).replace("{folder}", str(folder))

    def words(text: str) -> list[str]:
        return shlex.split(put_in(text))

    def prepared(lines: Sequence[str], name: str, stamp: str) -> str:
        for number, line in enumerate(lines, 1):
            command = ["bash", "-euo", "pipefail", "-c", put_in(line)]
            stamp = stages.run(f"prepare {name}{number}", command, stamp)
        return stamp

    def evaluate(arm: Arm, of: Study | PostTraining, stamp: str) -> None:
        for file, heldout in of.heldout.items():
            evaluated = evaluation_of(folder, arm.name, file)
            first = evaluation_of(folder, study.arms[0].name, file)
            positions = (
                words(of.positions) if arm is study.arms[0] else ["--positions-from", str(first)]
            )
            stages.run(
                f"evaluate {arm.name} {file}",
                [
                    *(sys.executable, "tools/evaluate.py", "--model-flags", model),
                    *("--load", str(saved_by(arm.name)), "--data", put_in(heldout)),
                    *("--output", str(evaluated)),
                    *(*positions, *words(of.evaluate), *words(of.reason)),
                ],
                stamp,
            )

    def saved_by(name: str) -> Path:
        return folder / name.replace(" ", "-")

    model = str(Path(study.model).resolve())
    stamps = {"": prepared(study.prepare, "", "")}
    chosen = [arm for arm in study.arms if arm.name in arms]
    post, before, questions = study.post_train, set[str](), ""
    if any(arm.post_train for arm in chosen):
        questions = prepared(post.prepare, "questions ", stamps[""])
        before = {arm.begin for arm in chosen if arm.post_train} | {study.arms[0].name}
    for arm in chosen:
        begin = str(saved_by(arm.begin)) if arm.begin else model
        saved = {"CHECKPOINT": model, "SAVE": str(saved_by(arm.name)), "NPROC_PER_NODE": "1"}
        if arm.post_train:
            stamps[arm.name] = stages.run(
                f"train {arm.name}",
                [
                    *("bash", "examples/post_train.sh", "--seed", str(seed)),
                    *(*words(post.reason), *words(arm.flags)),
                ],
                stamps[arm.begin] + questions,
                saved | {"START": begin, "DATA": put_in(post.data), "MARKER": post.marker},
            )
            evaluate(arm, post, stamps[arm.name])
            continue
        flags = words(study.train) + words(arm.flags) + words(study.reason) * arm.reason
        if arm.time_of:
            like, step = (read_cost(saved_by(name)) for name in (arm.time_of, arm.step_time_of))
            steps = max(1, round(like.seconds / step.step_seconds))
            flags += ["--train-iters", str(steps), "--save-interval", str(steps)]
        stamps[arm.name] = stages.run(
            f"train {arm.name}",
            [
                *("bash", "examples/pretrain_rmt.sh", "--pretrained-checkpoint", begin),
                *("--seed", str(seed), *flags),
            ],
            stamps[arm.begin],
            saved | {"DATA": put_in(study.data)},
        )
        evaluate(arm, study, stamps[arm.name])
        if arm.name in before:
            evaluate(arm, post, stamps[arm.name] + questions)


def evaluation_of(folder: Path, arm: str, file: str) -> Path:
    """Where the evaluation of ``arm`` on the held-out ``file`` of the seed's ``folder`` is."""
    return folder / f"{arm}.{file}.json".replace(" ", "-")


def needed(study: Study, arms: Sequence[str]) -> list[str]:
    """``arms``, those that they build on, and the first, in the study's order.

    Raises:
        ValueError: one of them is none.
    """
    by_name = {arm.name: arm for arm in study.arms}
    found, todo = set[str](), [study.arms[0].name, *arms]
    while todo:
        name = todo.pop()
        if name not in by_name:
            raise ValueError(f"--arms {name}: the study has {', '.join(by_name)}.")
        if name not in found:
            found.add(name)
            arm = by_name[name]
            todo += [one for one in (arm.begin, arm.time_of, arm.step_time_of) if one]
    return [arm.name for arm in study.arms if arm.name in found]


def compared(study: Study) -> dict[str, dict[str, dict[str, str]]]:
    """Which arm each is compared with, by held-out file and by the title of the differences."""

    def title(reference: str) -> str:
        return f"difference from {reference}"

    base, post = study.reference, study.post_train
    others = {arm.name: base for arm in study.arms if arm.name != base and not arm.post_train}
    found = {file: {title(base): others} for file in study.heldout}
    if post is not None:
        own = [arm for arm in study.arms if arm.post_train]
        gains = {arm.name: arm.begin for arm in own}
        others = {arm.name: own[0].name for arm in own[1:]}
        for file in post.heldout:
            found[file] = {"gain by post-training": gains, title(own[0].name): others}
    return found


def write_tables(study: Study, output: Path) -> str:
    """Tables of all evaluations that there are, as Markdown; also in ``study.json``."""
    folders = {seed: output / str(seed) for seed in study.seeds}
    bases = compared(study)
    measured: dict[str, dict[str, dict[int, Measured]]] = {}
    for file in bases:
        by_arm = measured.setdefault(file, {})
        for arm in study.arms:
            paths = {s: evaluation_of(folder, arm.name, file) for s, folder in folders.items()}
            if own := {s: read_output(path) for s, path in paths.items() if path.exists()}:
                by_arm[arm.name] = own
    costs = {}
    for arm in study.arms:
        saved = [folder / arm.name.replace(" ", "-") for folder in folders.values()]
        done = [one for one in saved if (one / "latest_checkpointed_iteration.txt").exists()]
        if done:
            costs[arm.name] = [read_cost(one) for one in done]
    tables = tables_of(measured, costs, bases)
    partial = output / "study.json.partial"
    partial.write_text(json.dumps({"tables": tables}, indent=1) + "\n")
    partial.replace(output / "study.json")
    return "\n".join(map(as_markdown, tables))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a study; bad input ends it with one sentence."""
    parser = argparse.ArgumentParser(
        prog="study.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("study", type=Path, help="YAML file, see above")
    add("--output", type=Path, required=True, help="folder of everything that is made")
    add("--seeds", type=int, nargs="+", help="only these seeds (default: the study's)")
    add("--arms", nargs="+", help="only these arms and those that they need (default: all)")
    add("--tables", action="store_true", help="train nothing, write the tables of what there is")
    flags = parser.parse_args(arguments)
    try:
        study = read_study(flags.study)
        arms = needed(study, flags.arms or [arm.name for arm in study.arms])
        for seed in flags.seeds or study.seeds:
            if seed not in study.seeds:
                raise ValueError(f"--seeds {seed}: the study has {study.seeds}.")
            if not flags.tables:
                run_seed(study, seed, flags.output, arms)
        print(write_tables(study, flags.output))
    except ValueError as error:
        sys.exit(f"study.py: {error}")


if __name__ == "__main__":
    main()
