"""What layers say that need to know the task or label of each row; the kit holds that its order changes nothing."""

from __future__ import annotations

import pytest
import torch

from cilnorm.batch import set_composition
from cilnorm.hookspecs import Norm
from cilnorm.norms import norm_factory
from cilnorm.registry import load
from cilnorm.telling import tell_rows
from cilnorm.testing.layers import made
from cilnorm.testing.toys import COMPOSITION, rows

NEEDY = [record for record in load().norms.values() if record.needs_rows]


@pytest.mark.parametrize("record", NEEDY, ids=lambda record: record.name)
def test_a_layer_that_needs_rows_raises_without_them(record: Norm) -> None:
    assert NEEDY
    layer = norm_factory(record)(8)
    set_composition(layer, COMPOSITION, expect_listeners=False)
    with pytest.raises(RuntimeError, match=r"does not know what the batch is made of.*cilnorm\.rows"):
        layer(rows(8, 2, 2))
    with pytest.raises(ValueError, match=f"{record.name} needs the (task|label) of each row"):
        tell_rows(layer, past=torch.arange(16) > 11, task=3)
    with pytest.raises(ValueError, match="16 rows were described, the batch has 9"):
        made(record)(rows(8, 2, 2, count=9))
