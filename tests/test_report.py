"""tools/report.py: what it reads of whole, growing and broken files, and that its page shows text
as text, needs nothing but itself, and fits the screens that it is read on."""

import html.parser
import itertools
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import chromium
from tests.tiny_run import RMT, TinyInputs, run

SCRIPT = Path(__file__).parents[1] / "tools" / "report.py"
sys.path.insert(0, str(SCRIPT.parent))

import report  # noqa: E402
from evaluation import Measured, Record, write_output  # noqa: E402
from reporting import charts, headline, intervals, reading, rollouts, tables  # noqa: E402
from reporting.markup import escaped, tag  # noqa: E402
from reporting.page import page  # noqa: E402

HOSTILE = "</style></title><script>alert('x')</script><img src=x onerror=alert(1)>\"'&lt;\u202e\0"
ALLOWED = {"http-equiv", "content", "name", "class", "id", "href", "title", "type", "value"}


class _Reader(html.parser.HTMLParser):
    """What a page holds: its tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def _page(*words: Path | str, waits: bool = False) -> str:
    inputs = reading.read_inputs([str(word) for word in words], waits=waits)
    return page(inputs, title="a title", written="today")


def _write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _metrics(iteration: int, **more: Any) -> dict[str, Any]:
    names = ("reward", "match rate", "budget", "thought length", "update seconds", "entropy")
    return {"iteration": iteration, **dict.fromkeys(names, 0.5 + 0.01 * iteration), **more}


def _rollout(iteration: int, number: int, **more: Any) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "context": "so the sum",
        "truth": " is 4",
        "thought": " 2+2",
        "prediction": " is",
        "reward": 0.1 * number,
        "advantage": number - 0.5,
        "right": number == 1,
        "sample": 3,
        "token": 17,
        "rollout": number,
        "entropy": 1.25,
        "thought_tokens": 2,
        "tokens": [" 2", "+2", "</think>", " is"],
        "log_probs": [-0.1, -2.5, None, -0.7],
        **more,
    }


def _text(iteration: int, **more: Any) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "sample": 3,
        "tokens": ["so"] * 18 + [" is"],
        "entropies": [None] + [0.25 * number for number in range(18)],
        "tiers": [None] * 18 + ["hard"],
        "chosen": [18],
        **more,
    }


def _run(folder: Path, steps: int = 3) -> Path:
    folder.mkdir(parents=True)
    numbers = range(1, steps + 1)
    _write(folder / reading.METRICS, [_metrics(number) for number in numbers])
    _write(folder / reading.SAMPLES, [_rollout(n, own) for n in numbers for own in range(2)])
    _write(folder / reading.TEXTS, [_text(number) for number in numbers])
    return folder


def _evaluation(path: Path) -> Path:
    """As evaluate.py writes it, of three documents."""
    settings = {
        "samples": 1,
        "seed": 1,
        "entropy_thresholds": [0.5, 1.0, 1.5],
        "load": "runs/x",
        "budget": 8,
    }
    draw = random.Random(path.name)
    records = []
    for line in range(1, 4):
        ways = ("thought", "no_thought")
        measured = {name: [draw.randint(0, 1) for _ in range(4)] for name in ways}
        measured |= {"swapped": [0] * 4, "thought_length": [3, 4, 5, 6]}
        measured |= {"well_formed": [1] * 4, "closed_by_itself": [1] * 4}
        record = Record("held.jsonl", line, str(line), 6, 0, "-33333", "010101", 9.0, [2, 3, 4, 5])
        records.append(Record(**{**vars(record), **measured}))
    write_output(path, Measured(settings, records), 1.0)
    return path


@given(st.text())
def test_text_is_read_back_as_text_whatever_it_holds(text: str):
    shown = _Reader(tag("p", text, title=text, class_="a"))
    assert shown.tags == ["p"]
    assert [name for name, _ in shown.attributes] == ["title", "class"]
    plain = escaped(text).encode().decode()
    assert shown.text == html.unescape(plain)
    assert len(shown.text) == len(text)
    kept = [(a, b) for a, b in zip(text, shown.text, strict=True) if a.isprintable() or a in "\n\t"]
    assert all(a == b or b == "\ufffd" for a, b in kept)
    for character in "<>\"'":
        assert character not in plain


def test_controls_marks_of_direction_and_halves_of_surrogate_pairs_are_shown_as_others():
    assert escaped("a\0\x1b\x7f\u202e\u2066\ud800\n\tb") == "a␀␛␡\ufffd\ufffd\ufffd\n\tb"


def test_nothing_that_a_file_says_becomes_markup(tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    texts = dict.fromkeys(("context", "truth", "thought", "prediction"), HOSTILE)
    tokens = {"tokens": [HOSTILE] * 4, "thought": HOSTILE}
    old = {"iteration": 1, **texts, "reward": 0.5}
    _write(folder / reading.METRICS, [_metrics(1), _metrics(2, **{HOSTILE: 1.0})])
    _write(folder / reading.SAMPLES, [old, _rollout(2, 0, **texts, tokens=[HOSTILE] * 4)])
    _write(folder / reading.TEXTS, [_text(2, tokens=[HOSTILE] * 19, tiers=[HOSTILE] * 19)])
    evaluation = tmp_path / "evaluation.json"
    value = {"value": 0.5, "low": 0.25, "high": 0.75}
    results = {"thought": {"average": value, HOSTILE: value}, HOSTILE: value}
    whose = {"load": HOSTILE, "entropy_thresholds": [HOSTILE] * 3}
    evaluation.write_text(json.dumps({"results": results, "settings": whose}))
    study = tmp_path / "study.json"
    table = {"title": HOSTILE, "note": HOSTILE, "columns": [HOSTILE], "rows": [[HOSTILE, value]]}
    study.write_text(json.dumps({"tables": [table]}))
    named = [f"{HOSTILE.replace('/', '').replace('=', '')}={folder}", evaluation, study]
    inputs = reading.read_inputs([str(word) for word in named])
    shown = _Reader(page(inputs, title=HOSTILE, written="today"))
    assert tokens["thought"] in HOSTILE
    assert not {"script", "img", "iframe", "object", "base", "form"} & {*shown.tags}
    assert shown.tags.count("style") == shown.tags.count("title") == 1
    names = {name for name, _ in shown.attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "style")]
    links = [value for name, value in shown.attributes if name == "href"]
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert shown.text.count("<script>alert('x')</script>") > 12


@pytest.mark.parametrize("kept", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_a_run_with_some_of_its_files_is_shown_as_far_as_it_goes(tmp_path: Path, kept: tuple):
    folder = _run(tmp_path / "run")
    names = (reading.METRICS, reading.SAMPLES, reading.TEXTS)
    for number, name in enumerate(names):
        if number not in kept:
            (folder / name).unlink()
    shown = _page(folder)
    assert ("<svg" in shown.split('id="curves"')[1].split("</section>")[0]) == (0 in kept)
    assert ('<li><div class="facts">' in shown) == (1 in kept)
    assert ('class="hard chosen"' in shown or 'hard chosen"' in shown) == (2 in kept)
    # A chosen token leads to its rollouts, if these are there.
    anchor = "run0-step3-sample3-token17"
    assert (f'href="#{anchor}"' in shown) == ({1, 2} <= {*kept})
    assert (f'id="{anchor}"' in shown) == (1 in kept)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_a_file_cut_off_anywhere_shows_the_lines_that_are_whole(
    tmp_path: Path, data: st.DataObject
):
    whole = tmp_path / "whole"
    if not whole.exists():
        _run(whole)
    cut = tmp_path / "cut"
    cut.mkdir(exist_ok=True)
    complete = {}
    for name in (reading.METRICS, reading.SAMPLES, reading.TEXTS):
        content = (whole / name).read_bytes()
        length = data.draw(st.integers(0, len(content)), label=name)
        (cut / name).write_bytes(content[:length])
        # Also a line that lacks nothing but its end.
        complete[name] = content[: length + 1].count(b"\n")
    (own,) = reading.read_inputs([str(cut)]).runs
    assert len(own.iterations) == complete[reading.METRICS]
    assert sum(map(len, own.rollouts.values())) == complete[reading.SAMPLES]
    assert len(own.texts) == complete[reading.TEXTS]
    assert own.problems == []
    _Reader(_page(cut))


KEYS = [
    *_metrics(1),
    *_rollout(1, 0),
    *_text(1),
    "warm-up loss",
    "held-out thought",
    "held-out gain",
]
NUMBERS = st.floats() | st.integers(-3, 4) | st.integers(-(2**70), 2**70)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=12), max_size=8)
MEASURED = st.lists(st.dictionaries(st.sampled_from(KEYS), NUMBERS, max_size=12), max_size=8)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=60,
    deadline=None,
)
@given(metrics=ROWS | MEASURED, samples=ROWS, texts=ROWS, noise=st.binary(max_size=20))
def test_any_lines_give_a_page_or_one_sentence(
    tmp_path: Path, metrics: list, samples: list, texts: list, noise: bytes
):
    for number, row in enumerate(metrics):
        row.setdefault("iteration", number)
    for row in (*samples, *texts):
        for name, value in {"iteration": 1, "thought": "x", "tokens": ["a"]}.items():
            row.setdefault(name, value)
        row.setdefault("entropies", [1.0])
    _write(tmp_path / reading.METRICS, metrics)
    _write(tmp_path / reading.SAMPLES, samples)
    with _write(tmp_path / reading.TEXTS, texts).open("ab") as file:
        file.write(noise + b"\n")
    try:
        shown = _page(tmp_path)
    except ValueError as error:
        shown, refused = "", str(error)
    else:
        refused = ""
    assert bool(shown) != ("not a line that a run of RMT wrote" in refused)
    assert "nan" not in "".join(v or "" for n, v in _Reader(shown).attributes if n == "d")
    shown.encode()


def test_a_resumed_run_replaces_what_it_writes_again(tmp_path: Path):
    first = [_metrics(number, reward=0.1) for number in (1, 2, 3, 4)]
    again = [{"iteration": 2, "reward": 0.2, "new": 5.0}, _metrics(3, reward=0.2)]
    _write(tmp_path / reading.METRICS, first + again)
    rows = [_rollout(2, 0), _rollout(2, 1), _rollout(4, 0), _rollout(2, 0), _rollout(2, 1)]
    _write(tmp_path / reading.SAMPLES, rows)
    _write(tmp_path / reading.TEXTS, [_text(2), _text(4), _text(2)])
    (own,) = reading.read_inputs([str(tmp_path)]).runs
    assert own.known("reward") == [(1, 0.1), (2, 0.2), (3, 0.2)]
    assert own.known("new") == [(2, 5.0)]
    assert [step for step, _ in own.known("budget")] == [1, 3]
    assert {step: len(group) for step, group in own.rollouts.items()} == {2: 2}
    assert [*own.texts] == [2]


def test_lines_that_cannot_be_read_are_counted_and_the_others_are_shown(tmp_path: Path):
    path = _write(tmp_path / reading.METRICS, [_metrics(1), _metrics(2)])
    path.write_bytes(b"\0\0\n[1]\n" + path.read_bytes() + b'{"iteration": ')
    (own,) = reading.read_inputs([str(tmp_path)]).runs
    assert len(own.iterations) == 2
    assert own.problems == [
        f"{reading.METRICS}: left out 2 lines, the first of them 1, which cannot be read."
    ]
    assert "left out 2 lines" in _page(tmp_path)


def test_rollouts_of_older_files_are_shown_without_what_they_lack(tmp_path: Path):
    names = ("iteration", "context", "truth", "thought", "prediction", "reward")
    rows = [{name: row[name] for name in names} for row in (_rollout(1, 0), _rollout(1, 1))]
    other = [row | {"truth": " was", "reward": 0.25} for row in rows]
    _write(tmp_path / reading.SAMPLES, rows + other)
    shown = _page(tmp_path)
    (own,) = reading.read_inputs([str(tmp_path)]).runs
    groups = rollouts.groups_of(own.rollouts[1])
    assert [rollouts.has_variance(group) for group in groups] == [True, False]
    assert shown.count("no variance") == 1
    assert "advantage +" not in shown
    assert "✓" not in shown


def test_groups_are_told_by_place_the_best_come_first_and_those_without_variance_are_marked(
    tmp_path: Path,
):
    group = [_rollout(1, number, advantage=0.0, token=18, reward=0.5) for number in range(2)]
    _write(tmp_path / reading.SAMPLES, [_rollout(1, 0), group[0], _rollout(1, 1), group[1]])
    shown = _Reader(_page(tmp_path)).text
    assert shown.count("no variance") == 1
    assert "1 of 2 right" in shown
    assert shown.index("✓ right") < shown.index("✗ wrong")


def test_a_chart_says_its_first_and_last_values_and_the_number_at_the_end(tmp_path: Path):
    rows = [{"iteration": number, "reward": 0.125 * number} for number in (1, 2, 3)]
    _write(tmp_path / reading.METRICS, rows)
    shown = _page(tmp_path)
    assert "Reward. reward: 0.125 at step 1, 0.375 at step 3" in _spoken(shown)
    assert ">0.375</text>" in shown


def _spoken(shown: str) -> list[str]:
    return [value for name, value in _Reader(shown).attributes if name == "aria-label"]


def test_several_runs_share_the_charts_and_are_told_apart(tmp_path: Path):
    names = ("one", "two", "one")
    folders = [_run(tmp_path / str(number) / name) for number, name in enumerate(names)]
    shown = _page(f"first={folders[0]}", *folders[1:])
    text = _Reader(shown).text
    assert "first: 3 steps" in text
    assert "two: 3 steps" in text
    (reward,) = [one for one in _spoken(shown) if one.startswith("Reward. ")]
    assert reward.count("at step 1") == 3
    inputs = reading.read_inputs([str(folders[0]), str(folders[2])])
    assert [one.name for one in inputs.runs] == [str(folders[0]), str(folders[2])]


@pytest.mark.parametrize("runs", [1, 2])
def test_no_two_lines_of_a_chart_are_told_by_their_color_alone(tmp_path: Path, runs: int):
    """One run has a color and a dash for each metric; of several, a run has a color, a metric a
    dash."""
    names = ("held-out thought", "held-out no thought", "held-out next token")
    rows = [{"iteration": step, **dict.fromkeys(names, 0.1 * step)} for step in (0, 1)]
    for number in range(runs):
        (tmp_path / str(number)).mkdir()
        _write(tmp_path / str(number) / reading.METRICS, rows)
    shown = _page(*(tmp_path / str(number) for number in range(runs)))
    paths = re.findall(r'<path class="line c(\d) d(\d)"', shown)
    assert len({*paths}) == len(paths) == 3 * runs
    assert len({dash for _, dash in paths}) == 3
    assert len({color for color, _ in paths}) == (3 if runs == 1 else runs)


def test_the_headline_has_the_values_and_intervals_of_the_evaluations(tmp_path: Path):
    paths = [_evaluation(tmp_path / name) for name in ("before.json", "after.json")]
    shown = _Reader(_page(*paths)).text.split("How often is the next token right?")[1]
    for path in paths:
        results = json.loads(path.read_text())["results"]
        value = results["thought"]["average"]
        numbers = (100 * value[key] for key in ("value", "low", "high"))
        assert "{:.1f} % [{:.1f}, {:.1f}]".format(*numbers) in shown
        length = results["thought_length"]
        assert "{:.1f} [{:.1f}, {:.1f}]".format(*map(length.get, ("value", "low", "high"))) in shown
    assert "Measured by evaluate.py on 3 held-out documents" in shown


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        ((0.2, 0.1, 0.3), "A thought helps: +20.0 [+10.0, +30.0] points against an empty one."),
        ((-0.2, -0.3, -0.1), "A thought harms: -20.0"),
        ((0.2, -0.1, 0.5), "Whether a thought helps cannot be told: "),
    ],
)
def test_a_verdict_needs_an_interval_without_zero(gap: tuple, words: str):
    one = headline.Standing("x", {"thought_minus_no_thought": reading.Estimate(*gap)})
    (verdict,) = headline.verdicts(one)
    assert _Reader(verdict).text.startswith(words)
    unknown = headline.Standing("x", {"thought_minus_no_thought": reading.Estimate(gap[0])})
    assert headline.verdicts(unknown) == []


@pytest.mark.parametrize(("share", "count"), [(0.0, 5), (0.1, 40), (0.5, 7), (1.0, 12)])
def test_wilsons_interval_is_where_the_share_is_1_96_standard_errors_away(share: float, count: int):
    found = headline.wilson(share, count)
    for end in (found.low, found.high):
        if 0 < end < 1:
            away = abs(share - end) / np.sqrt(end * (1 - end) / count)
            np.testing.assert_allclose(away, 1.959964, rtol=1e-9)
        else:
            assert end == share


def test_without_an_evaluation_the_headline_is_what_the_run_measured_first_and_last(tmp_path: Path):
    rows = [
        {"iteration": step, "held-out thought": 0.1 * step, "held-out positions": 40}
        for step in (0, 2, 4)
    ]
    _write(tmp_path / reading.METRICS, rows)
    shown = _Reader(_page(f"mine={tmp_path}")).text
    first, last = (intervals.shown(headline.wilson(x, 40), 100.0, " %") for x in (0.0, 0.4))
    assert f"mine, step 0{first}mine, step 4{last}" in shown
    assert "as if these were independent" in shown


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40), st.sampled_from([1, 3, 5, 9]))
def test_a_smooth_line_has_the_mean_of_the_values_in_its_window(values: list[float], window: int):
    points = list(enumerate(values))
    half = window // 2
    expected = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    found = charts.smoothed(points, window)
    np.testing.assert_allclose([value for _, value in found], expected, atol=1e-9)
    assert [step for step, _ in found] == [*range(len(values))]


@given(st.integers(1, 2000), st.integers(2, 50))
def test_thinned_points_keep_the_first_and_the_last(count: int, most: int):
    points = [(float(index), 0.0) for index in range(count)]
    found = charts.thinned(points, most)
    assert len(found) == min(count, most)
    assert (found[0], found[-1]) == (points[0], points[-1])
    assert found == sorted({*found})


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_enclose_the_values(low: float, width: float):
    marks = charts.ticks(low, low + width)
    slack = 1e-6 * width
    assert marks[0] <= low + slack
    assert marks[-1] >= low + width - slack
    assert 2 <= len(marks) <= 7
    assert marks == sorted({*marks})


@given(st.lists(st.floats(0, charts.HEIGHT), max_size=8))
def test_labels_at_the_ends_of_lines_do_not_overlap_and_keep_their_order(heights: list[float]):
    found = charts._apart([(height, number) for number, height in enumerate(heights)])
    placed = [height for height, _ in found]
    assert all(b - a > 12.99 for a, b in itertools.pairwise(placed))
    assert [heights[number] for _, number in found] == sorted(heights)
    assert all(height <= charts.HEIGHT for height in placed)


def test_a_studys_tables_are_shown_as_they_are(tmp_path: Path):
    path = tmp_path / "study.json"
    value = {"value": 0.25, "low": 0.125, "high": 0.5}
    rows = [["RMT", value, 12345.5, None], ["short"], ["more", 1, 2, 3, 4]]
    table = {"title": "Arms", "note": "Three seeds.", "columns": ["arm", "a", "b"], "rows": rows}
    path.write_text(json.dumps({"tables": [table]}))
    shown = _page(path)
    text = _Reader(shown).text
    assert "ArmsaRMT0.2 [0.1, 0.5]" in text
    assert "armabRMT0.250 [0.125, 0.500]12,345.5" in text
    assert "Three seeds." in text
    assert shown.count("<tr>") == 4
    assert shown.count("<th ") == 5 + 3


def _table(**columns: list[Any]) -> reading.Table:
    rows = [["RMT", *own] for own in zip(*columns.values(), strict=True)]
    return reading.Table("Arms", "", ["arm", *columns], rows)


def test_a_study_is_charted_by_its_first_two_columns_of_one_unit():
    one, other, below = (reading.Estimate(x, x - 0.1, x + 0.1) for x in (0.3, 0.4, 0.05))
    both = _table(
        **{"seeds": [3], "thought, %": [one], "log p, nats": [one], "at once, %": [other]}
    )
    assert tables.charted(both) == {"thought, %": [("RMT", one)], "at once, %": [("RMT", other)]}
    more = _table(**{"a, %": [one], "b, %": [other], "c, %": [below]})
    assert [*tables.charted(more)] == ["a, %", "b, %"]
    assert tables.charted(_table(**{"a, %": [one], "b, %": [below]})) == {}, "a difference"
    assert tables.charted(_table(steps=[40])) == {}


def test_a_study_alone_comes_first_and_does_not_say_that_nothing_was_measured(tmp_path: Path):
    path = tmp_path / "study.json"
    path.write_text(json.dumps({"tables": [{"columns": ["arm", "a"], "rows": [["RMT", 1]]}]}))
    shown = _page(path)
    assert re.findall(r'<section id="(\w+)"', shown) == ["study"]
    assert "Nothing was measured" not in shown
    assert re.search(r'<a href="#(\w+)" class="skip"', shown)[1] == "study"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (reading.Estimate(29.7, 22.9, 37.0), "29.7 [22.9, 37.0]"),
        (reading.Estimate(100.0, 100.0, 100.0), "100 [100, 100]"),
        (reading.Estimate(2.5e-7, 1e-7, 3e-7), "2.5e-07 [1e-07, 3e-07]"),
        (reading.Estimate(8.0), "8"),
        (89204.0, "89,204"),
        (None, ""),
        ("words", "words"),
    ],
)
def test_a_value_and_its_interval_have_as_many_decimals(value: Any, text: str):
    assert tables.cell(value) == text


def test_a_name_has_one_color_on_the_whole_page_and_stands_once_in_the_title(tmp_path: Path):
    names = {"match rate": 0.5, "well-formed rate": 0.5}
    for run_name in ("RMT", "RPT"):
        (tmp_path / run_name).mkdir()
        rows = [{"iteration": step, **names} for step in (1, 2)]
        _write(tmp_path / run_name / reading.METRICS, rows)
    value = {"value": 0.25, "low": 0.125, "high": 0.5}
    study = tmp_path / "study.json"
    rows = [[name, value] for name in ("base", "RPT", "RMT")]
    study.write_text(json.dumps({"tables": [{"columns": ["arm", "a"], "rows": rows}]}))
    words = [f"{name}={_evaluation(tmp_path / f'{name}.json')}" for name in ("base", "RPT", "RMT")]
    words = [*words, *(f"{name}={tmp_path / name}" for name in ("RMT", "RPT")), str(study)]
    shown = _page(*words)
    bars = r'class="who">(\w+)</span><svg[^>]*>.*?class="[^"]*\bc(\d)'
    lines = r'class="line c(\d) d0"[^>]*></line></svg>(R\w+)</li>'
    found = set(re.findall(bars, shown)) | {(name, c) for c, name in re.findall(lines, shown)}
    assert found == {("RMT", "0"), ("RPT", "1"), ("base", "2")}
    report.main([*words, "--output", str(tmp_path / "out.html")])
    assert "<h1>RMT: RMT, RPT, base</h1>" in (tmp_path / "out.html").read_text()


def test_of_several_models_the_page_says_first_which_is_right_most_often():
    def standing(name: str, share: float) -> headline.Standing:
        return headline.Standing(name, {"thought": reading.Estimate(share, share - 0.1, 0.9)})

    (said,) = headline.best([standing("old", 0.5), standing("good", 0.75), standing("new", 0.25)])
    assert _Reader(said).text == (
        "Right most often after its thought: good, 75.0 % [65.0, 90.0]; old 50.0 % [40.0, 90.0], "
        "new 25.0 % [15.0, 90.0]."
    )
    assert headline.best([standing("only", 0.5)]) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file or folder"),
        ({}, "holds none of rmt_metrics.jsonl"),
        ({"rmt_metrics.jsonl": "hello\n"}, "rmt_metrics.jsonl:1: not a line that a run of RMT"),
        ({"rmt_metrics.jsonl": '{"a": 1}\n'}, "rmt_metrics.jsonl:1: not a line that a run"),
        ({"x.json": "[1]"}, "x.json is not one JSON object"),
        ({"x.json": '{"a": ' * 100_000}, "x.json is not one JSON object"),
        ({"x.json": '{"a": 1}'}, 'x.json has neither "results"'),
        ({"x.json": '{"tables": [1]}'}, 'x.json: each of its tables must have "columns"'),
        ({"x.json": '{"tables": [{"columns": [], "rows": [1]}]}'}, "each of its tables must"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, content: dict | None, message: str):
    folder = tmp_path / "in"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    one = next(folder.glob("*.json"), folder) if content else folder
    with pytest.raises(SystemExit) as end:
        report.main([str(one), "--output", str(tmp_path / "out.html")])
    assert message in str(end.value)
    assert str(end.value).startswith("report.py: ")
    assert "\n" not in str(end.value)
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "RUN/rmt_metrics.jsonl"], "name a file that ends in .html"),
        (["--output", "RUN"], "name a file that ends in .html"),
        (["--output", "RUN/rmt_metrics.jsonl/x.html"], "cannot be written: "),
        (["--output", "x.html", "--watch", "0.5"], "--watch is 0.5; pass 1 to 86400 seconds"),
        (["--output", "x.html", "--watch", "nan"], "--watch is nan; pass 1 to 86400 seconds"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused_and_no_file_of_a_run_changes(
    tmp_path: Path, flags: list[str], message: str
):
    folder = _run(tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit, match=message):
        report.main([str(folder), *(flag.replace("RUN", str(folder)) for flag in flags)])
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_script_watches_a_run_and_its_page_is_whole_at_any_time(tmp_path: Path):
    folder, output = tmp_path / "run", tmp_path / "report.html"
    folder.mkdir()
    words = [sys.executable, SCRIPT, folder, "--output", output, "--watch", "1"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            _until(output.exists)
            assert "No step has been written yet" in output.read_text()
            seen = set()

            def shows(words: str) -> bool:
                text = output.read_text()
                seen.add(text.endswith("</html>\n"))
                return words in text

            _write(folder / reading.METRICS, [_metrics(1)])
            _until(lambda: shows("run</b>: 1 step<"))
            _write(folder / reading.METRICS, ["broken"])
            time.sleep(1.5)
            _write(folder / reading.METRICS, [_metrics(1), _metrics(2)])
            _until(lambda: shows("run</b>: 2 steps"))
            assert process.poll() is None
        finally:
            process.kill()
        assert seen == {True}
        assert process.stderr.read().count("not a line that a run of RMT wrote") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]


def _until(is_so: Any, patience: float = 60.0) -> None:
    deadline = time.monotonic() + patience
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def report_of_a_run(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a real run of three steps, with two evaluations and a study."""
    folder = tmp_path_factory.mktemp("report")
    held_out = _write(folder / "held.jsonl", [{"text": "2 + 3 = 5, and 5 + 7 = 12. " * 4}] * 2)
    flags = ["--exit-interval", "3", "--rmt-log-samples-interval", "2"]
    flags += ["--rmt-eval-interval", "2", "--rmt-eval-data", str(held_out)]
    run(folder / "tiny", 1, [*inputs.flags(), *RMT, *flags])
    table = {"title": "A study of many columns", "columns": [f"column {n}" for n in range(20)]}
    # What cannot be broken between words must be broken in one.
    table["note"] = "w" * 300
    study = folder / "study.json"
    study.write_text(json.dumps({"tables": [table | {"rows": [["some words"] * 20] * 2}]}))
    evaluations = [_evaluation(folder / name) for name in ("before.json", "after.json")]
    words = [folder / "tiny/metrics.jsonl", *evaluations, study]
    flags = ["--output", str(folder / "report.html"), "--title", "A title of " + "w" * 300]
    report.main([*map(str, words), *flags])
    return folder / "report.html"


