"""Telling every norm of a shelf what rows are, whether a composition is enough for it or not."""

from __future__ import annotations

import torch
from torch import nn

from cilnorm.batch import Composition, set_composition
from cilnorm.rows_aware import RowsAware
from cilnorm.telling import tell_rows


def tell(model: nn.Module, composition: Composition, copies: int = 1) -> None:
    """Tells a composition, and a task and label of every row to layers that need them, for any number of batches.

    Past rows take turns in the tasks, labels are two a task. With ``copies`` that many batches of ``composition`` stand
    in one, all their current rows first.
    """
    current, past, task = composition.current, composition.past, composition.task
    set_composition(model, Composition(copies * current, copies * past, task), expect_listeners=False)
    earlier = torch.arange(past).remainder(max(task, 1)).repeat(copies)
    tasks = torch.cat([torch.full((copies * current,), task), earlier])
    turns = torch.cat([torch.arange(current).repeat(copies), torch.arange(past).repeat(copies)])
    for module in model.modules():
        if isinstance(module, RowsAware) and module.needs_rows:
            tell_rows(module, past=tasks < task, task=task, tasks=tasks, labels=2 * tasks + turns % 2, repeat=True)
