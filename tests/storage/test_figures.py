"""Figures of a run: what they show, and that they are there whole."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from cilnorm.storage.figures import (
    accuracy_figure,
    classes_figure,
    curves_figure,
    draw_figures,
    matrix_figure,
    save,
)

ROWS = [[90.0], [50.0, 80.0], [30.0, 40.0, 95.0]]


def test_the_accuracy_figure_has_both_lines() -> None:
    [axes] = accuracy_figure(ROWS, "a title").axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["newest task"].get_ydata()) == [90.0, 80.0, 95.0]
    assert list(lines["mean of all seen tasks"].get_ydata()) == [90.0, 65.0, 55.0]
    assert list(lines["newest task"].get_xdata()) == [1, 2, 3]
    assert axes.get_title() == "a title"
    assert axes.get_ylim() == (0, 100)


def test_the_matrix_figure_shows_the_lower_triangle_with_its_values() -> None:
    axes = matrix_figure([[90.0], [50.25, 80.0], [30.0, 40.0, 95.0]], "a title").axes[0]
    shown = axes.get_images()[0].get_array()
    assert np.ma.getmaskarray(shown).tolist() == [[False, True, True], [False, False, True], [False, False, False]]
    assert sorted(text.get_text() for text in axes.texts) == sorted(["90.0", "50.3", "80.0", "30.0", "40.0", "95.0"])


@pytest.mark.parametrize("rows", [[[50.0]], ROWS, [[1.0] * (t + 1) for t in range(25)]])
def test_figures_are_written(rows: list[list[float]], tmp_path: Path) -> None:
    paths = draw_figures(tmp_path, rows, "a $ title_{ with [odd] signs")
    names = ["accuracy.pdf", "accuracy.png", "matrix.pdf", "matrix.png"]
    assert sorted(path.name for path in paths) == sorted(os.listdir(tmp_path)) == names
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF"}
    assert all(path.read_bytes().startswith(starts[path.suffix]) for path in paths)
    before = {path: path.read_bytes() for path in paths}
    draw_figures(tmp_path, rows, "a $ title_{ with [odd] signs")
    assert {path: path.read_bytes() for path in paths} == before  # nothing in them depends on the time


def test_a_figure_drawn_again_is_the_same_file_in_every_format(tmp_path: Path) -> None:
    figure = accuracy_figure(ROWS, "title")
    first = [path.read_bytes() for path in save(figure, tmp_path, "one")]
    assert [path.read_bytes() for path in save(figure, tmp_path, "two")] == first
    assert sorted(os.listdir(tmp_path))[:3] == ["one.pdf", "one.png", "one.svg"]


def test_curves_differ_in_their_marker_as_well_as_in_their_colour() -> None:
    series = {str(number): [[(1.0, 40.0), (2.0, 60.0)]] for number in range(20)}
    axes = curves_figure(series, "tasks", "accuracy (%)", limits=(0, 100)).axes[0]
    looks = [(line.get_color(), line.get_marker()) for line in axes.get_lines()]
    assert len({marker for _, marker in looks[:8]}) == 8
    assert len(set(looks)) == 20
    assert axes.get_ylim() == (0, 100)
    assert all(tick == round(tick) for tick in axes.get_xticks())


def test_drawing_needs_no_display_and_keeps_no_figure_open(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    draw_figures(tmp_path, ROWS, "title")
    assert plt.get_fignums() == []


def test_the_figure_against_classes_has_the_accuracy_on_all_of_them() -> None:
    [axes] = classes_figure(ROWS, (50, 10, 10), "a title").axes
    [line] = axes.get_lines()
    assert list(line.get_xdata()) == [50, 60, 70]
    assert list(line.get_ydata()) == pytest.approx([90, (50 * 50 + 10 * 80) / 60, (50 * 30 + 10 * 40 + 10 * 95) / 70])
    assert axes.get_xlabel() == "classes seen"
    means = accuracy_figure(ROWS, "a title", (50, 10, 10)).axes[0].get_lines()[1]
    assert list(means.get_ydata()) == list(line.get_ydata())


def test_the_figure_against_classes_is_written_with_the_others(tmp_path: Path) -> None:
    draw_figures(tmp_path, ROWS, "title", (50, 10, 10))
    assert sorted(os.listdir(tmp_path)) == [f"{name}.{kind}" for name in ("accuracy", "classes", "matrix")
                                            for kind in ("pdf", "png")]  # fmt: skip
