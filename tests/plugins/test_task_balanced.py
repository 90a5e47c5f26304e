"""TBBN against the released layer's own numbers, and against a reference that repeats rows without a second thought."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cilnorm.batch import Composition, CompositionWarning, set_composition
from cilnorm.telling import rows
from cilnorm_norms.task_balanced import TaskBalancedBatchNorm2d, feasible_splits
from tests import golden as gold

LAYERS = [name for name in gold.names("tbbn_") if "sequence" not in name]
PRECISIONS = [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")]


def tolerance(name: str, dtype: torch.dtype) -> dict[str, float]:
    """What the golden README allows. ``large_offset`` is ill-conditioned: |mean| is two thousand deviations there."""
    if name == "tbbn_large_offset":
        return {"": 1e-7} if dtype == torch.float64 else {"": 5e-3, "running_var": 1e-4, "running_mean": 2e-5}
    return {"": 1e-10 if dtype == torch.float64 else 2e-5}


def of_golden(golden: gold.Golden) -> TaskBalancedBatchNorm2d:
    """The layer of a golden file. Short batches have the number of splits of a full one, so it is fixed there."""
    meta = golden.meta
    rows, current, task = meta["shape"][0], meta["n_current"], meta.get("task_index0", 0)
    composition = Composition(current, rows - current, task)
    full = current == meta["B_c"] or not task
    splits = "released" if full else meta["r"]
    layer = TaskBalancedBatchNorm2d(
        meta["shape"][1], meta["eps"], meta["momentum"], meta.get("affine", True), splits=splits
    )
    assert feasible_splits(composition, splits) == meta["r"]
    layer.compose(composition)
    return layer


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_released_layer(name: str, dtype: torch.dtype) -> None:
    golden = gold.Golden(name)
    allowed = tolerance(name, dtype)
    if "large_offset" in name and dtype == torch.float32:
        # The released float32 run is itself off by more than that here, so its float64 run is what counts.
        golden.arrays |= {key[:-2]: value for key, value in golden.arrays.items() if key.endswith("64")}
    gold.replay_all(of_golden(golden), golden, dtype, allowed)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_equals_the_released_layer_through_ten_tasks(dtype: torch.dtype) -> None:
    golden = gold.Golden("tbbn_sequence_bs64_ratio3")
    meta, allowed = golden.meta, tolerance("", dtype)
    layer = TaskBalancedBatchNorm2d(meta["shape"][1], meta["eps"], meta["momentum"])
    gold.load_initial_state(layer, golden)
    layer.to(dtype)
    for task in range(meta["tasks"]):
        current = meta["n_current"] if task else meta["n_current_t0"]
        layer.train().compose(Composition(current, meta["shape"][0] - current, task))
        for step in range(meta["steps"]):
            gold.replay(layer, golden, f"t{task}_s{step}_", dtype, allowed)
        y = layer.eval()(golden.tensor(f"t{task}_eval_x", dtype))
        gold.check(y, golden.expected(f"t{task}_eval_y", dtype), allowed[""], f"evaluation after task {task}")


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_without_past_rows_it_is_the_released_batch_norm(dtype: torch.dtype) -> None:
    golden = gold.Golden("splitbn_ns1")
    layer = TaskBalancedBatchNorm2d(golden.meta["shape"][1])
    layer.compose(Composition(golden.meta["shape"][0], 0, 4))
    gold.replay_all(layer, golden, dtype, tolerance("", dtype))


def test_splits_are_those_of_the_released_rule() -> None:
    golden = gold.Golden("feasible_r")
    tables = [value for key, value in golden.arrays.items() if key != "meta"]
    assert len(tables) > 5
    for current, past, *splits in (table.tolist() for table in tables):
        told = [Composition(current + past, 0, 0), *(Composition(current, past, t) for t in range(1, len(splits)))]
        assert [feasible_splits(each, "released") for each in told] == splits


def test_only_the_current_rows_need_to_be_divisible() -> None:
    splits = [feasible_splits(Composition(48, 16, task), "divisor") for task in range(1, 10)]
    assert splits == [3, 6, 8, 12, 12, 16, 16, 24, 24]  # PROTOCOL a.2, last but one column


@pytest.mark.parametrize("composition", [Composition(64, 0, 5), Composition(0, 64, 5), Composition(64, 0, 0)])
def test_nothing_to_balance_means_one_split(composition: Composition) -> None:
    assert {feasible_splits(composition, rule) for rule in ("released", "divisor", "exact", 16)} == {1}


def test_splits_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="48 current rows can't be cut into 7 splits"):
        TaskBalancedBatchNorm2d(3, splits=7).compose(Composition(48, 16, 2))


def repeated(layer: TaskBalancedBatchNorm2d, x: Tensor, current: int, splits: int) -> tuple[Tensor, Tensor, Tensor]:
    """One split at a time, every past row copied into each: output and the two values that the averages move to."""
    y, means, variances = torch.zeros_like(x), [], []
    past = range(current, len(x))
    for split in range(splits):
        rows = [*range(split, current, splits), *past]
        part = x[rows].transpose(0, 1).flatten(1)
        mean, var = part.mean(1), part.var(1, correction=0)
        shape = (1, -1, 1, 1)
        normal = (x[rows] - mean.view(shape)) / (var + layer.eps).sqrt().view(shape)
        out = normal * layer.weight.view(shape) + layer.bias.view(shape)
        share = torch.tensor([1.0 if row < current else 1 / splits for row in rows], dtype=x.dtype)
        y = y.index_add(0, torch.tensor(rows), out * share.view(-1, 1, 1, 1))
        means.append(mean)
        variances.append(part.var(1))
    return y, torch.stack(means).mean(0), torch.stack(variances).mean(0)


def trained(layer: nn.Module) -> nn.Module:
    """The same layer with weights and averages of no special values."""
    generator = torch.Generator().manual_seed(5)
    for value in (*layer.parameters(), layer.running_mean, layer.running_var):
        value.data = torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.5
    return layer.double()


shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5))


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 6), st.integers(1, 9), st.booleans(), st.integers(0, 2**31))
def test_equals_the_repeating_reference(
    shape: tuple[int, ...], splits: int, past: int, channels_last: bool, seed: int
) -> None:
    per_split, channels, height, width, task = shape
    current = per_split * splits
    torch.manual_seed(seed)
    x = torch.randn(current + past, channels, height, width, dtype=torch.float64) * 3 + 1
    g = torch.randn_like(x)
    layer = trained(TaskBalancedBatchNorm2d(channels, splits=splits))
    layer.compose(Composition(current, past, task))
    before = copy.deepcopy(layer)
    format_ = torch.channels_last if channels_last else torch.contiguous_format
    x1, x2 = x.clone(memory_format=format_).requires_grad_(), x.clone().requires_grad_()
    y1 = layer(x1)
    y2, mean, var = repeated(before, x2, current, splits)
    y1.backward(g.clone(memory_format=format_))
    y2.backward(g)
    assert y1.is_contiguous(memory_format=format_)
    close = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(y1, y2, check_stride=False, **close)
    torch.testing.assert_close(x1.grad, x2.grad, check_stride=False, **close)
    torch.testing.assert_close(layer.weight.grad, before.weight.grad, **close)
    torch.testing.assert_close(layer.bias.grad, before.bias.grad, **close)
    torch.testing.assert_close(layer.running_mean, before.running_mean.lerp(mean, 0.1), **close)
    torch.testing.assert_close(layer.running_var, before.running_var.lerp(var, 0.1), **close)


def task_weights(layer: TaskBalancedBatchNorm2d, current: int, past: int, task: int) -> list[float]:
    """How much every task weighs in the mean the layer uses: shift the task's rows by 1, see how far the mean moves."""
    layer.momentum = 1.0
    layer.compose(Composition(current, past, task))
    x = torch.randn(current + past, 1, 2, 2, dtype=torch.float64)
    owner = torch.cat([torch.full((current,), task), torch.arange(past) % task])
    layer(x)
    mean = layer.running_mean.clone()
    weights = []
    for each in range(task + 1):
        layer(x + (owner == each).view(-1, 1, 1, 1))
        weights.append((layer.running_mean - mean).item())
    return weights


