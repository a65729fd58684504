"""tools/plot_curves.py: what it reads, what it draws, and what it says of bad input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "tools" / "plot_curves.py"
sys.path.insert(0, str(SCRIPT.parent))

from plot_curves import moving_average, plot_curves, read_metrics  # noqa: E402


def _write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_resumed_run_replaces_the_iterations_from_where_it_resumed(tmp_path):
    first = [{"iteration": i, "reward": 0.1} for i in (1, 2, 3, 4)]
    resumed = [{"iteration": i, "reward": 0.2} for i in (2, 3)]
    metrics = read_metrics(_write(tmp_path / "metrics.jsonl", first + resumed))
    np.testing.assert_array_equal(metrics["iteration"], [1, 2, 3])
    np.testing.assert_array_equal(metrics["reward"], [0.1, 0.2, 0.2])


def test_a_value_that_an_iteration_lacks_is_nan(tmp_path):
    records = [{"iteration": 1, "reward": 0.1}, {"iteration": 2, "entropy": None}]
    metrics = read_metrics(_write(tmp_path / "metrics.jsonl", records))
    np.testing.assert_array_equal(metrics["reward"], [0.1, np.nan])
    np.testing.assert_array_equal(metrics["entropy"], [np.nan, np.nan])


@pytest.mark.parametrize("window", [1, 3, 5])
def test_the_moving_average_equals_the_mean_of_the_values_in_the_window(window):
    values = np.array([4.0, 0.5, 1.0, 7.0, -2.0, 3.0, 1.5])
    half = window // 2
    expected = [values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))]
    np.testing.assert_allclose(moving_average(values, window), expected, rtol=1e-12)


def test_iterations_without_a_value_leave_no_gap_in_the_line(tmp_path):
    records = [{"iteration": i, "reward": 0.1 * i if i in (3, 5) else None} for i in range(1, 6)]
    figure = plot_curves(read_metrics(_write(tmp_path / "metrics.jsonl", records)))
    points, line = figure.axes[0].lines
    for drawn in (points, line):
        np.testing.assert_array_equal(drawn.get_xdata(), [3, 5])
        np.testing.assert_allclose(drawn.get_ydata(), [0.3, 0.5])


def test_each_metric_that_is_there_gets_a_panel_and_the_budget_goes_with_the_thought_length(
    tmp_path,
):
    records = [
        {"iteration": i, "thought length": 20.0 / i, "budget": 16 // i, "match rate": 0.1 * i}
        for i in (1, 2, 3)
    ]
    figure = plot_curves(read_metrics(_write(tmp_path / "metrics.jsonl", records)))
    panels = {axis.get_title(loc="left"): axis for axis in figure.axes}
    assert list(panels) == ["Next token predicted", "Thought"]
    drawn = [line.get_ydata().tolist() for line in panels["Thought"].lines]
    assert [16, 8, 5] in drawn
    assert [20.0, 10.0, 20.0 / 3] in drawn


def test_the_script_writes_a_picture(tmp_path):
    source = _write(tmp_path / "metrics.jsonl", [{"iteration": 1, "reward": 0.5}])
    target = tmp_path / "new" / "curves.png"
    subprocess.run([sys.executable, SCRIPT, source, "--output", target], check=True)
    with Image.open(target) as picture:
        assert picture.format == "PNG"
        assert len(np.unique(np.asarray(picture))) > 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no iteration yet"),
        ('{"iteration": 1}\n{"iteration": \n', "metrics.jsonl:2: not valid JSON"),
        ('{"reward": 1}\n', 'metrics.jsonl:1: not an object with an integer "iteration"'),
        ('{"iteration": 1}\n' + '{"a": ' * 100_000, "metrics.jsonl:2: brackets are nested"),
        ('{"iteration": 1, "other": 2}\n', "has none of match rate"),
    ],
)
def test_bad_input_is_one_sentence_and_no_traceback(tmp_path, text, message):
    source = tmp_path / "metrics.jsonl"
    source.write_text(text)
    run = subprocess.run(
        [sys.executable, SCRIPT, source, "--output", tmp_path / "curves.png"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_held_out_text_comes_first_no_place_is_empty_and_the_warm_up_is_shaded(tmp_path):
    names = {"held-out thought": 0.2, "held-out no thought": 0.1, "held-out next token": 0.3}
    records = [{"iteration": 0, **names}]
    for i in range(1, 7):
        warm = {"warm-up loss": 0.5} if i < 3 else {"warm-up loss": 0.0, "reward": 0.1 * i}
        records.append({"iteration": i, "ntp loss": 3.0, **warm, **(names if i % 3 == 0 else {})})
    figure = plot_curves(read_metrics(_write(tmp_path / "metrics.jsonl", records)))
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles[0] == "Held-out text: next token predicted"
    spans = [axis.get_subplotspec() for axis in figure.axes]
    grid = spans[0].get_gridspec()
    assert sum(len(one.colspan) * len(one.rowspan) for one in spans) == grid.nrows * grid.ncols
    for axis in figure.axes:
        (shade,) = axis.patches
        assert shade.get_x() + shade.get_width() == 2.5
        assert [text.get_text() for text in axis.texts] == ["warm-up"]
    assert figure.axes[0].lines[0].get_xdata().tolist() == [0, 3, 6]
