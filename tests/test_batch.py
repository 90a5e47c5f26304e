"""The vocabulary: compositions, tasks, batches, and how layers are told."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cilnorm.batch import Batch, Composition, CompositionAware, CompositionWarning, Task, set_composition

counts = st.integers(0, 1000)


class Listener(CompositionAware):
    """Keeps all that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Composition] = []

    def compose(self, composition: Composition) -> None:
        self.heard.append(composition)


@given(counts, counts, counts)
def test_composition_admits_exactly_what_can_be(current: int, past: int, task: int) -> None:
    if current + past and (task or not past):
        composition = Composition(current, past, task)
        assert composition.rows == current + past
        assert composition == Composition(current, past, task)
        assert hash(composition) == hash(Composition(current, past, task))
    else:
        with pytest.raises(ValueError, match=r"at least one row|past rows in the first task"):
            Composition(current, past, task)


def test_compositions_that_differ_in_nothing_but_classes_are_equal() -> None:
    told = Composition(48, 16, 1, (50, 10))
    assert told == Composition(48, 16, 1)
    assert hash(told) == hash(Composition(48, 16, 1))
    assert (told.classes, Composition(48, 16, 1).classes) == ((50, 10), None)
    assert "classes" not in repr(told)


@pytest.mark.parametrize("counts", [(-1, 2, 1), (2, -1, 1), (2, 1, -1)])
def test_composition_refuses_negative_counts(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="negative"):
        Composition(*counts)


def test_composition_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Composition(1, 0, 0).current = 2  # type: ignore[misc]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_tasks_cut_the_classes_into_consecutive_pieces(sizes: list[int]) -> None:
    tasks = [Task(index, tuple(sizes)) for index in range(len(sizes))]
    columns = list(range(sum(sizes)))
    assert [column for task in tasks for column in columns[task.classes(task.index)]] == columns
    for task in tasks:
        assert columns[: task.old] + columns[task.classes(task.index)] == columns[: task.seen]
        assert task.new == sizes[task.index]


def test_batch_rows_are_current_first() -> None:
    batch = Batch(torch.zeros(5, 3, 2, 2), torch.tensor([7, 8, 9, 0, 1]), Composition(3, 2, 1))
    assert batch.targets[batch.current].tolist() == [7, 8, 9]
    assert batch.targets[batch.past].tolist() == [0, 1]


def test_set_composition_reaches_every_listener_however_deep() -> None:
    listeners = [Listener(), Listener()]
    model = nn.Sequential(nn.Conv2d(1, 1, 1), listeners[0], nn.Sequential(nn.ReLU(), nn.ModuleList([listeners[1]])))
    set_composition(model, Composition(6, 2, 1))
    assert [listener.heard for listener in listeners] == [[Composition(6, 2, 1)]] * 2


def test_a_module_that_does_not_listen_says_so() -> None:
    with pytest.raises(NotImplementedError):
        set_composition(CompositionAware(), Composition(1, 0, 0))


def warned(*calls: Callable[[], object]) -> list[warnings.WarningMessage]:
    """All that is warned of, as if Python itself never held its tongue."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for call in calls:
            call()
    return said


def test_telling_a_model_in_which_nobody_listens_warns_once_a_model() -> None:
    models = nn.Sequential(nn.Conv2d(1, 1, 1)), nn.Sequential(nn.BatchNorm2d(1))
    for model in models:
        said = warned(*(partial(set_composition, model, Composition(6, past, 1)) for past in (2, 2, 0)))
        assert [each.category for each in said] == [CompositionWarning]
        assert "no layer of this Sequential listens" in str(said[0].message)
        assert 'convert_norms(model, "tbbn")' in str(said[0].message)
        assert said[0].filename == __file__


def test_who_expects_no_listener_is_not_warned() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1))
    assert not warned(lambda: set_composition(model, Composition(6, 2, 1), expect_listeners=False))
    assert not warned(lambda: set_composition(nn.Sequential(Listener()), Composition(6, 2, 1)))


def test_telling_within_a_compiled_graph_says_nothing() -> None:
    """A warning there would break the graph in two."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.ReLU())

    def function(x: torch.Tensor) -> torch.Tensor:
        set_composition(model, Composition(6, 2, 1))
        return model(x)

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert not warned(lambda: compiled(torch.zeros(8)))