@pytest.mark.parametrize(("current", "past", "task"), [(48, 16, 1), (48, 16, 4), (48, 16, 8), (7, 12, 6), (5, 10, 2)])
def test_exact_gives_every_task_the_same_weight(current: int, past: int, task: int) -> None:
    weights = task_weights(TaskBalancedBatchNorm2d(1, splits="exact").double(), current, past, task)
    assert weights == pytest.approx([1 / (task + 1)] * (task + 1), abs=1e-6)


def test_released_splits_leave_the_current_task_heavier() -> None:
    """The imbalance of the released rule at 48 : 16 and eight tasks, 3 rows a split against 2 a task."""
    *old, new = task_weights(TaskBalancedBatchNorm2d(1).double(), 48, 16, 8)
    assert new / old[0] == pytest.approx(1.5)


def weighted(layer: nn.Module, x: Tensor, current: int, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Every row of the mixture by hand: a current row counts 1 / ratio, a past row 1."""
    share = torch.tensor([1 / ratio] * current + [1.0] * (len(x) - current), dtype=x.dtype).view(-1, 1, 1, 1)
    count = share.sum() * x[0, 0].numel()
    mean = (share * x).sum((0, 2, 3), keepdim=True) / count
    var = (share * (x - mean) ** 2).sum((0, 2, 3), keepdim=True) / count
    y = (x - mean) / (var + layer.eps).sqrt() * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)
    return y, mean.flatten(), (var * count / (count - 1)).flatten()


@pytest.mark.parametrize(("current", "past", "task"), [(12, 4, 1), (12, 4, 5), (5, 6, 3), (3, 9, 2)])
def test_exact_equals_the_weighted_mixture(current: int, past: int, task: int) -> None:
    layer = trained(TaskBalancedBatchNorm2d(2, splits="exact"))
    layer.compose(Composition(current, past, task))
    before = copy.deepcopy(layer)
    x1 = torch.randn(current + past, 2, 2, 3, dtype=torch.float64).requires_grad_()
    x2 = x1.detach().clone().requires_grad_()
    g = torch.randn(x1.shape, dtype=torch.float64)
    y1 = layer(x1)
    y2, mean, var = weighted(before, x2, current, task * current / past)
    y1.backward(g)
    y2.backward(g)
    for actual, expected in (
        (y1, y2),
        (x1.grad, x2.grad),
        (layer.weight.grad, before.weight.grad),
        (layer.bias.grad, before.bias.grad),
        (layer.running_mean, before.running_mean.lerp(mean.detach(), 0.1)),
        (layer.running_var, before.running_var.lerp(var.detach(), 0.1)),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


BALANCED = [("released", 4.0), ("divisor", 6.0), ("exact", 9.0), (3, 3.0)]


@pytest.mark.parametrize(("splits", "ratio"), BALANCED)
def test_balanced_affine_gradients_weigh_past_rows_r_times_and_all_rows_1_in_the_mean(
    splits: str | int, ratio: float
) -> None:
    """Gradients are linear in g: those of γ and β are the two parts of the released ones, each times its weight."""
    composition = Composition(12, 4, 3)
    w_cur = 16 / (12 + 4 * ratio)
    w_past = ratio * w_cur
    assert 12 * w_cur + 4 * w_past == pytest.approx(16)
    x, g = torch.randn(2, 16, 3, 2, 2, dtype=torch.float64)
    current = (torch.arange(16) < 12).view(-1, 1, 1, 1)

    def gradients(rule: str, upstream: Tensor) -> list[Tensor]:
        layer = trained(TaskBalancedBatchNorm2d(3, splits=splits, affine_gradient=rule))
        layer.compose(composition)
        inputs = [x.clone().requires_grad_(), layer.weight, layer.bias]
        return list(torch.autograd.grad(layer(inputs[0]), inputs, upstream))

    own, past = gradients("released", g * current), gradients("released", g * ~current)
    dx, dweight, dbias = gradients("balanced", g)
    torch.testing.assert_close(dx, own[0] + past[0])
    torch.testing.assert_close(dweight, w_cur * own[1] + w_past * past[1])
    torch.testing.assert_close(dbias, w_cur * own[2] + w_past * past[2])
    assert not torch.allclose(dbias, own[2] + past[2])


@pytest.mark.parametrize("task", range(1, 10))
@pytest.mark.parametrize("splits", ["released", "divisor", "exact"])
def test_balanced_affine_gradients_grow_no_step(splits: str, task: int) -> None:
    """Where every row pulls the same way the step is that of batch normalisation, after any number of tasks."""
    layer = TaskBalancedBatchNorm2d(2, splits=splits, affine_gradient="balanced").double()
    layer.compose(Composition(48, 16, task))
    layer(torch.randn(64, 2, 1, 1, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((2,), 64.0, dtype=torch.float64))


def doubts(splits: str | int, *compositions: Composition) -> list[str]:
    """What is warned of while a network of two layers is told these compositions."""
    model = nn.Sequential(*(TaskBalancedBatchNorm2d(2, splits=splits) for _ in range(2)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for composition in compositions:
            set_composition(model, composition)
    assert all(each.category is CompositionWarning for each in said)
    return [str(each.message) for each in said]


@pytest.mark.parametrize(("splits", "current"), [("released", 47), ("divisor", 43)])
def test_splits_that_balance_nothing_are_told_of_once(splits: str, current: int) -> None:
    past = 17
    told = [Composition(64, 0, 0), *(Composition(current, past, task) for task in (5, 5, 6))]
    [text] = doubts(splits, *told)
    assert f"splits='{splits}' finds no way to split {current} current rows beside 17 past ones, though r is" in text
    assert "take splits='exact'" in text


@pytest.mark.parametrize("splits", ["released", "divisor", "exact", 1])
@pytest.mark.parametrize(
    "composition", [Composition(48, 16, 1), Composition(48, 16, 9), Composition(64, 0, 3), Composition(25, 27, 1)]
)
def test_splits_that_balance_and_batches_that_need_it_not_are_no_news(
    splits: str | int, composition: Composition
) -> None:
    assert not doubts(splits, composition)


def test_training_untold_says_what_to_call() -> None:
    with pytest.raises(RuntimeError, match="set_composition"):
        TaskBalancedBatchNorm2d(3)(torch.randn(8, 3, 2, 2))


def test_another_size_than_told_is_an_error_with_both_numbers() -> None:
    layer = TaskBalancedBatchNorm2d(3)
    set_composition(nn.Sequential(layer), Composition(48, 16, 1))
    with pytest.raises(ValueError, match="the composition says 64 rows, the batch has 32"):
        layer(torch.randn(32, 3, 2, 2))


def test_evaluation_ignores_what_was_told() -> None:
    layer, x = trained(TaskBalancedBatchNorm2d(3)).eval(), torch.randn(5, 3, 2, 2, dtype=torch.float64)
    plain = nn.BatchNorm2d(3).double().eval()
    plain.load_state_dict(layer.state_dict())
    untold = layer(x)
    layer.compose(Composition(48, 16, 1))
    assert torch.equal(layer(x), untold)
    assert torch.equal(plain(x), untold)


def test_without_running_statistics_evaluation_uses_the_batch() -> None:
    layer = TaskBalancedBatchNorm2d(3, track_running_stats=False)
    layer.compose(Composition(12, 4, 1))
    x = torch.randn(16, 3, 2, 2)
    layer(x)
    torch.testing.assert_close(layer.eval()(x), nn.BatchNorm2d(3, track_running_stats=False)(x))


def test_state_is_that_of_batch_norm_whatever_was_told() -> None:
    layer, plain = TaskBalancedBatchNorm2d(3), nn.BatchNorm2d(3)
    layer.compose(Composition(48, 16, 1))
    assert layer.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(layer.state_dict(), strict=True)
    layer.load_state_dict(plain.state_dict(), strict=True)


# What weighs the same as what, where tasks are of several sizes


def past_to_current(layer: TaskBalancedBatchNorm2d, current: int, past: int, **told: object) -> float:
    """The weight of all past rows in the mean, in units of that of all current ones."""
    x = torch.cat([torch.zeros(current, 2, 3, 3), torch.ones(past, 2, 3, 3)])
    x = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    if told:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
        with rows(layer, past=(torch.arange(len(x)) >= current)[order], task=1, **told):  # type: ignore[arg-type]
            layer(x[order])
    else:
        layer(x)
    share = layer.running_mean.mean().item()  # type: ignore[union-attr]
    return share / (1 - share)


def layer_of(unit: str, splits: str = "exact") -> TaskBalancedBatchNorm2d:
    return TaskBalancedBatchNorm2d(2, momentum=1.0, splits=splits, unit=unit)  # type: ignore[arg-type]


B50_10 = Composition(48, 16, 1, (50, 10))


def test_a_first_task_of_fifty_classes_is_one_task() -> None:
    layer = layer_of("tasks")
    layer.compose(B50_10)
    assert past_to_current(layer, 48, 16) == pytest.approx(1, rel=0.02)  # fifty classes weigh as ten
    assert feasible_splits(B50_10, "released") == feasible_splits(Composition(48, 16, 1), "released") == 2


def test_counted_by_classes_every_class_weighs_the_same() -> None:
    layer = layer_of("classes")
    layer.compose(B50_10)
    assert past_to_current(layer, 48, 16) == pytest.approx(5, rel=0.02)  # fifty to ten
    assert past_to_current(layer_of("classes"), 37, 11, classes=(50, 10)) == pytest.approx(5, rel=0.02)
    assert past_to_current(layer_of("tasks"), 37, 11, classes=(50, 10)) == pytest.approx(1, rel=0.02)
    split = layer_of("classes", "released")
    split.compose(B50_10)
    assert split.plan is not None
    assert split.plan.splits == 8  # r = 15 of 1, 2, 4, 8, 16


@pytest.mark.parametrize("splits", ["released", "divisor", "exact", "auto"])
def test_tasks_of_one_size_may_be_counted_either_way(splits: str) -> None:
    x = torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    for task in range(1, 10):
        found = []
        for unit in ("tasks", "classes"):
            layer = layer_of(unit, splits)
            layer.compose(Composition(48, 16, task, (10 * task, 10)))
            found.append(layer(x))
        assert torch.equal(*found), task


def test_classes_can_not_be_counted_untold() -> None:
    layer = layer_of("classes")
    layer.compose(Composition(64, 0, 0))
    with pytest.raises(ValueError, match="unit='classes' needs the numbers of old and new classes"):
        layer.compose(Composition(48, 16, 1))
    with pytest.raises(ValueError, match="needs the numbers of old and new classes"):
        past_to_current(layer, 48, 16, labels=torch.zeros(64, dtype=torch.long))
    with pytest.raises(ValueError, match="unit can't be 'rows'"):
        layer_of("rows")


def test_options_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="exactly"):
        TaskBalancedBatchNorm2d(3, splits="exactly")
    with pytest.raises(ValueError, match="paper"):
        TaskBalancedBatchNorm2d(3, affine_gradient="paper")
