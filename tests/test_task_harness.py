"""tools/evaluate.py --tasks: what lm-evaluation-harness is asked, what is kept, what is refused."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from tests.distributed import REPOSITORY

TOOLS = REPOSITORY / "tools"
GSM8K = REPOSITORY / "examples/tasks/gsm8k.yaml"
sys.path.insert(0, str(TOOLS))

import evaluate  # noqa: E402
import task_harness  # noqa: E402
from evaluation import resample  # noqa: E402


def sample(
    document: int, right: float, filtered_by: str = "answer", **others: Any
) -> dict[str, Any]:
    """As the harness logs it."""
    hashes = {f"{part}_hash": f"{part}{document}" * 9 for part in ("doc", "prompt", "target")}
    common = {"doc_id": document, "filter": filtered_by, "metrics": ["exact_match", *others]}
    return common | hashes | others | {"exact_match": right}


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Stands in for the harness: "asked" is what it was called with, "found" what it will say."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    said: dict[str, Any] = {}

    def simple_evaluate(**asked: Any) -> dict[str, Any]:
        said["asked"] = asked
        if "error" in said:
            raise said["error"]
        rights = said["found"]
        samples = [sample(number, right) for number, right in enumerate(rights)]
        mean = sum(rights) / len(rights)
        results = {"alias": "own", "exact_match,answer": mean, "exact_match_stderr,answer": "N/A"}
        return {"results": {"own": results}, "samples": {"own": samples}}

    module = ModuleType("lm_eval")
    module.simple_evaluate = simple_evaluate
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    monkeypatch.setattr(task_harness, "find_spec", lambda name: module)
    monkeypatch.setattr(task_harness, "version", lambda name: "9.9")
    return said


def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, *words: str
) -> dict[str, Any]:
    path = tmp_path / output
    load = ["--load", str(tmp_path / "model"), "--output", str(path)]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *load, *words])
    evaluate.main()
    return json.loads(path.read_text())


def test_a_task_of_a_file_is_asked_with_the_data_at_hand(harness, tmp_path, monkeypatch):
    harness["found"] = [1.0, 0.0]
    words = ["--tasks", str(GSM8K), "hellaswag", "--data", "a.jsonl", "--documents", "2"]
    run(tmp_path, monkeypatch, "o.json", *words, "--rollouts-at-once", "3", "--seed", "7")
    asked = harness["asked"]
    expected = yaml.safe_load(GSM8K.read_text())
    expected["dataset_kwargs"] = {"data_files": {"test": ["a.jsonl"]}}
    assert asked["tasks"] == [expected, "hellaswag"]
    assert (asked["limit"], asked["batch_size"], asked["numpy_random_seed"]) == (2, 3, 7)
    assert asked["model_args"]["pretrained"] == str(tmp_path / "model")


def test_values_have_intervals_over_documents_and_a_table_of_their_own(
    harness, tmp_path, monkeypatch, capsys
):
    rights = [float(number % 3 == 0) for number in range(30)]
    harness["found"] = rights
    written = run(tmp_path, monkeypatch, "o.json", "--tasks", "own", "--seed", "3")
    drawn = resample(30, 3) @ rights / 30
    low, high = np.percentile(drawn, [2.5, 97.5])
    found = written["task_results"]["own"]["exact_match,answer"]
    assert found == {"value": 1 / 3, "low": pytest.approx(low), "high": pytest.approx(high)}
    assert written["settings"]["lm_eval"] == "9.9"
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["task", "metric", "value", "documents"]
    assert row.split() == [
        "own",
        "exact_match,answer",
        "0.333",
        f"[{low:.3f},",
        f"{high:.3f}]",
        "30",
    ]


def test_a_difference_is_of_the_same_documents(harness, tmp_path, monkeypatch, capsys):
    before = [float(number % 3 == 0) for number in range(30)]
    after = [max(own, float(number % 5 == 1)) for number, own in enumerate(before)]
    for name, rights in (("before", before), ("after", after)):
        harness["found"] = rights
        run(tmp_path, monkeypatch, f"{name}.json", "--tasks", "own", "--seed", "3")
    capsys.readouterr()
    paths = [str(tmp_path / f"{name}.json") for name in ("before", "after")]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--compare", *paths])
    evaluate.main()
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["task", "metric", "before", "after", "difference"]
    gains = np.array(after) - before
    low, high = np.percentile(resample(30, 3) @ gains / 30, [2.5, 97.5])
    assert row.endswith(f"{gains.mean():+.3f} [{low:+.3f}, {high:+.3f}]")
    # Asked of fewer documents it is another thing.
    harness["found"] = after[:9]
    run(tmp_path, monkeypatch, "after.json", "--tasks", "own", "--seed", "3")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--compare", *paths])
    with pytest.raises(SystemExit, match="asked own of other documents, or otherwise; evaluate"):
        evaluate.main()


def test_metrics_are_told_apart_by_their_filter_and_what_is_no_mean_has_no_interval():
    samples = [
        sample(document, float(document == judged), judge, perplexity=2.0 + document, words=(1, 2))
        for judge, judged in (("strict", 0), ("lenient", 1))
        for document in (0, 1, 2, 3)
    ]
    samples[3]["exact_match"] = 1.0
    results = {"exact_match,strict": 0.5, "exact_match,lenient": 0.25, "sample_len": 4}
    results |= {"perplexity,strict": 9.0, "perplexity,lenient": 9.0, "words,strict": 3.0}
    found = task_harness._scores(results, samples)
    assert len(set(found.documents)) == 4
    assert found.scores == {"exact_match,strict": [1, 0, 0, 1], "exact_match,lenient": [0, 1, 0, 0]}
    assert found.others == {
        "perplexity,strict": 9.0,
        "perplexity,lenient": 9.0,
        "words,strict": 3.0,
    }
    shown = task_harness.table({"a": found}, seed=1)
    assert next(line for line in shown.splitlines() if "words" in line).split()[2:] == [
        "3.000",
        "4",
    ]


def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    with pytest.raises(SystemExit) as refused:
        run(tmp_path, monkeypatch, "o.json", *words)
    assert not (tmp_path / "o.json").exists()
    assert "\n" not in str(refused.value.code)
    return str(refused.value.code)


def test_without_the_harness_one_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(task_harness, "find_spec", lambda name: None)
    said = refusal(tmp_path, monkeypatch, "--tasks", "own")
    assert said == (
        "evaluate.py: --tasks needs lm-evaluation-harness, which is not installed; run "
        "pip install 'megatron_rmt[tasks]'."
    )


def test_what_cannot_be_asked_is_one_sentence(harness, tmp_path, monkeypatch):
    harness["error"] = KeyError("Spec 'x' is not\n a task")
    said = refusal(tmp_path, monkeypatch, "--tasks", "x")
    assert said == "evaluate.py: --tasks x cannot be run: Spec 'x' is not a task."
    said = refusal(tmp_path, monkeypatch, "--tasks", "x", "--samples", "2", "--bf16")
    assert "--samples --bf16 means nothing to --tasks" in said
    assert "--documents is 0; pass 1" in refusal(
        tmp_path, monkeypatch, "--tasks", "x", "--documents", "0"
    )
    (tmp_path / "t.yaml").write_text("task: a\n")
    said = refusal(tmp_path, monkeypatch, "--tasks", str(tmp_path / "t.yaml"))
    assert "is no task: it must name a task and its test_split" in said
    said = refusal(tmp_path, monkeypatch, "--tasks", str(tmp_path / "none.yaml"))
    assert "none.yaml cannot be read" in said
    (tmp_path / "model/config.json").unlink()
    assert "it lacks config.json" in refusal(tmp_path, monkeypatch, "--tasks", "x")


@pytest.mark.parametrize(
    "change",
    [
        {"format": 0},
        {"settings": {}},
        {"scores": {"own": {}}},
        {"scores": {"own": {"documents": ["a"], "scores": {"m": []}, "others": {}}}},
        {"scores": {"own": {"documents": ["a"], "scores": {"m": ["1"]}, "others": {}}}},
        {"scores": {"own": {"documents": ["a"], "scores": {}, "others": {"m": None}}}},
    ],
)
def test_an_output_that_was_changed_is_refused(harness, tmp_path, monkeypatch, change):
    harness["found"] = [1.0]
    content = run(tmp_path, monkeypatch, "o.json", "--tasks", "own")
    assert task_harness.read_scores(tmp_path / "o.json")[1] == 1234
    (tmp_path / "o.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=r"o\.json is not an output of evaluate\.py --tasks"):
        task_harness.read_scores(tmp_path / "o.json")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="an extra")
def test_the_harness_asks_the_task_of_the_examples_offline(inputs, tmp_path):
    problem = "One and one is how many?"
    lines = [
        {"text": f"{problem}\n\nIt is two.\n#### {answer}", "answer": answer}
        for answer in ("2", "3")
    ]
    data = tmp_path / "heldout.jsonl"
    data.write_text("".join(json.dumps(x | {"problem_chars": len(problem)}) + "\n" for x in lines))
    words = ["--tasks", str(GSM8K), "--data", str(data), "--load", str(inputs.huggingface)]
    done = subprocess.run(
        [sys.executable, str(TOOLS / "evaluate.py"), *words, "--output", str(tmp_path / "o.json")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, _ = task_harness.read_scores(tmp_path / "o.json")
    assert list(found["gsm8k_local"].scores) == ["exact_match,answer"]
    assert len(found["gsm8k_local"].documents) == 2
    assert "gsm8k_local" in done.stdout
