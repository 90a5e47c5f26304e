"""Class-balanced batch norm against the released layer's own numbers, and its departures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cilnorm
from cilnorm.norms import convert_norms
from cilnorm_norms.class_balanced import ClassBalancedBatchNorm2d
from tests import golden as gold

FOLDER = Path(__file__).parent.parent / "assets" / "golden-norms"
GOLDENS = sorted(path.stem for path in FOLDER.glob("balanced_bn_*.npz"))
PRECISIONS = [pytest.param(torch.float64, 1e-10, id="float64"), pytest.param(torch.float32, 2e-5, id="float32")]


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_equals_the_released_layer(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Built of a batch norm, as there; outputs, gradients and all averages, with and without labels."""
    golden = gold.Golden(name, FOLDER)
    meta = golden.meta
    layer = ClassBalancedBatchNorm2d(
        meta["shape"][1],
        meta["eps"],
        meta["eta"],
        spread=meta["gamma"],
        over="all",
        start="kept",
        variant=meta["variant"],
        unlabelled="batch",
        classes=meta["num_classes"],
    )
    initial = {key.removeprefix("init_"): value for key, value in golden.arrays.items() if key.startswith("init_")}
    layer.load_state_dict({key: torch.from_numpy(value) for key, value in initial.items()})
    layer.to(dtype).train()
    for step in range(meta["steps"]):
        prefix = f"s{step}_"
        layer.zero_grad()
        x = golden.tensor(prefix + "x", dtype).requires_grad_()
        labels = golden.tensor(prefix + "labels", dtype) if meta["labelled"][step] else None
        with cilnorm.rows(layer, past=torch.zeros(len(x), dtype=torch.bool), task=0, labels=labels):
            y = layer(x)
        y.backward(golden.tensor(prefix + "gy", dtype))
        found = {"y": y, "gx": x.grad, "g_weight": layer.weight.grad, "g_bias": layer.bias.grad}
        found |= {key: value for key, value in layer.named_buffers() if key != "seen"}
        for key, value in found.items():
            gold.check(value, golden.expected(prefix + key, dtype), tolerance, prefix + key)
    with torch.no_grad():
        y = layer.eval()(golden.tensor("eval_x", dtype))
    gold.check(y, golden.expected("eval_y", dtype), tolerance, "evaluation")


def told(layer: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    with cilnorm.rows(layer, past=torch.zeros(len(x), dtype=torch.bool), task=0, labels=labels):
        return layer(x)


def test_classes_not_seen_yet_weigh_nothing() -> None:
    """Two classes of ten: averages are those of a layer that was built for two."""
    x, labels = torch.randn(8, 3, 2, 2) + 4, torch.tensor([0, 1, 1, 1, 0, 0, 1, 1])
    few, many = ClassBalancedBatchNorm2d(3, classes=2), ClassBalancedBatchNorm2d(3, classes=10)
    assert torch.equal(told(few, x, labels), told(many, x, labels))
    assert torch.equal(few.global_var, many.global_var)
    released = ClassBalancedBatchNorm2d(3, classes=10, over="all")
    told(released, x, labels)
    assert released.global_mean.mean() < 0.3 * many.global_mean.mean()


def test_a_class_begins_with_its_first_rows_and_weighs_as_much_as_any_other() -> None:
    x, labels = torch.randn(8, 3, 2, 2, dtype=torch.double), torch.tensor([0, 1, 1, 1, 1, 1, 1, 1])
    layer = ClassBalancedBatchNorm2d(3, dtype=torch.double)
    y = told(layer, x, labels)
    means = torch.stack([x[labels == k].mean((0, 2, 3)) for k in range(2)])
    variances = torch.stack([x[labels == k].var((0, 2, 3), correction=0) for k in range(2)])
    torch.testing.assert_close(layer.local_mean[:2], means)
    torch.testing.assert_close(layer.global_mean, means.mean(0))
    var = variances.mean(0) + means.var(0)
    torch.testing.assert_close(layer.global_var, var)
    torch.testing.assert_close(y, (x - means.mean(0)[:, None, None]) / (var + 1e-5).sqrt()[:, None, None])


def test_tasks_may_take_the_place_of_classes() -> None:
    x, tasks = torch.randn(8, 3, 2, 2), torch.tensor([0, 1, 1, 1, 0, 0, 1, 1])
    by_tasks, by_classes = ClassBalancedBatchNorm2d(3, by="tasks"), ClassBalancedBatchNorm2d(3)
    with cilnorm.rows(by_tasks, tasks=tasks, task=1):
        assert torch.equal(by_tasks(x), told(by_classes, x, tasks))


def test_labels_out_of_range_are_an_error() -> None:
    layer = ClassBalancedBatchNorm2d(3, classes=4)
    with pytest.raises(ValueError, match="built for 4 classes; told of 0 to 4: set classes="):
        cilnorm.tell_rows(layer, past=torch.zeros(2, dtype=torch.bool), task=0, labels=torch.tensor([0, 4]))


def test_evaluates_as_the_batch_norm_that_it_was_made_of() -> None:
    old = nn.BatchNorm2d(3)
    old(torch.randn(8, 3, 2, 2) * 2 + 1)
    x = torch.randn(5, 3, 2, 2)
    expected = old.eval()(x)
    torch.testing.assert_close(convert_norms(old, "cbbn")(x), expected)
