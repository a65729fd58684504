"""The page of a real run: its parts, in a browser, and while the run goes on."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import chromium
from tests.report_files import SCRIPT, PageReader, metrics_line, write_lines, written_evaluation
from tests.tiny_checkpoints import TOOLS
from tests.tiny_run import RMT, TinyInputs, run

sys.path.insert(0, str(TOOLS))

import report
from reporting import reading


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

            write_lines(folder / reading.METRICS, [metrics_line(1)])
            _until(lambda: shows("run</b>: 1 step<"))
            write_lines(folder / reading.METRICS, ["broken"])
            time.sleep(1.5)
            write_lines(folder / reading.METRICS, [metrics_line(1), metrics_line(2)])
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
    held_out = write_lines(folder / "held.jsonl", [{"text": "2 + 3 = 5, and 5 + 7 = 12. " * 4}] * 2)
    flags = ["--exit-interval", "3", "--rmt-log-samples-interval", "2"]
    flags += ["--rmt-eval-interval", "2", "--rmt-eval-data", str(held_out)]
    run(folder / "tiny", 1, [*inputs.flags(), *RMT, *flags])
    table = {"title": "A study of many columns", "columns": [f"column {n}" for n in range(20)]}
    # What cannot be broken between words must be broken in one.
    table["note"] = "w" * 300
    study = folder / "study.json"
    study.write_text(json.dumps({"tables": [table | {"rows": [["some words"] * 20] * 2}]}))
    evaluations = [written_evaluation(folder / name) for name in ("before.json", "after.json")]
    words = [folder / "tiny/metrics.jsonl", *evaluations, study]
    flags = ["--output", str(folder / "report.html"), "--title", "A title of " + "w" * 300]
    report.main([*map(str, words), *flags])
    return folder / "report.html"


@pytest.mark.multiprocess
def test_the_page_of_a_real_run_has_all_of_its_parts(report_of_a_run: Path):
    shown = report_of_a_run.read_text()
    text = PageReader(shown).text
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
    groups = [v for n, v in PageReader(shown).attributes if n == "id" and v.startswith("run0-")]
    assert len(groups) == len({*groups}) == 8
    links = {v[1:] for n, v in PageReader(shown).attributes if n == "href" and "run0-" in v}
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
