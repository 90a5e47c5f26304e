"""Accuracy matrix -> the field's summaries.

``matrix[t, u]`` is the accuracy on task u after learning task t, in percent, over all classes seen then; entries with
u > t play no part.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "METRICS",
    "TABULATED",
    "as_matrix",
    "average_per_task",
    "calibration_error",
    "forgetting_per_task",
    "mean_and_deviation",
    "mean_text",
    "summarise",
]

METRICS = ("A_f", "A_a", "F", "forgetting", "A_l", "BWT")  # what ``summarise`` returns
TABULATED = ("A_f", "A_a", "F", "A_l")  # what the tables of Cha et al. print, and ours


def as_matrix(rows: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """The rows of a run so far, row t holding t + 1 accuracies, as a square matrix with zeros above the diagonal."""
    matrix = np.zeros((len(rows), len(rows)))
    for at, row in enumerate(rows):
        matrix[at, : len(row)] = row
    return matrix


def average_per_task(matrix: ArrayLike, sizes: Sequence[int] = ()) -> NDArray[np.float64]:
    """A_t = mean of acc[t, u] over u <= t, (T,).

    Args:
        sizes: classes of each task; where they differ the mean is over classes, so that A_t is the accuracy on the test
            images of all seen classes, as papers with a larger first task report it.
    """
    lower = np.tril(np.asarray(matrix, dtype=float))
    if len(set(sizes[: len(lower)])) > 1:
        weights = np.asarray(sizes[: len(lower)], dtype=float)
        return (lower @ weights) / weights.cumsum()
    return lower.sum(1) / np.arange(1, len(lower) + 1)


def calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error in [0, 1]: |accuracy - mean confidence| of each bin, weighed by its images.

    Guo et al., ICML 2017, https://arxiv.org/abs/1706.04599, section 2, with bins of equal width.

    Args:
        confidence: the probability given to the predicted class, (n,).
        correct: whether that is the right one, (n,).
    """
    confident, right = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    at = np.clip(np.ceil(confident * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(at, right - confident, minlength=bins)
    return float(np.abs(gaps).sum() / len(confident))


def forgetting_per_task(matrix: ArrayLike) -> NDArray[np.float64]:
    """max over earlier t' of acc[t', u], minus acc[T, u]; 0 for the newest task; (T,). Not clipped.

    Chaudhry et al., ECCV 2018 (https://arxiv.org/abs/1801.10112), section 3; zeros of tasks not learned yet enter the
    maximum, as in the released code, and do no harm.
    """
    lower = np.tril(np.asarray(matrix, dtype=float))
    forgotten = np.zeros(len(lower))
    if len(lower) > 1:
        forgotten[:-1] = lower[:-1, :-1].max(0) - lower[-1, :-1]
    return forgotten


def summarise(matrix: ArrayLike, sizes: Sequence[int] = ()) -> dict[str, float]:
    """The summaries of a run, in the unit of the matrix.

    Args:
        sizes: classes of each task, which weigh in A_f and A_a where they differ, see ``average_per_task``.

    Returns:
        ``A_f``: mean accuracy after the last task. ``A_a``: mean of A_t over tasks. ``F``: forgetting, mean over all T
        tasks, the newest included, as the TBBN paper tabulates it. ``forgetting``: the same over the T - 1 old tasks,
        as surveys do. ``A_l``: mean accuracy on each task right after learning it. ``BWT``: backward transfer, mean of
        acc[T, u] - acc[u, u] over old tasks (https://arxiv.org/abs/1706.08840).
    """
    lower = np.tril(np.asarray(matrix, dtype=float))
    tasks, averages, forgotten = len(lower), average_per_task(lower, sizes), forgetting_per_task(lower)
    old = max(tasks - 1, 1)
    learned = np.diag(lower)
    return {
        "A_f": float(averages[-1]),
        "A_a": float(averages.mean()),
        "F": float(forgotten.sum() / tasks),
        "forgetting": float(forgotten.sum() / old),
        "A_l": float(learned.mean()),
        "BWT": float((lower[-1] - learned)[:-1].sum() / old),
    }


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for the latter with fewer than two values."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def mean_text(values: Sequence[float], plus_minus: str = " ± ") -> str:
    """``38.21 ± 0.40``; without a deviation where there is one value."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f}{plus_minus}{deviation:.2f}"