@pytest.mark.multiprocess
def test_the_page_of_a_real_run_has_all_of_its_parts(report_of_a_run: Path):
    shown = report_of_a_run.read_text()
    text = _Reader(shown).text
    places = ("headline", "study", "curves", "uncertainty", "rollouts", "throughput", "evaluations")
    assert [place for place in places if f'<section id="{place}"' in shown] == [*places]
    assert "tiny: 3 steps" in text
    titles = (
        "Held-out text: right next tokens",
        "Budget and thought length, tokens",
        "Answers of the rollouts",
        "Tiers of the chosen positions",
        "Entropy of the next token, nats",
    )
    assert all(title in text for title in titles)
    # Four positions in steps 1 and 3; each of those in the text leads to its group.
    groups = [v for n, v in _Reader(shown).attributes if n == "id" and v.startswith("run0-")]
    assert len(groups) == len({*groups}) == 8
    links = {v[1:] for n, v in _Reader(shown).attributes if n == "href" and "run0-" in v}
    assert links
    assert links <= {*groups}
    assert len(shown) < 500_000


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    program = chromium.installed()
    if program is None:
        pytest.skip("no Chromium is installed")
    with chromium.browser(program, tmp_path_factory.mktemp("profile")) as page_of_it:
        yield page_of_it


