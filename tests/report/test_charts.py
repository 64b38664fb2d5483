"""What the charts show, read off the artists; and that nothing is cut off."""

import io

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from pipeline.report.charts import COLOURS, Method, Series, chart_png, score_chart, speed_chart, spread


def method(name, score, speed, parameters, key="slotmatch"):
    return Method(name, COLOURS[key], score, speed, parameters)


TEACHER = method("Teacher", 42.4, 35, 470_000, "teacher")
STUDENTS = [
    method("Student (no KD)", 36.6, 74, 130_000, "no_kd"),
    method("SlotMatch (ours)", 36.0, 75, 130_000),
    method("SlotMatch + Reconstruction KD", 36.3, 76, 130_000, "slotmatch_reconstruction_kd"),
]
BASELINES = {"one slot": 8.5, "grid": 29.0, "colour k-means of $5$ colours": 28.8}


def boxes(figure):
    """Where each text of the axes stands, in pixels."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    axes = figure.axes[0]
    found = {text.get_text(): Text.get_window_extent(text, renderer) for text in axes.texts}  # without arrows
    for text in axes.get_legend().get_texts():
        found[f"legend {text.get_text()}"] = text.get_window_extent(renderer)
    return found


def test_one_labelled_circle_a_method_with_area_by_parameters():
    axes = speed_chart([TEACHER, *STUDENTS], BASELINES, "video mBO").axes[0]
    circles = {c.get_label(): c for c in axes.collections if not c.get_label().startswith("_")}
    assert set(circles) == {m.name for m in (TEACHER, *STUDENTS)}
    for m in (TEACHER, *STUDENTS):
        np.testing.assert_allclose(circles[m.name].get_offsets(), [[m.frames_per_second, m.score]])
        area = circles[m.name].get_sizes()[0] / circles["Teacher"].get_sizes()[0]
        assert area == pytest.approx(m.parameters / TEACHER.parameters)
    texts = [text.get_text() for text in axes.texts]
    assert all(texts.count(m.name) == 1 for m in (TEACHER, *STUDENTS))
    # The legend's circles are to the same scale: their diameter is the root of the area.
    legend = axes.get_legend()
    handles = zip(legend.legend_handles, legend.texts, strict=True)
    sizes = {text.get_text(): handle.get_markersize() for handle, text in handles}
    assert len(sizes) == 3
    scale = circles["Teacher"].get_sizes()[0] / TEACHER.parameters
    assert sizes["100 k"] ** 2 == pytest.approx(100_000 * scale)


def test_baselines_are_dashed_lines_with_their_score():
    axes = speed_chart([TEACHER, *STUDENTS], BASELINES, "video mBO").axes[0]
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert sorted(line.get_ydata()[0] for line in dashed) == sorted(BASELINES.values())
    texts = " ".join(text.get_text() for text in axes.texts)
    assert "one slot 8.5" in texts
    low, high = axes.get_ylim()
    assert low < 8.5
    assert high > 42.4


@pytest.mark.parametrize(
    "methods", [[TEACHER], STUDENTS[:1], [TEACHER, *STUDENTS], [*STUDENTS, *STUDENTS[:1]]]
)
def test_no_label_is_cut_off_or_covers_another(methods):
    figure = speed_chart(methods, BASELINES, "video mBO")
    width, height = figure.canvas.get_width_height()
    found = boxes(figure)
    for text, box in found.items():
        assert 0 <= box.x0 <= box.x1 <= width, text
        assert 0 <= box.y0 <= box.y1 <= height, text
    names = list(found)
    for i, one in enumerate(names):
        for two in names[i + 1 :]:
            assert not found[one].overlaps(found[two]), (one, two)


def test_labels_are_moved_apart_but_no_more_than_that():
    assert spread([0, 30, 60], 10) == [0, 0, 0]
    shifts = spread([0, 4], 10)
    assert shifts == pytest.approx([-3, 3], abs=0.05)
    assert spread([5, 5], 10, [(0, 1), (2, 3)]) == [0, 0]
    places = np.sort(np.array([5, 5, 5, 6, 30]) + spread([5, 5, 5, 6, 30], 10))
    assert np.diff(places).min() > 9.9


def series(name, values, key):
    return Series(name, COLOURS[key], np.array(values, float), float(np.nanmean(values)))


def test_videos_are_sorted_by_the_first_method_and_others_follow():
    ours = series("SlotMatch", [30, np.nan, 10, 20], "slotmatch")
    teacher = series("Teacher", [33, 5, np.nan, 22], "teacher")
    axes = score_chart([ours, teacher], "video mBO").axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    expected = {"SlotMatch, mean 20.0": [10, 20, 30], "Teacher, mean 20.0": [np.nan, 22, 33]}
    for label, scores in expected.items():
        np.testing.assert_array_equal(lines[label].get_ydata(), scores)
    assert [t.get_text() for t in axes.get_legend().get_texts()] == list(expected)


@pytest.mark.parametrize("videos", [1, 5, 500])
def test_charts_are_as_wide_as_a_page_and_small(videos):
    rng = np.random.default_rng(0)
    many = [series(key, rng.uniform(0, 100, videos), key) for key in COLOURS]
    for figure in (score_chart(many, "video mBO"), speed_chart([TEACHER, *STUDENTS], {}, "video mBO")):
        content = chart_png(figure)
        assert len(content) < 500_000
        with Image.open(io.BytesIO(content)) as image:
            assert image.width == 1400
