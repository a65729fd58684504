"""tools/report.py: what it reads of whole, growing and broken files, and that its page shows text
as text and needs nothing but itself."""

import html.parser
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.report_files import (
    PageReader,
    metrics_line,
    page_of,
    rollout_line,
    text_line,
    write_lines,
    written_evaluation,
    written_run,
)
from tests.tiny_checkpoints import TOOLS

sys.path.insert(0, str(TOOLS))

import report
from reporting import charts, headline, intervals, reading, rollouts, tables
from reporting.markup import escaped, tag
from reporting.page import page

HOSTILE = "</style></title><script>alert('x')</script><img src=x onerror=alert(1)>\"'&lt;\u202e\0"
ALLOWED = {"http-equiv", "content", "name", "class", "id", "href", "title", "type", "value"}


@given(st.text())
def test_text_is_read_back_as_text_whatever_it_holds(text: str):
    shown = PageReader(tag("p", text, title=text, class_="a"))
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
    write_lines(folder / reading.METRICS, [metrics_line(1), metrics_line(2, **{HOSTILE: 1.0})])
    write_lines(folder / reading.SAMPLES, [old, rollout_line(2, 0, **texts, tokens=[HOSTILE] * 4)])
    write_lines(folder / reading.TEXTS, [text_line(2, tokens=[HOSTILE] * 19, tiers=[HOSTILE] * 19)])
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
    shown = PageReader(page(inputs, title=HOSTILE, written="today"))
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
    folder = written_run(tmp_path / "run")
    names = (reading.METRICS, reading.SAMPLES, reading.TEXTS)
    for number, name in enumerate(names):
        if number not in kept:
            (folder / name).unlink()
    shown = page_of(folder)
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
        written_run(whole)
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
    PageReader(page_of(cut))


