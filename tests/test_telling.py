"""Telling of rows in any order: the same results as for the ordered batch, and nothing told outlives its batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import cilnorm
from cilnorm.batch import Composition, CompositionAware, Task, _ends
from cilnorm.heads import Linear
from cilnorm.network import Network
from cilnorm.norms import norm_factory
from cilnorm.rows_aware import KEPT
from cilnorm_norms._task_balanced.rows import _table
from cilnorm_norms.task_balanced import TaskBalancedBatchNorm2d, feasible_splits, weighs_rows

pytestmark = pytest.mark.slow

OPTIONS: list[dict[str, Any]] = [
    {},
    {"splits": "divisor"},
    {"splits": "exact"},
    {"splits": "auto", "affine_gradient": "balanced"},
    {"splits": 4, "affine_gradient": "balanced"},
    {"norm": "bn+splits", "splits": "divisor"},
]
OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7)
COMPOSITIONS = [Composition(12, 4, 3), Composition(16, 3, 2), Composition(8, 0, 2), Composition(0, 8, 3)]


def network(norm: str = "tbbn", dtype: torch.dtype = torch.float64, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    build = norm_factory(norm, **options)
    return nn.Sequential(nn.Conv2d(3, 8, 3), build(8), nn.ReLU(), nn.Conv2d(8, 4, 1), build(4)).to(dtype)


def batch(composition: Composition, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images in a random order, their mask, and the order that puts current rows first."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(composition.rows, 3, 6, 5, dtype=dtype, generator=generator) * 2 + 1
    mask = (torch.arange(composition.rows) >= composition.current)[
        torch.randperm(composition.rows, generator=generator)
    ]
    return x, mask, mask.int().argsort(stable=True)


def results(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Output, gradients of sin(y) and buffers."""
    y.sin().sum().backward()
    found = {"y": y.detach()} | {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return found | {"gradient of x": x.grad} | {name: b.clone() for name, b in model.named_buffers()}


def told(model: nn.Module, x: Tensor, mask: Tensor, task: int) -> dict[str, Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with cilnorm.rows(model, past=mask, task=task):
        y = model(x)
    return results(model, x, y)


def ordered(model: nn.Module, x: Tensor, order: Tensor, composition: Composition) -> dict[str, Tensor]:
    """The same of the ordered batch, its rows put back."""
    back = order.argsort()
    x = x[order].clone(memory_format=torch.preserve_format).requires_grad_()
    cilnorm.set_composition(model, composition)
    found = results(model, x, model(x))
    return {name: value[back] if name in ("y", "gradient of x") else value for name, value in found.items()}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Outputs and averages in units of their largest value, gradients of the largest among them: some are truly 0."""
    largest = max(value.abs().max().item() for name, value in expected.items() if "gradient" in name)
    for name, value in expected.items():
        allowed = tolerance * (largest if "gradient" in name else max(1.0, value.abs().max().item()))
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=allowed, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("composition", COMPOSITIONS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_any_order_gives_what_the_ordered_batch_gives(
    composition: Composition, options: dict[str, Any], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    x, mask, order = batch(composition, dtype)
    x = x.contiguous(memory_format=layout)
    model = network(dtype=dtype, **options).to(memory_format=layout)
    expected = ordered(copy.deepcopy(model), x, order, composition)
    compare(told(model, x, mask, composition.task), expected, 1e-12 if dtype == torch.float64 else 2e-6)


def test_rows_that_happen_to_be_in_order_give_the_same_bits() -> None:
    composition = Composition(12, 4, 3)
    x, mask, _ = batch(composition, torch.float32)
    model = network(dtype=torch.float32)
    expected = ordered(copy.deepcopy(model), x, torch.arange(16), composition)
    found = told(model, x, mask.sort().values, 3)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("size", [(4, 1, 1), (4, 2, 3)], ids=str)
def test_a_large_mean_costs_no_more_than_its_rounding(size: tuple[int, ...]) -> None:
    """Means of a thousand deviations, in float32, beside float64."""
    mask = torch.arange(16) % 4 == 1
    x = torch.randn(16, *size, generator=torch.Generator().manual_seed(0)) + 1000
    single, double = TaskBalancedBatchNorm2d(4), TaskBalancedBatchNorm2d(4, dtype=torch.double)
    with cilnorm.rows(single, past=mask, task=3):
        y = single(x)
    with cilnorm.rows(double, past=mask, task=3):
        torch.testing.assert_close(y.double(), double(x.double()), rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_have_float32_statistics(dtype: torch.dtype) -> None:
    mask = torch.arange(16) % 4 == 1
    x = (torch.randn(16, 4, 3, 3, generator=torch.Generator().manual_seed(0)) + 20).to(dtype)
    one, other = TaskBalancedBatchNorm2d(4), TaskBalancedBatchNorm2d(4)
    with cilnorm.rows(one, other, past=mask, task=3):
        y, expected = one(x.requires_grad_()), other(x.float())
    y.float().sin().sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(one.running_mean, other.running_mean)


def test_a_telling_is_for_one_batch_also_of_the_same_size() -> None:
    x, mask, _ = batch(Composition(12, 4, 3))
    model = network()
    with cilnorm.rows(model, past=mask, task=3):
        model(x)
        with pytest.raises(RuntimeError, match="was of one batch, and is used up"):
            model(x)
    with pytest.raises(RuntimeError, match="used up"):
        model(x)
    cilnorm.tell_rows(model, past=mask, task=3)
    model(x)
    with pytest.raises(RuntimeError, match="used up"):
        model(x)


def test_a_telling_that_was_not_used_ends_with_its_block_and_leaves_no_composition_behind() -> None:
    x, mask, _ = batch(Composition(12, 4, 3))
    model = network()
    cilnorm.set_composition(model, Composition(12, 4, 3))
    with cilnorm.rows(model, past=mask, task=3):
        model.eval()(x)
    with pytest.raises(RuntimeError, match="ended with its `with` block"):
        model.train()(x)
    with pytest.raises(RuntimeError, match="does not know what the batch is made of"):
        network()(x)


def test_forgetting_reaches_compositions_too() -> None:
    x, mask, _ = batch(Composition(12, 4, 3))
    model = network()
    for tell in (
        lambda: cilnorm.set_composition(model, Composition(12, 4, 3)),
        lambda: cilnorm.tell_rows(model, past=mask, task=3),
    ):
        tell()
        cilnorm.forget(model)
        with pytest.raises(RuntimeError, match="does not know what the batch is made of"):
            model(x)


def test_a_network_that_was_told_of_rows_is_told_its_composition_again() -> None:
    class Body(nn.Module):
        dim = 4

        def __init__(self) -> None:
            super().__init__()
            self.layers = network(dtype=torch.float32)

        def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            return self.layers(x).mean((2, 3)), []

    x, mask, _ = batch(Composition(12, 4, 3), torch.float32)
    net = Network(Body(), Linear(4))
    net.head.grow(2)
    for _ in range(2):
        net.observe(Composition(12, 4, 3))
        net(x)
        with cilnorm.rows(net, past=mask, task=3):
            net(x)


def test_several_passes_over_the_same_rows_may_be_asked_for() -> None:
    x, mask, _ = batch(Composition(12, 4, 3))
    model = network()
    with cilnorm.rows(model, past=mask, task=3, repeat=True):
        first, second = model(x), model(x)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="ended with its `with` block"):
        model(x)


def test_teachers_and_copies_follow_and_nobody_uses_up_what_is_another_s() -> None:
    """A teacher in training mode beside the model, a copy made inside the block, and one made of a told model."""
    x, mask, _ = batch(Composition(12, 4, 3))
    model = network()
    teacher, alone = copy.deepcopy(model), copy.deepcopy(model)
    expected = told(alone, x, mask, 3)["y"]
    with cilnorm.rows(model, teacher, past=mask, task=3):
        inside = copy.deepcopy(model)
        assert torch.equal(teacher(x), expected)
        assert torch.equal(inside(x), expected)
        unused = copy.deepcopy(model)
        assert torch.equal(model(x), expected)
    for each in (inside, unused, teacher, model):
        with pytest.raises(RuntimeError):
            each(x)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forwards_before_one_backward_repeat_their_own_rows(reentrant: bool, outside: bool) -> None:
    """As DER++ trains, under activation checkpointing, with the backward pass inside the last block or after it."""
    first, second = batch(Composition(12, 4, 3)), batch(Composition(12, 4, 3), seed=1)
    assert not torch.equal(first[1], second[1])
    outcomes = []
    for repeats in (False, True):
        model, outputs, inputs = network(), [], []
        for x, mask, _ in (first, second):
            inputs.append(x.clone().requires_grad_())
            with cilnorm.rows(model, past=mask, task=3):
                run = (lambda x, m=model: checkpoint(m, x, use_reentrant=reentrant)) if repeats else model
                outputs.append(run(inputs[-1]).sin().sum())
                if len(outputs) == 2 and not outside:
                    sum(outputs).backward()
        if outside:
            sum(outputs).backward()
        outcomes.append([x.grad for x in inputs] + [p.grad for p in model.parameters()] + list(model.buffers()))
    for plain, repeated in zip(*outcomes, strict=True):
        assert torch.equal(plain, repeated)


def test_a_repeated_pass_whose_rows_are_gone_raises() -> None:
    x, mask, _ = batch(Composition(12, 4, 3))
    model = network()
    with cilnorm.rows(model, past=mask, task=3):
        y = checkpoint(model, x.requires_grad_(), use_reentrant=False)
    for seed in range(KEPT):
        other, mask, _ = batch(Composition(12, 4, 3), seed=1 + seed)
        with cilnorm.rows(model, past=mask, task=3):
            model(other)
    with pytest.raises(RuntimeError, match="repeats a pass whose rows were forgotten"):
        y.sum().backward()


def test_gradients_accumulate_over_blocks() -> None:
    batches = [batch(Composition(12, 4, 3), seed=seed) for seed in range(2)]
    model, apart = network(), [network(), network()]
    for (x, mask, _), single in zip(batches, apart, strict=True):
        with cilnorm.rows(model, past=mask, task=3):
            model(x).sin().sum().backward()
        with cilnorm.rows(single, past=mask, task=3):
            single(x).sin().sum().backward()
    for parameter, one, other in zip(*(m.parameters() for m in (model, *apart)), strict=True):
        torch.testing.assert_close(parameter.grad, one.grad + other.grad)


@pytest.mark.filterwarnings("ignore")
def test_data_parallel_is_refused() -> None:
    mask = torch.arange(16) > 11
    for model in (nn.DataParallel(network()), nn.Sequential(nn.DataParallel(network()))):
        with pytest.raises(TypeError, match=r"DataParallel cuts a batch .* use DistributedDataParallel"):
            cilnorm.tell_rows(model, past=mask, task=3)


def test_what_does_not_fit_is_refused() -> None:
    model, mask = network(), torch.arange(16) > 11
    tasks = torch.where(mask, 1, 3)
    with pytest.raises(TypeError, match="bool"):
        cilnorm.tell_rows(model, past=mask.int(), task=3)
    with pytest.raises(ValueError, match="say which rows are past"):
        cilnorm.tell_rows(model, task=3)
    with pytest.raises(ValueError, match=r"tasks has shape \(15,\), past has \(16,\)"):
        cilnorm.tell_rows(model, past=mask, task=3, tasks=tasks[1:])
    with pytest.raises(ValueError, match="4 past rows in the first task"):
        cilnorm.tell_rows(model, past=mask, task=0)
    with pytest.raises(ValueError, match="past if and only if"):
        cilnorm.tell_rows(model, past=mask, task=3, tasks=tasks.flip(0))
    with pytest.raises(ValueError, match="12 current rows can't be cut into 5 splits"):
        cilnorm.tell_rows(network(splits=5), past=mask, task=3)
    cilnorm.tell_rows(model, past=mask, task=3)
    with pytest.raises(ValueError, match="16 rows were described, the batch has 9"):
        model(torch.randn(9, 3, 6, 5, dtype=torch.float64))


def test_tasks_alone_say_which_rows_are_past() -> None:
    x, mask, _ = batch(Composition(12, 4, 3))
    one, other = network(), network()
    with cilnorm.rows(one, past=mask, task=3):
        y = one(x)
    with cilnorm.rows(other, tasks=torch.where(mask, 2, 3), task=3):
        assert torch.equal(other(x), y)


def test_a_layer_that_knows_ordered_rows_only_is_told_of_them_and_refuses_others() -> None:
    class Listener(CompositionAware):
        heard: Composition | None = None

        def compose(self, composition: Composition) -> None:
            self.heard = composition

    layer, mask = Listener(), torch.arange(16) > 11
    cilnorm.tell_rows(nn.Sequential(layer), past=mask, task=3)
    assert layer.heard == Composition(12, 4, 3)
    with pytest.raises(TypeError, match="Listener takes current rows first"):
        cilnorm.tell_rows(nn.Sequential(layer), past=mask.flip(0), task=3)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_one_graph_serves_every_mask_of_a_size() -> None:
    """Over tasks, numbers of past rows, and orders, the ordered one as well."""
    graphs: list[Any] = []

    def count(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    model = network(dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend=count)
    found = []
    for task in range(1, 10):
        composition = Composition(16 - task % 5, task % 5, task)
        x, mask, _ = batch(composition, torch.float32, seed=task)
        mask = mask.sort().values if task == 4 else mask
        eager = copy.deepcopy(model)
        with cilnorm.rows(compiled, eager, past=mask, task=task):
            torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-4)
        found.append(len(graphs))
    assert found[-1] == 1


def test_the_rule_auto() -> None:
    """The released numbers for the paper's batches; weights where a common divisor is far below r."""
    for task in range(10):
        told = Composition(48, 16, task) if task else Composition(64, 0, 0)
        assert feasible_splits(told, "auto") == feasible_splits(told, "released")
        assert not weighs_rows(told, "auto")
    odd = Composition(47, 17, 9)
    assert feasible_splits(odd, "auto") == 1
    assert weighs_rows(odd, "auto")
    assert not weighs_rows(odd, "released")
    assert weighs_rows(Composition(48, 16, 9), "exact")


def test_the_task_of_a_label() -> None:
    labels = torch.tensor([0, 1, 2, 3, 4, 5])
    assert Task(1, (3, 1, 2)).of(labels).tolist() == [0, 0, 0, 1, 2, 2]


def test_a_network_of_batch_norms_may_be_told_too() -> None:
    with cilnorm.rows(network("bn"), past=torch.arange(16) > 11, task=3) as telling:
        assert telling.take_terms() == {}


@pytest.fixture
def _no_fake_tables() -> Iterator[None]:
    yield
    for cached in (_table, _ends):
        cached.cache_clear()


@pytest.mark.skipif(OLD, reason="torch below 2.7 asks the driver about tensors on a device that isn't there")
@pytest.mark.usefixtures("_no_fake_tables")
@pytest.mark.parametrize("options", [{}, {"splits": "auto", "affine_gradient": "balanced"}], ids=str)
@pytest.mark.parametrize("norm", ["tbbn", "adab2n", "cbbn"])
def test_no_device_is_waited_for(norm: str, options: dict[str, Any]) -> None:
    """Going forward on a GPU that isn't there, where reading any value back is an error."""
    task = Task(2, (2, 2, 2))
    build = norm_factory(norm, **(options if norm == "tbbn" else {}))
    with FakeTensorMode():
        model = nn.Sequential(build(3, device="cuda"), nn.ReLU(), build(3, device="cuda"))
        x = torch.randn(16, 3, 6, 5, device="cuda", requires_grad=True)
        labels = torch.randint(0, 6, (16,), device="cuda")
        with cilnorm.rows(model, tasks=task.of(labels), labels=labels, task=2) as telling:
            loss = model(x).square().sum() + sum(telling.take_terms().values())
        with pytest.raises(DataDependentOutputException):
            loss.item()
    assert loss.requires_grad