OVERFLOWING = """[...document.querySelectorAll("body *")].filter(one => !one.closest(".wide")
    && one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML.slice(0, 99))"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_it_without_a_complaint_a_request_or_a_sideways_scroll(
    report_of_a_run: Path, tab: chromium.Page, width: int, dark: bool
):
    tab.complaints.clear()
    tab.requests.clear()
    tab.open(report_of_a_run, width, dark=dark, mobile=width < 600)
    tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert tab.evaluate(OVERFLOWING) == []
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
    assert tab.complaints == []
    assert [url for url in tab.requests if url != report_of_a_run.resolve().as_uri()] == []


@pytest.mark.multiprocess
def test_the_keyboard_reaches_the_folds_opens_them_and_changes_the_colours(
    report_of_a_run: Path, tab: chromium.Page
):
    tab.open(report_of_a_run, 1280)
    assert tab.evaluate("document.querySelector('details').open") is False
    reached = set()
    for _ in range(80):
        tab.press("Tab", 9)
        where = "document.activeElement"
        reached.add(tab.evaluate(f"{where}.tagName"))
        if tab.evaluate(f"{where}.tagName") == "SUMMARY":
            tab.press("Enter", 13)
            break
        if tab.evaluate(f"{where}.id") == "auto":
            tab.press("ArrowRight", 39)
            tab.press("ArrowRight", 39)
    assert {"A", "INPUT", "SUMMARY"} <= reached
    assert tab.evaluate("document.activeElement.parentElement.open") is True
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(20, 23, 27)"


@pytest.mark.multiprocess
def test_the_page_lets_no_script_run_whatever_gets_into_it(
    report_of_a_run: Path, tab: chromium.Page, tmp_path: Path
):
    broken = tmp_path / "broken.html"
    script = "<script>document.title = 'run'</script><img src='http://127.0.0.1:9/x.png'>"
    broken.write_text(report_of_a_run.read_text().replace("<main>", f"<main>{script}", 1))
    tab.open(broken, 1280)
    assert tab.evaluate("document.title") != "run"