KEYS = [
    *metrics_line(1),
    *rollout_line(1, 0),
    *text_line(1),
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
    write_lines(tmp_path / reading.METRICS, metrics)
    write_lines(tmp_path / reading.SAMPLES, samples)
    with write_lines(tmp_path / reading.TEXTS, texts).open("ab") as file:
        file.write(noise + b"\n")
    try:
        shown = page_of(tmp_path)
    except ValueError as error:
        shown, refused = "", str(error)
    else:
        refused = ""
    assert bool(shown) != ("not a line that a run of RMT wrote" in refused)
    assert "nan" not in "".join(v or "" for n, v in PageReader(shown).attributes if n == "d")
    shown.encode()


def test_a_resumed_run_replaces_what_it_writes_again(tmp_path: Path):
    first = [metrics_line(number, reward=0.1) for number in (1, 2, 3, 4)]
    again = [{"iteration": 2, "reward": 0.2, "new": 5.0}, metrics_line(3, reward=0.2)]
    write_lines(tmp_path / reading.METRICS, first + again)
    rows = [
        rollout_line(2, 0),
        rollout_line(2, 1),
        rollout_line(4, 0),
        rollout_line(2, 0),
        rollout_line(2, 1),
    ]
    write_lines(tmp_path / reading.SAMPLES, rows)
    write_lines(tmp_path / reading.TEXTS, [text_line(2), text_line(4), text_line(2)])
    (own,) = reading.read_inputs([str(tmp_path)]).runs
    assert own.known("reward") == [(1, 0.1), (2, 0.2), (3, 0.2)]
    assert own.known("new") == [(2, 5.0)]
    assert [step for step, _ in own.known("budget")] == [1, 3]
    assert {step: len(group) for step, group in own.rollouts.items()} == {2: 2}
    assert [*own.texts] == [2]


def test_lines_that_cannot_be_read_are_counted_and_the_others_are_shown(tmp_path: Path):
    path = write_lines(tmp_path / reading.METRICS, [metrics_line(1), metrics_line(2)])
    path.write_bytes(b"\0\0\n[1]\n" + path.read_bytes() + b'{"iteration": ')
    (own,) = reading.read_inputs([str(tmp_path)]).runs
    assert len(own.iterations) == 2
    assert own.problems == [
        f"{reading.METRICS}: left out 2 lines, the first of them 1, which cannot be read."
    ]
    assert "left out 2 lines" in page_of(tmp_path)


def test_rollouts_of_older_files_are_shown_without_what_they_lack(tmp_path: Path):
    names = ("iteration", "context", "truth", "thought", "prediction", "reward")
    rows = [{name: row[name] for name in names} for row in (rollout_line(1, 0), rollout_line(1, 1))]
    other = [row | {"truth": " was", "reward": 0.25} for row in rows]
    write_lines(tmp_path / reading.SAMPLES, rows + other)
    shown = page_of(tmp_path)
    (own,) = reading.read_inputs([str(tmp_path)]).runs
    groups = rollouts.groups_of(own.rollouts[1])
    assert [rollouts.has_variance(group) for group in groups] == [True, False]
    assert shown.count("no variance") == 1
    assert "advantage +" not in shown
    assert "✓" not in shown


def test_groups_are_told_by_place_the_best_come_first_and_those_without_variance_are_marked(
    tmp_path: Path,
):
    group = [rollout_line(1, number, advantage=0.0, token=18, reward=0.5) for number in range(2)]
    write_lines(
        tmp_path / reading.SAMPLES, [rollout_line(1, 0), group[0], rollout_line(1, 1), group[1]]
    )
    shown = PageReader(page_of(tmp_path)).text
    assert shown.count("no variance") == 1
    assert "1 of 2 right" in shown
    assert shown.index("✓ right") < shown.index("✗ wrong")


def test_a_chart_says_its_first_and_last_values_and_the_number_at_the_end(tmp_path: Path):
    rows = [{"iteration": number, "reward": 0.125 * number} for number in (1, 2, 3)]
    write_lines(tmp_path / reading.METRICS, rows)
    shown = page_of(tmp_path)
    assert "Reward. reward: 0.125 at step 1, 0.375 at step 3" in _spoken(shown)
    assert ">0.375</text>" in shown


def _spoken(shown: str) -> list[str]:
    return [value for name, value in PageReader(shown).attributes if name == "aria-label"]


def test_several_runs_share_the_charts_and_are_told_apart(tmp_path: Path):
    names = ("one", "two", "one")
    folders = [written_run(tmp_path / str(number) / name) for number, name in enumerate(names)]
    shown = page_of(f"first={folders[0]}", *folders[1:])
    text = PageReader(shown).text
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
        write_lines(tmp_path / str(number) / reading.METRICS, rows)
    shown = page_of(*(tmp_path / str(number) for number in range(runs)))
    paths = re.findall(r'<path class="line c(\d) d(\d)"', shown)
    assert len({*paths}) == len(paths) == 3 * runs
    assert len({dash for _, dash in paths}) == 3
    assert len({color for color, _ in paths}) == (3 if runs == 1 else runs)


def test_the_headline_has_the_values_and_intervals_of_the_evaluations(tmp_path: Path):
    paths = [written_evaluation(tmp_path / name) for name in ("before.json", "after.json")]
    shown = PageReader(page_of(*paths)).text.split("How often is the next token right?")[1]
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
    assert PageReader(verdict).text.startswith(words)
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
    write_lines(tmp_path / reading.METRICS, rows)
    shown = PageReader(page_of(f"mine={tmp_path}")).text
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
    shown = page_of(path)
    text = PageReader(shown).text
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
    shown = page_of(path)
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
        write_lines(tmp_path / run_name / reading.METRICS, rows)
    value = {"value": 0.25, "low": 0.125, "high": 0.5}
    study = tmp_path / "study.json"
    rows = [[name, value] for name in ("base", "RPT", "RMT")]
    study.write_text(json.dumps({"tables": [{"columns": ["arm", "a"], "rows": rows}]}))
    words = [
        f"{name}={written_evaluation(tmp_path / f'{name}.json')}" for name in ("base", "RPT", "RMT")
    ]
    words = [*words, *(f"{name}={tmp_path / name}" for name in ("RMT", "RPT")), str(study)]
    shown = page_of(*words)
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
    assert PageReader(said).text == (
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
    folder = written_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit, match=message):
        report.main([str(folder), *(flag.replace("RUN", str(folder)) for flag in flags)])
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
