"""Telling layers what the rows of one batch are, in any order.

    with cilnorm.rows(model, past=targets < known, task=t):
        loss = criterion(model(images), targets)

What is told holds for that batch and ends with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cilnorm.batch import Batch, Composition, CompositionAware, Task, modules_within
from cilnorm.rows_aware import Rows, RowsAware, Telling

__all__ = ["forget", "needs_rows", "rows", "tell_batch", "tell_rows"]


@contextmanager
def rows(
    *models: nn.Module,
    past: Tensor | None = None,
    task: int,
    tasks: Tensor | None = None,
    labels: Tensor | None = None,
    classes: tuple[int, int] | None = None,
    repeat: bool = False,
) -> Iterator[Telling]:
    """Inside, the models know which rows of the next batch are past; afterwards they know nothing.

    Every layer uses the telling up with its first training pass, so a second batch in the same block raises: give each
    batch, each part of an accumulated gradient, and each forward of DER++ a block of its own. A model and its teacher
    have layers of their own and each gets its pass; so does a deep copy made inside. Passes in evaluation use up
    nothing. ``backward`` may come after the block, with activation checkpointing too.

    Under ``torch.compile`` a network is compiled once for a number of rows, whatever the number of past ones and their
    places: over ten tasks of random masks one graph was counted, and one more where the number of rows changed.

    Args:
        models: networks, or parts of them; in ``DistributedDataParallel`` as well, each process telling its own rows.
        past: (N,) bool, rows of tasks before this one, in any order. On a GPU it is not read back, except by a layer
            with a fixed number of splits.
        task: tasks learned before this one (0 for the first).
        tasks: (N,) int64, the task of each row; needed by some norms, and enough without ``past``.
        labels: (N,) int64, the class of each row, in the order of learning; needed by some norms.
        classes: how many were learned in earlier tasks and how many this one brings; needed by some norms.
        repeat: whether several training passes may use it, over the very same rows: views of them, or a layer that
            stands in several places of a network.

    Yields:
        The telling; ``take_terms()`` after the forward pass has what norms want added to the loss.

    Raises:
        ValueError: shapes that don't fit, past rows in the first task, or something a layer needs that is not told.
        TypeError: a mask that is not bool; ``nn.DataParallel``; a layer that knows rows current first only.
    """
    telling = tell_rows(*models, past=past, task=task, tasks=tasks, labels=labels, classes=classes, repeat=repeat)
    try:
        yield telling
    finally:
        telling.close()


def tell_rows(
    *models: nn.Module,
    past: Tensor | None = None,
    task: int,
    tasks: Tensor | None = None,
    labels: Tensor | None = None,
    classes: tuple[int, int] | None = None,
    repeat: bool = False,
) -> Telling:
    """The first half of ``rows``, for hooks; ``close`` of what it returns, or ``forget``, is the other.

    Without either it ends when every layer has used it. Arguments and errors are those of ``rows``.
    """
    told = _checked(past, task, tasks, labels, classes)
    telling = Telling(told, repeat)
    for model in models:
        here = told.to(next((tensor.device for tensor in model.parameters()), told.past.device))
        for module in _modules(model):
            if isinstance(module, RowsAware):
                module.receive(telling, here)
            elif isinstance(module, CompositionAware):
                module.compose(_sorted(told, module))
            elif isinstance(module, nn.DataParallel):
                raise TypeError(
                    "nn.DataParallel cuts a batch without saying which rows go where; use DistributedDataParallel, "
                    "where every process tells its own rows"
                )
    return telling


def forget(*models: nn.Module) -> None:
    """Nothing that was told of rows or composition counts any more; training without another telling raises."""
    for model in models:
        for module in _modules(model):
            if isinstance(module, RowsAware):
                module.forget()


def needs_rows(model: nn.Module) -> bool:
    """Whether a composition is not enough to train the model."""
    return any(isinstance(module, RowsAware) and module.needs_rows for module in _modules(model))


def tell_batch(model: nn.Module, batch: Batch, task: Task, every: bool = False) -> Telling:
    """Tells the layers that need it the task and label of every row; nothing is read back from the device.

    The others go by the batch's composition, which ``Network.observe`` tells.

    Args:
        every: tell all that can be told of rows, since nobody knows the batch's composition.
    """
    tasks = task.of(batch.targets)
    telling = Telling(Rows(tasks < task.index, task.index, tasks, batch.targets, classes=(task.old, task.new)))
    for module in _modules(model):
        if isinstance(module, RowsAware) and (every or module.needs_rows):
            module.receive(telling, telling.rows)
    return telling


def _modules(model: nn.Module) -> list[nn.Module]:
    """Those that are told of rows: all but the frozen ones."""
    return modules_within(model, "learning")


def _checked(
    past: Tensor | None,
    task: int,
    tasks: Tensor | None,
    labels: Tensor | None,
    classes: tuple[int, int] | None,
) -> Rows:
    if past is None and tasks is None:
        raise ValueError("say which rows are past, or the task of each row")
    if past is None:
        assert tasks is not None
        past = tasks < task
    if past.dtype != torch.bool:
        raise TypeError(f"past is a bool tensor (N,), not one of {past.dtype}")
    for name, value in (("past", past), ("tasks", tasks), ("labels", labels)):
        if value is not None and (value.dim() != 1 or not len(value) or len(value) != len(past)):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, past has {tuple(past.shape)}; both are (N,)")
    if task < 0:
        raise ValueError(f"task counts the tasks learned before this one; it can't be {task}")
    if past.device.type != "cpu":
        return Rows(past, task, tasks, labels, classes=classes)
    if tasks is not None and tasks.device.type == "cpu" and not torch.equal(tasks < task, past):
        raise ValueError("a row is past if and only if its task is below the number of tasks learned before")
    count = int(past.sum())
    if count and not task:
        raise ValueError(f"{count} past rows in the first task")
    current = len(past) - count
    composition = None if past[:current].any() else Composition(current, count, task, classes)
    return Rows(past, task, tasks, labels, composition, classes)


def _sorted(rows: Rows, module: nn.Module) -> Composition:
    """The composition for a layer that knows nothing else; waits for the device if it must."""
    known = rows if rows.composition else _checked(rows.past.cpu(), rows.task, None, None, rows.classes)
    if known.composition is None:
        raise TypeError(f"{type(module).__name__} takes current rows first, and these rows stand in another order")
    return known.composition
