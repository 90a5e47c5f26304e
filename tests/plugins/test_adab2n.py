"""AdaB²N against the released layer's own numbers, and in a run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cilnorm
from cilnorm.batch import Task
from cilnorm.experiment.runner import run
from cilnorm.method import Phase, Schedule
from cilnorm.network import Network
from cilnorm.norms import convert_norms
from cilnorm.registry import Registry
from cilnorm.spec import Spec
from cilnorm.training.engine import Engine
from cilnorm.training.fast_engines import CompiledEngine
from cilnorm_norms.adab2n import AdaptiveBalanceBatchNorm2d
from tests import golden as gold
from tests.training.test_engine import CPU, Remembered, epochs, learned, learner

FOLDER = Path(__file__).parent.parent / "assets" / "golden-norms"
GOLDENS = sorted(path.stem for path in FOLDER.glob("adab2n_*.npz"))
PRECISIONS = [pytest.param(torch.float64, 1e-10, id="float64"), pytest.param(torch.float32, 2e-5, id="float32")]


def of_golden(meta: dict[str, Any], strength: float = 1.0) -> AdaptiveBalanceBatchNorm2d:
    return AdaptiveBalanceBatchNorm2d(
        meta["shape"][1],
        meta["eps"],
        meta["momentum"],
        meta["affine"],
        kappa=meta["kappa"],
        strength=strength,
        strength_from=0,
        tasks=meta["num_tasks"],
    )


def near(value: Tensor | None, expected: Tensor, tolerance: float, what: str) -> None:
    """As ``golden.check``; no gradient at all is stored as zeros, and zeros must be zeros."""
    value = torch.zeros_like(expected) if value is None else value
    if not expected.any():
        assert value.abs().max() <= 1e-12, what
    else:
        gold.check(value, expected, tolerance, what)


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_equals_the_released_layer(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Outputs, gradients, averages, rates, the term in the loss with gradients of its own; weights where trained."""
    golden = gold.Golden(name, FOLDER)
    meta = golden.meta
    layer = of_golden(meta)
    gold.load_initial_state(layer, golden)
    layer.to(dtype).train()
    for step in range(meta["steps"]):
        prefix = f"s{step}_"
        x = golden.tensor(prefix + "x", dtype).requires_grad_()
        tasks, t = golden.tensor(prefix + "tasks", dtype), meta["tasks_before"][step]
        with cilnorm.rows(layer, tasks=tasks, task=t) as telling:
            y = layer(x)
            [term] = telling.take_terms().values()
        found = {"y": y, "running_mean": layer.running_mean, "running_var": layer.running_var, "reg": term}
        inputs = {"gx": x} | {f"g_{key}": value for key, value in layer.named_parameters()}
        of_y = torch.autograd.grad(
            y, list(inputs.values()), golden.tensor(prefix + "gy", dtype), retain_graph=True, allow_unused=True
        )
        of_term = torch.autograd.grad(term, list(inputs.values()), allow_unused=True)
        for key, value in found.items():
            near(value, golden.expected(prefix + key, dtype), tolerance, prefix + key)
        for key, one, other in zip(inputs, of_y, of_term, strict=True):
            near(one, golden.expected(prefix + key, dtype), tolerance, prefix + key)
            near(other, golden.expected(prefix + "reg_" + key, dtype), tolerance, prefix + "reg_" + key)
        assert layer.num_batches_tracked == int(golden.arrays[prefix + "num_batches_tracked"])
        assert float(layer._rate()) == pytest.approx(float(golden.arrays[prefix + "eta"]), rel=1e-12)
        if meta["lr"]:
            weigh = meta["lambd"] * meta["reg_on"][step]
            with torch.no_grad():
                for (key, value), one, other in zip(layer.named_parameters(), of_y[1:], of_term[1:], strict=True):
                    value -= meta["lr"] * (one + (0 if other is None else weigh * other))
                    near(value, golden.expected(f"{prefix}after_{key}", dtype), tolerance, f"{prefix}after_{key}")
    with torch.no_grad():
        near(layer.eval()(golden.tensor("eval_x", dtype)), golden.expected("eval_y", dtype), tolerance, "evaluation")


def told(layer: nn.Module, x: Tensor, tasks: Tensor, task: int) -> Tensor:
    with cilnorm.rows(layer, tasks=tasks, task=task):
        return layer(x)


def test_weight_of_absent_tasks_is_lost_or_redistributed() -> None:
    """A constant input must come out as its own mean, which it does only where weights sum to 1."""
    x, tasks = torch.full((6, 2, 2, 2), 3.0), torch.tensor([2, 2, 2, 2, 0, 0])
    means = {}
    for absent in ("lost", "redistributed"):
        layer = AdaptiveBalanceBatchNorm2d(2, kappa=1.0, momentum=1.0, absent=absent)
        told(layer, x, tasks, 2)
        means[absent] = layer.running_mean[0].item()
    assert means["redistributed"] == pytest.approx(3.0)
    assert means["lost"] == pytest.approx(3.0 * 8 / 9)  # priors 1 + 1 + 1, rows 2 + 0 + 4


