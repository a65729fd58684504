"""Benchmarks by lm-evaluation-harness (PyPI ``lm_eval``) on a model in Hugging Face's form.

The harness asks and judges; what each document earned is kept, so that intervals and differences
are by the bootstrap over documents that all our tables have. It brings no data: a task's comes from
the Hugging Face hub or its cache on this machine, or from local files, as that of
``examples/tasks/gsm8k.yaml`` does.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from evaluation import Estimate, aligned, estimates, ratios, resample, shown
from json_lines import read_object

KIND = "tasks"
FORMAT = 1


@dataclass(frozen=True)
class TaskScores:
    """What one task found.

    documents: a digest of each document with its prompt and target, in order. scores: by metric and
    filter, what each document earned. others: what the harness gives as one number for all.
    """

    documents: list[str]
    scores: dict[str, list[float]]
    others: dict[str, float]

    def estimates(self, seed: int, minus: "TaskScores | None" = None) -> dict[str, Estimate]:
        """Each metric with its interval; minus the same of other scores, of the same documents."""
        count, found = len(self.documents), {}
        weights, each = resample(count, seed), np.ones((count, 1))
        for name, own in self.scores.items():
            values = np.array(own)[:, None]
            if minus is not None:
                if name not in minus.scores:
                    continue
                values = values - np.array(minus.scores[name])[:, None]
            point = ratios(np.ones((1, count)), values, each)[0]
            (found[name],) = estimates(point, ratios(weights, values, each), count)
        for name, value in self.others.items():
            if minus is None or name in minus.others:
                value -= 0.0 if minus is None else minus.others[name]
                found[name] = Estimate(value, math.nan, math.nan)
        return found


def run_tasks(
    load: Path,
    tasks: Sequence[str],
    data: Sequence[Path],
    *,
    documents: int | None,
    seed: int,
    at_once: int,
) -> dict[str, TaskScores]:
    """The scores of the model in ``load``, by task.

    tasks: names that the harness knows, or YAML files of its form. data: files that stand in for
    the test split of the YAML files. documents: the first of each task, None for all. at_once:
    documents asked together.

    Raises:
        ValueError: the harness is not installed, ``load`` is no model of Hugging Face's form, or a
            task cannot be had.
    """
    if find_spec("lm_eval") is None:
        raise ValueError(
            "--tasks needs lm-evaluation-harness, which is not installed; run "
            "pip install 'megatron_rmt[tasks]'."
        )
    if not (load / "config.json").is_file():
        raise ValueError(
            f"--load {load} is no model in Hugging Face's form (it lacks config.json), which "
            "--tasks needs; export it with tools/convert_checkpoint.py to-huggingface."
        )
    asked = [_task(name, data) for name in tasks]
    from lm_eval import simple_evaluate

    try:
        found = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(load), "dtype": "auto"},
            tasks=asked,
            limit=documents,
            batch_size=at_once,
            device="cuda" if torch.cuda.is_available() else "cpu",
            bootstrap_iters=0,
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = " ".join(" ".join(map(str, error.args)).split())[:300]
        raise ValueError(f"--tasks {' '.join(tasks)} cannot be run: {said}.") from error
    return {
        name: _scores(found["results"][name], found["samples"].get(name, []))
        for name in found["results"]
    }


def _task(name: str, data: Sequence[Path]) -> str | dict[str, Any]:
    """What the harness takes for a word of --tasks.

    Raises:
        ValueError: a YAML file cannot be read, or is no task.
    """
    if Path(name).suffix not in (".yaml", ".yml"):
        return name
    try:
        task = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"--tasks {name} cannot be read: {said}.") from None
    if not isinstance(task, dict) or not {"task", "test_split"} <= task.keys():
        raise ValueError(f"--tasks {name} is no task: it must name a task and its test_split.")
    if data:
        task["dataset_kwargs"] = {"data_files": {task["test_split"]: [str(own) for own in data]}}
    return task


def _scores(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> TaskScores:
    by_document: dict[Any, str] = {}
    scores: dict[str, dict[Any, float]] = {}
    for sample in samples:
        key = sample["doc_id"]
        by_document[key] = " ".join(
            str(sample[f"{part}_hash"])[:16] for part in ("doc", "prompt", "target")
        )
        for metric in sample["metrics"]:
            if _is_number(sample[metric]):
                own = scores.setdefault(f"{metric},{sample['filter']}", {})
                own[key] = float(sample[metric])
    # Some metrics are no mean over documents, and of some documents nothing is measured.
    means = {
        name: [own[key] for key in by_document]
        for name, own in scores.items()
        if own.keys() == by_document.keys()
        and math.isclose(np.mean([*own.values()]), results.get(name, math.nan), rel_tol=1e-6)
    }
    others = {
        name: float(value)
        for name, value in results.items()
        if "," in name and "_stderr," not in name and name not in means and _is_number(value)
    }
    return TaskScores([*by_document.values()], means, others)


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number) and math.isfinite(value)


def write_scores(path: Path, scores: Mapping[str, TaskScores], settings: Mapping[str, Any]) -> None:
    """Settings, results with intervals, and what each document earned."""
    seed = settings["seed"]
    content = {
        "format": FORMAT,
        "kind": KIND,
        "settings": {**settings, "lm_eval": version("lm_eval")},
        "task_results": {
            task: {name: one.as_json() for name, one in own.estimates(seed).items()}
            for task, own in scores.items()
        },
        "scores": {task: vars(own) for task, own in scores.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.rename(path)


def is_scores(path: Path) -> bool:
    """Whether ``path`` is one of ``write_scores``.

    Raises:
        ValueError: it is no JSON object.
    """
    return read_object(path).get("kind") == KIND


def read_scores(path: Path) -> tuple[dict[str, TaskScores], int]:
    """The scores of an earlier output, and its seed.

    Raises:
        ValueError: it is no output of --tasks.
    """
    content = read_object(path)
    try:
        if (content["kind"], content["format"]) != (KIND, FORMAT):
            raise ValueError("another kind or format")
        scores = {task: TaskScores(**own) for task, own in content["scores"].items()}
        for own in scores.values():
            for values in own.scores.values():
                if len(values) != len(own.documents) or not all(map(_is_number, values)):
                    raise ValueError("scores and documents differ")
            if not all(map(_is_number, own.others.values())):
                raise ValueError("a result is no number")
        seed = content["settings"]["seed"]
        if type(seed) is not int or seed < 0:
            raise ValueError("its seed is no whole number from 0")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an output of evaluate.py --tasks ({error!r}).") from None
    return scores, seed


def table(scores: Mapping[str, TaskScores], seed: int) -> str:
    """The table of one evaluation."""
    rows = [["task", "metric", "value", "documents"]]
    for task, own in scores.items():
        for name, estimate in own.estimates(seed).items():
            rows.append([task, name, shown(estimate, 1.0, 3), f"{len(own.documents):,}"])
    return aligned(rows)


def compare_scores(paths: Sequence[Path]) -> str:
    """The table of several, each with its difference from the first.

    Raises:
        ValueError: a file cannot be used, or a task was asked of other documents or otherwise.
    """
    read = [read_scores(path) for path in paths]
    (first, seed), others = read[0], [scores for scores, _ in read[1:]]
    for path, scores in zip(paths[1:], others, strict=True):
        for task in first.keys() & scores.keys():
            if scores[task].documents != first[task].documents:
                raise ValueError(
                    f"{paths[0]} and {path} asked {task} of other documents, or otherwise; "
                    "evaluate both with the same --tasks, --data and --documents."
                )
    rows = [["task", "metric", paths[0].stem]]
    for path in paths[1:]:
        rows[0] += [path.stem, "difference"]
    for task, own in first.items():
        if not all(task in scores for scores in others):
            continue
        for name, estimate in own.estimates(seed).items():
            row = [task, name, shown(estimate, 1.0, 3)]
            for scores in others:
                found = scores[task].estimates(seed)
                change = scores[task].estimates(seed, minus=own)
                if name in change:
                    row += [shown(found[name], 1.0, 3), shown(change[name], 1.0, 3, sign=True)]
                else:
                    row += ["", ""]
            rows.append(row)
    return aligned(rows)
