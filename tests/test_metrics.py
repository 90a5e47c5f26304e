"""Summaries of an accuracy matrix against the released numbers and against the definitions, term by term."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cilnorm.metrics import as_matrix, average_per_task, calibration_error, forgetting_per_task, summarise
from tests import golden as gold


def matrices() -> st.SearchStrategy[NDArray[np.float64]]:
    """Lower triangular matrices of percentages."""
    percent = st.floats(0, 100)
    square = st.integers(1, 8).flatmap(
        lambda n: st.lists(st.lists(percent, min_size=n, max_size=n), min_size=n, max_size=n)
    )
    return square.map(lambda rows: np.tril(np.array(rows)))


@pytest.mark.parametrize("name", gold.names("metrics_"))
def test_metrics_are_the_released_ones(name: str) -> None:
    golden = gold.Golden(name).arrays
    summary = summarise(golden["acc"])
    tasks = len(golden["acc"])
    expected = {
        "A_f": golden["A_f"],
        "A_a": golden["A_a"],
        "A_l": golden["A_l"],
        "F": golden["official_fm"],  # over all T tasks
        "forgetting": golden["F"],  # over the T - 1 old ones
    }
    for key, value in expected.items():
        assert summary[key] == pytest.approx(float(value), rel=1e-12), key
    assert summary["A_l"] * tasks == pytest.approx(float(golden["official_la"]), rel=1e-12)
    np.testing.assert_allclose(average_per_task(golden["acc"]), golden["avg_per_task"], rtol=1e-12)
    np.testing.assert_allclose(forgetting_per_task(golden["acc"]), golden["forgetting_matrix"][-1], rtol=1e-12)


@given(matrices())
def test_metrics_are_their_definitions(acc: NDArray[np.float64]) -> None:
    tasks = range(len(acc))
    last = tasks[-1]
    forgotten = [max(acc[t, u] for t in tasks[:-1]) - acc[last, u] for u in tasks[:-1]]
    averages = [sum(acc[t, u] for u in range(t + 1)) / (t + 1) for t in tasks]
    old = max(last, 1)
    summary = summarise(acc)
    assert summary["A_f"] == pytest.approx(averages[-1])
    assert summary["A_a"] == pytest.approx(sum(averages) / len(acc))
    assert summary["F"] == pytest.approx(sum(forgotten) / len(acc), abs=1e-9)
    assert summary["forgetting"] == pytest.approx(sum(forgotten) / old, abs=1e-9)
    assert summary["A_l"] == pytest.approx(sum(acc[t, t] for t in tasks) / len(acc))
    assert summary["BWT"] == pytest.approx(sum(acc[last, u] - acc[u, u] for u in tasks[:-1]) / old, abs=1e-9)


@given(matrices())
def test_entries_above_the_diagonal_play_no_part(acc: NDArray[np.float64]) -> None:
    assert summarise(acc + np.triu(np.full_like(acc, np.nan), 1)) == summarise(acc)


def test_rows_of_a_run_become_a_matrix() -> None:
    assert as_matrix([[90.0], [50.0, 80.0]]).tolist() == [[90.0, 0.0], [50.0, 80.0]]


def test_one_task_forgets_nothing() -> None:
    summary = summarise([[70.0]])
    assert summary == {"A_f": 70.0, "A_a": 70.0, "F": 0.0, "forgetting": 0.0, "A_l": 70.0, "BWT": 0.0}


# Tasks of several sizes, calibration


def test_classes_weigh_where_tasks_differ_in_their_number() -> None:
    """A_t is the accuracy on the test images of all seen classes: 50 of a first task, 10 of each other."""
    matrix = as_matrix([[80.0], [70.0, 90.0], [60.0, 50.0, 95.0]])
    averages = average_per_task(matrix, (50, 10, 10))
    after = [80.0, (50 * 70 + 10 * 90) / 60, (50 * 60 + 10 * 50 + 10 * 95) / 70]
    np.testing.assert_allclose(averages, after, rtol=1e-12)
    summary, plain = summarise(matrix, (50, 10, 10)), summarise(matrix)
    assert summary["A_f"] == pytest.approx(after[-1])
    assert summary["A_a"] == pytest.approx(sum(after) / 3)
    assert all(summary[name] == plain[name] for name in ("F", "forgetting", "A_l", "BWT"))


@given(matrices(), st.integers(1, 60))
def test_equal_tasks_weigh_as_before_to_the_bit(acc: NDArray[np.float64], size: int) -> None:
    assert summarise(acc, (size,) * len(acc)) == summarise(acc)


def test_calibration_error_is_its_definition() -> None:
    assert calibration_error([1.0, 1.0], [1, 1]) == 0
    assert calibration_error([1.0, 1.0], [0, 0]) == 1
    assert calibration_error([0.75] * 4, [1, 1, 1, 0]) == pytest.approx(0)
    random = np.random.RandomState(0)
    confidence, correct = random.rand(200), random.rand(200) < 0.6
    bins = [(at / 15 < confidence) & (confidence <= (at + 1) / 15) for at in range(15)]
    gaps = [abs(correct[b].mean() - confidence[b].mean()) * b.sum() / 200 for b in bins if b.any()]
    assert calibration_error(confidence, correct) == pytest.approx(sum(gaps))