def test_the_running_variance_may_be_unbiased() -> None:
    x, tasks = torch.randn(6, 2, 2, 2), torch.tensor([0, 1, 1, 1, 0, 0])
    biased = AdaptiveBalanceBatchNorm2d(2, kappa=1.0, momentum=1.0)
    unbiased = AdaptiveBalanceBatchNorm2d(2, kappa=1.0, momentum=1.0, variance="unbiased")
    told(biased, x, tasks, 1)
    told(unbiased, x, tasks, 1)
    torch.testing.assert_close(unbiased.running_var, biased.running_var * 24 / 23)


def test_past_or_not_is_enough_after_one_task() -> None:
    x, tasks = torch.randn(6, 2, 2, 2), torch.tensor([0, 1, 1, 1, 0, 0])
    one, other = AdaptiveBalanceBatchNorm2d(2), AdaptiveBalanceBatchNorm2d(2)
    with cilnorm.rows(other, past=tasks < 1, task=1):
        assert torch.equal(told(one, x, tasks, 1), other(x))
    with pytest.raises(ValueError, match="needs the task of each row: tell tasks="):
        cilnorm.tell_rows(one, past=tasks < 1, task=2)
    with pytest.raises(ValueError, match="built for 3 tasks; this is number 4"):
        cilnorm.tell_rows(AdaptiveBalanceBatchNorm2d(2, tasks=3), past=tasks < 1, task=3)


def test_a_converted_batch_norm_keeps_its_age() -> None:
    """So its averages are not overwritten by a first step at the rate of a first step."""
    old = nn.BatchNorm2d(2)
    old.num_batches_tracked.fill_(5000)
    layer = convert_norms(old, "adab2n")
    assert int(layer.updates) == 5000
    told(layer, torch.randn(6, 2, 2, 2), torch.zeros(6, dtype=torch.long), 0)
    assert float(layer._rate()) < 0.05
    assert float(AdaptiveBalanceBatchNorm2d(2)._rate()) > 0.3


def test_nothing_of_a_step_stays_on_the_layer() -> None:
    """A copy is made of it at once, and the term is handed out once."""
    layer = AdaptiveBalanceBatchNorm2d(2)
    with cilnorm.rows(layer, tasks=torch.tensor([0, 1, 1, 1, 0, 0]), task=1) as telling:
        layer(torch.randn(6, 2, 2, 2).requires_grad_())
        copy.deepcopy(layer)
        assert list(telling.take_terms()) == ["adab2n"]
        assert not telling.take_terms()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_the_term_once_or_says_that_it_can_not(reentrant: bool) -> None:
    gradients = []
    for repeats in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 3, 1), AdaptiveBalanceBatchNorm2d(3, strength=2.0, kappa=1.0))
        x = torch.randn(6, 2, 2, 2).requires_grad_()
        with cilnorm.rows(net, tasks=torch.tensor([0, 1, 1, 1, 0, 0]), task=1) as telling:
            y = checkpoint(net, x, use_reentrant=reentrant) if repeats else net(x)
            loss = y.sin().sum() + telling.take_terms()["adab2n"]
        if reentrant and repeats:
            with pytest.raises(RuntimeError, match="use_reentrant=False keeps it"):
                loss.backward()
            return
        loss.backward()
        gradients.append([x.grad, *(p.grad for p in net.parameters()), *net.buffers()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_weight_decay_leaves_the_prior_alone_unless_asked(registry: Registry) -> None:
    for options, moved in (({}, False), ({"decay": True}, True)):
        method = registry.methods["ft"].build()
        body = registry.backbones["tiny"].build(lambda c, o=options: AdaptiveBalanceBatchNorm2d(c, **o))
        net = Network(body, method.head(body.dim))
        net.head.grow(3)
        with torch.no_grad():
            body.norm.task_weight.fill_(2.0)
        engine = Engine(net, method, Task(0, (3, 3)), Phase(), Schedule(lr=0.1, weight_decay=0.5), None)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        before = body.norm.weight.clone()
        engine.optimizer.step()
        assert torch.equal(body.norm.task_weight, torch.full((100,), 2.0)) is not moved
        assert not torch.equal(body.norm.weight, before)


def test_a_run_logs_the_term_beside_the_method_s(tiny: Callable[..., Spec], registry: Registry, tmp_path: Path) -> None:
    terms: list[tuple[int, set[str]]] = []

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "epoch":
            terms.append((event["task"], set(event["terms"])))

    run(tiny(norm="adab2n"), tmp_path / "run", device="cpu", registry=registry, watch=[watch])
    assert {names == {"ce", "adab2n"} for task, names in terms if task > 1} == {True}
    assert {names == {"ce"} for task, names in terms if task == 1} == {True}


@pytest.mark.parametrize("norm", ["adab2n", "cbbn"])
def test_captured_and_compiled_steps_learn_what_eager_ones_do(
    norm: str, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are told within the step, so that what surrounds a capture, and a compiled backbone, see their batch."""
    terms, weights = learned(learner(Engine, registry, "lucir", norm=norm), epochs(CPU, count=2))
    again, same = learned(learner(Remembered, registry, "lucir", norm=norm), epochs(CPU, count=2))
    assert again == terms
    assert all(torch.equal(same[name], tensor) for name, tensor in weights.items())
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: whole(module, backend=backend))
    compiled = learned(learner(CompiledEngine, registry, "lucir", norm=norm), epochs(CPU, count=2))[0]
    torch.compiler.reset()
    assert graphs
    for one, other in zip(terms, compiled, strict=True):
        assert other == pytest.approx(one, rel=1e-3)
