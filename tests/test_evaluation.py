"""The statistics of tools/evaluation.py: splits, bootstrap intervals, paired differences."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tools"))

import evaluation


def record(difficulty: str, next_token: str, **others: Any) -> evaluation.Record:
    common = {"file": "a", "line": 1, "id": "", "dropped": 0, "entropy": 1.0}
    common |= {"tokens": len(difficulty), "positions": []}
    return evaluation.Record(difficulty=difficulty, next_token=next_token, **common | others)


def test_splits_are_nested_and_average_is_the_mean_of_the_three():
    records = [
        record("-0123", "01101", positions=[2, 4], thought=[1, 2], no_thought=[0, 2]),
        record("-3-1", "0111", positions=[1, 3], thought=[2, 0], no_thought=[0, 0]),
    ]
    right, total = evaluation.split_counts(records, "next_token", 2)
    np.testing.assert_array_equal(total, [[3, 2, 1, 4], [2, 1, 1, 2]])
    np.testing.assert_array_equal(right, [[2, 1, 1, 3], [2, 1, 1, 2]])
    right, total = evaluation.split_counts(records, "thought", 2)
    np.testing.assert_array_equal(total, [[4, 2, 2, 4], [4, 2, 2, 4]])
    np.testing.assert_array_equal(right, [[3, 2, 2, 3], [2, 2, 2, 2]])
    right, total = evaluation.split_counts(records, "next_token_sampled", 2)
    np.testing.assert_array_equal(total, [[2, 1, 1, 2], [2, 1, 1, 2]])
    np.testing.assert_array_equal(right, [[2, 1, 1, 2], [2, 1, 1, 2]])
    values = evaluation.means(np.ones((1, 2)), np.array([[1, 1, 1, 2]] * 2), total)
    np.testing.assert_allclose(values, [[0.5, 1.0, 1.0, 2.5 / 3, 1.0]])


PROMPT = {"head": "Today: 27 Nov\nText: ", "stem": " {budget}", "close": "</t>", "digest": "0a"}


def settings(**others: Any) -> dict[str, Any]:
    common = {"samples": 1, "seed": 3, "entropy_thresholds": [0.5, 1.0, 1.5], "prompt": PROMPT}
    return common | others


def test_interval_of_independent_documents_is_that_of_a_binomial():
    documents, share = 400, 0.3
    records = [record("-3", f"0{int(i < share * documents)}") for i in range(documents)]
    for estimate in evaluation.Measured(settings(), records).estimates()["next_token"]:
        half = 1.96 * np.sqrt(share * (1 - share) / documents)
        assert estimate.value == pytest.approx(share)
        assert estimate.low == pytest.approx(share - half, abs=0.1 * half)
        assert estimate.high == pytest.approx(share + half, abs=0.1 * half)


def test_interval_counts_documents_not_the_positions_in_them():
    single = [record("-3", f"0{i % 2}") for i in range(60)]
    repeated = [record("-" + "3" * 20, "0" + str(i % 2) * 20) for i in range(60)]
    one, other = (evaluation.Measured(settings(), records) for records in (single, repeated))
    assert one.estimates()["next_token"] == other.estimates()["next_token"]


def test_a_single_document_has_no_interval_and_an_empty_split_no_value():
    found = evaluation.Measured(settings(), [record("-11", "010")]).estimates()["next_token"]
    assert found[0].as_json() == {"value": 0.5, "low": None, "high": None}
    assert found[2].as_json() == {"value": None, "low": None, "high": None}
    assert [evaluation.shown(found[0]), evaluation.shown(found[2])] == ["50.0", "none"]


def test_difference_is_paired_by_document():
    generator = np.random.default_rng(0)
    before, after = [], []
    for _ in range(50):
        right = generator.integers(0, 2)
        before.append(record("-3333", f"0{right}{right}{right}0"))
        after.append(record("-3333", f"0{right}{right}{right}1"))
    measured = [evaluation.Measured(settings(), records) for records in (before, after)]
    alone = measured[0].estimates()["next_token"][0]
    assert alone.high - alone.low > 0.1
    (change, *_) = evaluation.differences(*measured)["next_token"]
    assert [change.value, change.low, change.high] == pytest.approx([0.25] * 3)


def _with_text(log_probs: Sequence[float | None], counted: Sequence[int]) -> evaluation.Measured:
    records = [
        record("-" + "0" * count, "0" * (count + 1), line=line, text_log_prob=value)
        for line, (value, count) in enumerate(zip(log_probs, counted, strict=True), 1)
    ]
    return evaluation.Measured(settings(), records)


def test_perplexity_is_of_all_tokens_together_and_its_interval_over_documents():
    rng = np.random.default_rng(1)
    counted = rng.integers(1, 9, 30)
    nats = [rng.normal(2 * count, 1.0) for count in counted]
    measured = _with_text([-own for own in nats], counted)
    (found,) = measured.estimates()["perplexity"]
    assert found.value == pytest.approx(np.exp(np.sum(nats) / counted.sum()))
    drawn = [np.exp(weights @ nats / (weights @ counted)) for weights in evaluation.resample(30, 3)]
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))
    # A difference is of the same documents: here every token is likelier by a tenth of a nat.
    after = _with_text([-own + 0.1 * n for own, n in zip(nats, counted, strict=True)], counted)
    (change,) = evaluation.differences(measured, after)["perplexity"]
    factor = np.exp(-0.1) - 1
    assert change.value == pytest.approx(factor * found.value)
    assert (change.high, change.low) == pytest.approx((factor * found.low, factor * found.high))


def test_an_older_output_has_no_perplexity_and_is_compared_without(tmp_path: Path):
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path in paths:
        evaluation.write_output(path, _with_text([-1.0, -2.0], [1, 1]), 1.0)
    assert "perplexity of the plain text" in evaluation.compare(paths)
    content = json.loads(paths[0].read_text())
    for document in content["documents"]:
        del document["text_log_prob"]
    paths[0].write_text(json.dumps(content))
    old = evaluation.read_output(paths[0])
    assert "perplexity" not in old.estimates()
    assert "perplexity" not in evaluation.compare(paths)
    content["documents"][0]["text_log_prob"] = "1"
    paths[0].write_text(json.dumps(content))
    with pytest.raises(ValueError, match="text_log_prob of a document is no float"):
        evaluation.read_output(paths[0])


def test_output_comes_back_as_it_was_written(tmp_path: Path):
    full = {"thought": [1], "thought_length": [3], "well_formed": [1], "closed_by_itself": [0]}
    full |= {"no_thought": [0], "no_thought_well_formed": [1], "positions": [1]}
    measured = evaluation.Measured(
        settings(), [record("-3", "01", line=line, **full) for line in (1, 2)]
    )
    evaluation.write_output(tmp_path / "out.json", measured, 1.0)
    again = evaluation.read_output(tmp_path / "out.json")
    assert (again.settings, again.records) == (measured.settings, measured.records)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other.json is not an output of evaluate.py"):
        evaluation.read_output(tmp_path / "other.json")


def _written(path: Path, prompt: dict[str, str]) -> Path:
    measured = evaluation.Measured(settings(prompt=prompt), [record("-3", "01")])
    evaluation.write_output(path, measured, 1.0)
    return path


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"head": "Today: 28 Nov\nText: ", "digest": "0b"},
            "one.json and .*two.json differ in the head of the prompt: "
            "'Today: 27 Nov.nText: ' and 'Today: 28 Nov.nText: '; evaluate both with the same",
        ),
        (
            {"stem": " {budget}" + "x" * 500, "digest": "0b"},
            r"in the stem of the prompt: ' \{budget\}' and ' \{budget\}x+\.\.\.'; evaluate",
        ),
        ({"head": "", "digest": "0b"}, r"differ in the head .* and ''; evaluate"),
        ({"close": "</s>", "digest": "0b"}, "differ in the close of the prompt: '</t>' and '</s>'"),
        ({"digest": "0b"}, "have the same prompt in other tokens; evaluate both with the same tok"),
    ],
)
def test_evaluations_with_another_prompt_are_not_compared(
    tmp_path: Path, change: dict[str, str], sentence: str
):
    one = _written(tmp_path / "one.json", PROMPT)
    same = _written(tmp_path / "same.json", PROMPT)
    assert "next token" in evaluation.compare([one, same])
    two = _written(tmp_path / "two.json", PROMPT | change)
    with pytest.raises(ValueError, match=sentence) as caught:
        evaluation.compare([one, same, two])
    assert len(str(caught.value).replace(str(tmp_path), "")) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings_", [{"prompt": None}, {"prompt": PROMPT | {"head": 3}}, {}])
def test_an_output_that_does_not_say_its_prompt_is_refused(
    tmp_path: Path, settings_: dict[str, Any]
):
    path = _written(tmp_path / "one.json", PROMPT)
    content = json.loads(path.read_text())
    del content["settings"]["prompt"]
    content["settings"] |= settings_
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"one.json is not an output of evaluate.py"):
        evaluation.read_output(path)
