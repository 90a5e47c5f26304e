"""What every norm must survive that needs to know the task or label of each row."""

from __future__ import annotations

import copy

import pytest
import torch

from cilnorm.batch import set_composition
from cilnorm.norms import norm_factory
from cilnorm.telling import tell_rows
from tests.test_norms_battery import NAMES, SHELF, TOLD, assert_same, make, rows

pytestmark = pytest.mark.slow

NEEDY = [name for name in NAMES if SHELF[name].needs_rows]


@pytest.mark.parametrize("name", NEEDY)
def test_a_layer_that_needs_rows_raises_without_them(name: str) -> None:
    assert NEEDY
    layer = norm_factory(name)(8)
    set_composition(layer, TOLD, expect_listeners=False)
    with pytest.raises(RuntimeError, match=r"does not know what the batch is made of.*cilnorm\.rows"):
        layer(rows(8, 2, 2))
    with pytest.raises(ValueError, match=f"{name} needs the (task|label) of each row"):
        tell_rows(layer, past=torch.arange(16) > 11, task=3)
    with pytest.raises(ValueError, match="16 rows were described, the batch has 9"):
        make(name)(rows(8, 2, 2, count=9))


@pytest.mark.parametrize("name", NEEDY)
def test_the_order_of_rows_changes_nothing_but_the_order(name: str) -> None:
    """Every row with its task and label: output rows, gradients and averages are those of the ordered batch."""
    layer = make(name)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(5))
    other = copy.deepcopy(layer)
    told = layer._told.rows
    tasks, labels = told.tasks[order], told.labels[order]
    tell_rows(other, past=told.past[order], task=3, tasks=tasks, labels=labels)
    x = rows(8, 3, 5)
    y = layer(x)
    torch.testing.assert_close(other(x[order]), y[order])
    assert not torch.allclose(make(name)(x[order]), y[order])
    assert_same(list(other.buffers()), list(layer.buffers()))
