"""The figures of a run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cilnorm.files import write_atomically
from cilnorm.metrics import as_matrix, average_per_task
from cilnorm.text import half_up

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "MARKERS",
    "PERCENT",
    "accuracy_figure",
    "bars_figure",
    "classes_figure",
    "curves_figure",
    "draw_figures",
    "matrix_figure",
    "save",
]

Points = Sequence[tuple[float, float]]
# Eight colours that people with any colour vision can distinguish; a marker besides, for black and white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8578f", "#b98200", "#3d9ad1", "#7a5195", "#6b7280")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
PERCENT = (0.0, 100.0)
UNDATED = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}  # the same figure is the same file
BLUE, GREY = "#2a6fbb", "#8a8f98"


def accuracy_figure(rows: Sequence[Sequence[float]], title: str, sizes: Sequence[int] = ()) -> Figure:
    """Mean accuracy over the seen tasks after each task, and the accuracy on each task right after learning it.

    Args:
        sizes: classes of each task, see ``cilnorm.metrics.average_per_task``.
    """
    from matplotlib.figure import Figure

    matrix = as_matrix(rows)
    tasks = np.arange(1, len(matrix) + 1)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.plot(tasks, np.diag(matrix), "s--", color=GREY, markersize=4, label="newest task")
    axes.plot(tasks, average_per_task(matrix, sizes), "o-", color=BLUE, linewidth=2, label="mean of all seen tasks")
    axes.set(xlabel="tasks learned", ylabel="accuracy (%)", xticks=tasks, ylim=(0, 100), title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def matrix_figure(rows: Sequence[Sequence[float]], title: str) -> Figure:
    """The accuracy matrix: row t, column u is the accuracy on task u after learning task t."""
    from matplotlib.figure import Figure

    matrix = as_matrix(rows)
    tasks = len(matrix)
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    axes = figure.subplots()
    shown = np.ma.masked_where(np.triu(np.ones_like(matrix), 1) > 0, matrix)
    image = axes.imshow(shown, vmin=0, vmax=100, cmap="viridis")
    if tasks <= 20:
        for (t, u), value in np.ndenumerate(matrix):
            if u <= t:
                ink = "white" if value < 60 else "black"
                size = min(8.0, 100 / tasks)  # points; 100.0 fits into its cell
                axes.text(u, t, half_up(value), ha="center", va="center", color=ink, fontsize=size)
    labels = [str(task) for task in range(1, tasks + 1)]
    axes.set_xticks(range(tasks), labels)
    axes.set_yticks(range(tasks), labels)
    axes.set(xlabel="accuracy on task", ylabel="after learning task", title=title)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="accuracy (%)", shrink=0.85)
    return figure


def curves_figure(
    series: Mapping[str, Sequence[Points]],
    x_label: str,
    y_label: str,
    title: str = "",
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Curves by name, (x, y) points each; several of one name are drawn as their mean within their range.

    Args:
        limits: of the y axis; by default those of the curves.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, (name, curves) in enumerate(series.items()):
        length = min(map(len, curves))
        x = [point[0] for point in curves[0][:length]]
        y = np.array([[point[1] for point in curve[:length]] for curve in curves])
        colour = COLOURS[number % len(COLOURS)]
        marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]  # a colour's second curve has another one
        axes.plot(x, y.mean(0), marker=marker, color=colour, markersize=5, linewidth=1.8, label=name)
        if len(curves) > 1:
            axes.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel=x_label, ylabel=y_label, title=title, ylim=limits)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # tasks and epochs are whole
    _plain(axes)
    return figure


def bars_figure(groups: Mapping[str, Sequence[float]], x_label: str, y_label: str) -> Figure:
    """Bars side by side, numbered from 1 on the x axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    room = 0.8 / len(groups)
    for number, (name, heights) in enumerate(groups.items()):
        places = np.arange(1, len(heights) + 1) - 0.4 + room * (number + 0.5)
        axes.bar(places, heights, room * 0.92, color=COLOURS[number % len(COLOURS)], label=name)
    axes.set(xlabel=x_label, ylabel=y_label, xticks=range(1, max(map(len, groups.values())) + 1))
    _plain(axes)
    return figure


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def save(
    figure: Figure, folder: Path, name: str, formats: Sequence[str] = ("png", "svg", "pdf"), dpi: int = 200
) -> list[Path]:
    """Writes a figure in several formats into a folder that is there; returns their paths.

    Raises:
        OSError: it can't be written.
    """
    from matplotlib import rc_context

    paths = []
    for kind in formats:
        buffer = io.BytesIO()
        with rc_context({"svg.hashsalt": "cilnorm"}):  # else the names in an SVG are drawn at random
            figure.savefig(buffer, format=kind, dpi=dpi, metadata=UNDATED[kind])
        paths.append(folder / f"{name}.{kind}")
        write_atomically(paths[-1], buffer.getvalue())
    return paths


def classes_figure(rows: Sequence[Sequence[float]], sizes: Sequence[int], title: str) -> Figure:
    """Accuracy on all seen classes against their number, as papers of several protocols compare runs."""
    seen = np.cumsum(sizes[: len(rows)])
    points = [(float(x), float(y)) for x, y in zip(seen, average_per_task(as_matrix(rows), sizes), strict=True)]
    return curves_figure({"all seen classes": [points]}, "classes seen", "accuracy (%)", title, PERCENT)


def draw_figures(folder: Path, rows: Sequence[Sequence[float]], title: str, sizes: Sequence[int] = ()) -> list[Path]:
    """Writes the figures of a run into ``folder``, each as PNG and PDF; returns their paths.

    Args:
        sizes: classes of each task; without them there is no figure against classes.

    Raises:
        OSError: they can't be written.
    """
    figures = {"accuracy": accuracy_figure(rows, title, sizes), "matrix": matrix_figure(rows, title)}
    if sizes:
        figures["classes"] = classes_figure(rows, sizes, title)
    return [path for name, figure in figures.items() for path in save(figure, folder, name, ("png", "pdf"), dpi=150)]
