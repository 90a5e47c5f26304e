"""The figures of a run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cilnorm.files import write_atomically
from cilnorm.metrics import as_matrix, average_per_task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["accuracy_figure", "draw_figures", "matrix_figure"]

BLUE, GREY = "#2a6fbb", "#8a8f98"


def accuracy_figure(rows: Sequence[Sequence[float]], title: str) -> Figure:
    """Mean accuracy over the seen tasks after each task, and the accuracy on each task right after learning it."""
    from matplotlib.figure import Figure

    matrix = as_matrix(rows)
    tasks = np.arange(1, len(matrix) + 1)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.plot(tasks, np.diag(matrix), "o--", color=GREY, markersize=4, label="newest task")
    axes.plot(tasks, average_per_task(matrix), "o-", color=BLUE, linewidth=2, label="mean of all seen tasks")
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
                axes.text(u, t, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=8)
    labels = [str(task) for task in range(1, tasks + 1)]
    axes.set_xticks(range(tasks), labels)
    axes.set_yticks(range(tasks), labels)
    axes.set(xlabel="accuracy on task", ylabel="after learning task", title=title)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="accuracy (%)", shrink=0.85)
    return figure


def draw_figures(folder: Path, rows: Sequence[Sequence[float]], title: str) -> list[Path]:
    """Writes the two figures of a run into ``folder``; returns their paths.

    Raises:
        OSError: they can't be written.
    """
    paths = []
    for name, figure in (("accuracy", accuracy_figure(rows, title)), ("matrix", matrix_figure(rows, title))):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        paths.append(folder / f"{name}.png")
        write_atomically(paths[-1], buffer.getvalue())
    return paths
