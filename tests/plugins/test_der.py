"""DER against what its authors' functions and PyCIL's computed: terms, schedules, growth, both ways of balancing."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from cilnorm.batch import Batch, Composition, Task
from cilnorm.growing import GrowingNetwork
from cilnorm.heads import Expanding, align
from cilnorm.method import Phase, Schedule, Step
from cilnorm.network import Network, Output
from cilnorm.registry import Registry, load
from cilnorm.spec import resolve
from cilnorm.training.engine import Engine
from cilnorm_methods.der import DER
from tests.golden import FOLDER as GOLDEN
from tests.golden import Golden, check, names
from tests.plugins.test_backbones import fill, images

FOLDER = GOLDEN.with_name("golden-methods")
EXACT = 1e-10
DTYPES = [(torch.float64, EXACT), (torch.float32, 2e-5)]


def held(golden: Golden, key: str, value: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    check(value, golden.expected(key, dtype), tolerance, key)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("name", [*names("der_loss", FOLDER), *names("der_authors_loss", FOLDER)])
def test_terms_and_gradients(name: str, dtype: torch.dtype, tolerance: float) -> None:
    golden = Golden(name, FOLDER)
    known, total = golden.meta["known"], golden.meta["total"]
    logits, auxiliary = (golden.tensor(key, dtype).requires_grad_() for key in ("logits", "aux_logits"))
    seen: list[Tensor] = []

    def classifier(newest: Tensor) -> Tensor:
        seen.append(newest)
        return auxiliary

    embedding = torch.arange(float(4 * len(logits))).view(-1, 4)
    net = SimpleNamespace(head=SimpleNamespace(auxiliary=classifier, dim=2))
    targets, task = golden.tensor("targets", dtype), Task(1, (known, total - known))
    batch = Batch(torch.empty(0), targets, Composition(len(targets), 0, 1))
    out = Output(logits, logits, embedding, [])
    terms = DER().loss(Step(out, None, None, batch, task, Phase(), cast(Network, net)))
    assert torch.equal(seen[0], embedding[:, 2:])
    held(golden, "loss_clf", terms["ce"], dtype, tolerance)
    held(golden, "loss_aux", terms["auxiliary"], dtype, tolerance)
    loss = terms["ce"] + terms["auxiliary"]
    held(golden, "loss", loss, dtype, tolerance)
    for key, value in zip(("logits", "aux_logits"), torch.autograd.grad(loss, [logits, auxiliary]), strict=True):
        held(golden, f"grad_{key}", value, dtype, tolerance)
    half = DER(auxiliary=0.5).loss(Step(out, None, None, batch, task, Phase(), cast(Network, net)))
    torch.testing.assert_close(half["auxiliary"], terms["auxiliary"] / 2)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_the_second_phase_of_the_authors(dtype: torch.dtype, tolerance: float) -> None:
    """Its weights after some epochs of one batch, by the engine."""
    golden = Golden("der_authors_classifier_phase_0", FOLDER)
    meta, features = golden.meta, golden.tensor("features", dtype)

    class Features(nn.Module):
        def forward(self, _: Tensor) -> tuple[Tensor, list[Tensor]]:
            return features, []

    method = DER(bias=False, temperature=meta["temperature"])
    net = Network(Features(), method.head(features.shape[1]))
    net.grow(5)
    net.to(dtype).head.imprint(golden.tensor("weight", dtype))
    schedule = Schedule(
        meta["epochs"], meta["lr"], meta["momentum"], meta["weight_decay"],
        milestones=tuple(meta["milestones"]), gamma=meta["gamma"],
    )  # fmt: skip
    task, targets = Task(1, (3, 2)), golden.tensor("targets", dtype)
    engine = Engine(net, method, task, method.phases(task)[-1], schedule, None)
    for epoch in range(schedule.epochs):
        engine.start_epoch(epoch)
        engine.step(Batch(torch.empty(0), targets, Composition(len(targets), 0, 1)))
    held(golden, "weight_after", net.head.blocks[0].weight, dtype, tolerance)


def test_the_schedules_of_the_authors_and_of_pycil() -> None:
    method = DER(warm_up=10 / 160, balanced_epochs=30 / 160)
    run = Schedule(160, 0.1, momentum=0.9, weight_decay=5e-4, milestones=(100, 120))
    rise, main, classifier = method.phases(Task(1, (2, 2)))
    parts = [phase.schedule_in(run) for phase in (rise, main)]
    rates = [part.rate(epoch) for part in parts for epoch in range(part.epochs)]
    expected = Golden("schedule_der_authors", FOLDER).arrays["lr"]
    assert rates == pytest.approx(expected.tolist(), rel=1e-12)
    last = classifier.schedule_in(run)
    assert (last.epochs, last.weight_decay, classifier.backbone, classifier.rows) == (30, 5e-4, "eval", "balanced")
    assert [last.rate(epoch) for epoch in (0, 14, 15, 29)] == pytest.approx([0.1, 0.1, 0.01, 0.01])
    assert [rise.fresh_head, main.fresh_head, classifier.fresh_head] == [False, True, True]
    pycil = Golden("schedules", FOLDER)
    (alone,) = DER(balance="align").phases(Task(1, (2, 2)))
    assert not alone.fresh_head
    for name, milestones in (("der_first_task", (60, 120, 170)), ("der_later_tasks", (80, 120, 150))):
        facts = pycil.meta["phases"][name]
        made = alone.schedule_in(Schedule(facts["epochs"], 0.1, milestones=milestones))
        assert [made.rate(e) for e in range(made.epochs)] == pytest.approx(pycil.arrays[name].tolist(), rel=1e-12)
    assert [phase.name for phase in DER(warm_up=0.1).phases(Task(0, (2, 2)))] == ["warm-up", "main"]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("name", ["wa_align_0", "wa_align_1"])
def test_alignment(name: str, dtype: torch.dtype, tolerance: float) -> None:
    golden = Golden(name, FOLDER)
    known, total = golden.meta["known"], golden.meta["total"]
    weight = golden.tensor("weight", dtype)
    factor = align(weight, known)
    held(golden, "gamma", factor.double(), torch.float64, max(tolerance, EXACT))
    held(golden, "aligned_weight", weight, dtype, tolerance)

    net = GrowingNetwork(cast(Any, nn.Identity()), Expanding(weight.shape[1]))
    net.head.grow(total)
    net.to(dtype).head.imprint(golden.tensor("weight", dtype))
    task = Task(1, (known, total - known))
    assert DER(balance="none").remember(net, task, list) is DER().remember(net, task, list) is None
    assert torch.equal(net.head.blocks[0].weight, golden.tensor("weight", dtype))
    DER(balance="align").remember(net, task, list)
    held(golden, "aligned_weight", net.head.blocks[0].weight, dtype, tolerance)
    before = copy.deepcopy(net.state_dict())
    DER(balance="align").remember(net, Task(0, (total,)), list)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def pycil_resnet32() -> nn.Module:
    net: nn.Module = load().backbones["resnet32-a"].build(nn.BatchNorm2d)
    return net


def trainable(net: Network) -> int:
    return sum(parameter.numel() for parameter in DER().parameters(net, Phase()))


def test_growth_is_that_of_pycil() -> None:
    """Numbers of parameters, features in training and evaluation, and whose statistics move."""
    golden = Golden("der_growth_0", FOLDER)
    method, unused = DER(), golden.meta["tasks"][0]["extractor_unused_head_parameters"]
    net = method.network(pycil_resnet32)
    sizes = tuple(golden.meta["task_sizes"])
    for index, facts in enumerate(golden.meta["tasks"]):
        method.grow(net, Task(index, sizes), list)
        assert list(net.head.blocks[0].weight.shape) == facts["fc"]
        never = facts["aux"][0] * (facts["aux"][1] + 1) if not index else 0  # its auxiliary head of the first task
        count = sum(parameter.numel() for parameter in net.parameters())
        assert count == facts["parameters"] - unused * facts["extractors"] - never
        assert trainable(net) == facts["trainable"] - unused - never
        if index:
            assert list(net.head.auxiliary.weight.shape) == facts["aux"]
        net.train()
        assert [each.training for each in net.backbone.extractors] == facts["extractor_training"]
    for number, extractor in enumerate(net.backbone.extractors):
        extractor.double()
        fill(extractor, golden.meta["extractor_tensors_hashed"], golden.meta["S"] + number)
    batch = images(golden.meta["images"], 32, golden.meta["S"])
    check(net.double().train()(batch).embedding, golden.tensor("features", torch.float64), 1e-9, "features")
    for number, extractor in enumerate(net.backbone.extractors):
        for key in ("mean", "var"):
            name = f"extractor{number}_bn1_running_{key}_after"
            found = getattr(extractor.bn1, f"running_{key}")
            check(found, golden.tensor(name, torch.float64), 1e-9, name)
    with torch.no_grad():
        found = net.eval()(batch[:2]).embedding
    check(found, golden.tensor("eval_features", torch.float64), 1e-9, "eval_features")


@pytest.mark.parametrize("backbone", ["resnet32", "resnet18"])
def test_the_gradient_reaches_the_newest_extractor_and_both_classifiers(backbone: str, registry: Registry) -> None:
    method = DER()
    torch.manual_seed(0)
    net = method.network(lambda: registry.backbones[backbone].build(registry.norms["bn"].build))
    sizes = (2, 2)
    for index in range(2):
        method.grow(net, Task(index, sizes), list)
    task, targets = Task(1, sizes), torch.arange(4)
    engine = Engine(net, method, task, Phase(), Schedule(lr=0.01), None)
    engine.start_epoch(0)
    before = copy.deepcopy(net.state_dict())
    engine.step(Batch(torch.randn(4, 3, 32, 32), targets, Composition(4, 0, 1)))
    assert engine.sums.keys() == {"ce", "auxiliary"}
    changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not any(name.startswith("backbone.extractors.0.") for name in changed)
    learned = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert learned <= changed
    assert {"head.blocks.0.weight", "head.auxiliary.weight", "backbone.extractors.1.conv1.weight"} <= learned


def test_released_is_the_authors(registry: Registry) -> None:
    spec = resolve("cifar100", registry, method="der", protocol="released")
    asked: dict[str, Any] = {"keep_head": False, "bias": False, "normal_head": True, "warm_up": 10 / 160}
    assert {key: spec.method_options[key] for key in asked} == asked
    assert (spec.protocol.herding, spec.protocol.validation, spec.protocol.epoch) == ("icarl", 0.0, "passes")


@pytest.mark.parametrize(
    ("preset", "method", "recorded"),
    [
        ("cifar100-der", "der", ["schedule_der_authors"]),
        ("cifar100-pycil", "der", ["der_first_task", "der_later_tasks"]),
        ("cifar100-pycil", "foster", ["foster_first_task", "foster_boosting", "foster_compression"]),
    ],
)
def test_presets_have_the_recorded_schedules(preset: str, method: str, recorded: list[str], registry: Registry) -> None:
    """Rates of every epoch, and weight decay, of the first task and of the second, but for DER's second classifier."""
    spec = resolve(preset, registry, method=method)
    how, rates, decays = registry.methods[method].build(**spec.method_options), [], []
    for index in (0, 1):
        for phase in how.phases(Task(index, (10, 10))):
            made = phase.schedule_in(spec.schedule.in_task(index))
            if phase.name != "classifier":
                rates.append([made.rate(epoch) for epoch in range(made.epochs)])
                decays.append(made.weight_decay)
    if preset == "cifar100-der":  # rise and main phase, in both tasks
        expected, facts = [Golden(recorded[0], FOLDER).arrays["lr"].tolist()] * 2, [5e-4] * 4
        rates = [rates[0] + rates[1], rates[2] + rates[3]]
    else:
        golden = Golden("schedules", FOLDER)
        expected = [golden.arrays[name].tolist() for name in recorded]
        facts = [golden.meta["phases"][name]["weight_decay"] for name in recorded]
    assert [len(each) for each in rates] == [len(each) for each in expected]
    for found, wanted in zip(rates, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-12, abs=1e-15)
    assert decays == facts
