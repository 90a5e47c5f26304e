"""FOSTER against what PyCIL's functions and its authors' weights were: terms, class weights, growth, schedules."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from cilnorm.batch import Batch, Composition, Task
from cilnorm.method import Phase, Schedule, Step
from cilnorm.network import Network, Output
from cilnorm.registry import Registry
from cilnorm.spec import resolve
from cilnorm.training.engine import Engine
from cilnorm_methods._boosting import class_weights
from cilnorm_methods.foster import FOSTER
from tests.golden import FOLDER as GOLDEN
from tests.golden import Golden, check, names
from tests.plugins.test_der import pycil_resnet32

FOLDER = GOLDEN.with_name("golden-methods")
EXACT = 1e-10
DTYPES = [(torch.float64, EXACT), (torch.float32, 2e-5)]
SIZES = (2, 3, 2)


def held(golden: Golden, key: str, value: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    check(value, golden.expected(key, dtype), tolerance, key)


def counts(known: int, total: int, old: int, new: int) -> tuple[int, ...]:
    return (old,) * known + (new,) * (total - known)


@pytest.mark.parametrize("name", names("foster_weights", FOLDER))
def test_class_weights_are_the_authors(name: str) -> None:
    golden = Golden(name, FOLDER)
    for facts in golden.meta["tasks"]:
        images = counts(facts["known"], facts["total"], facts["samples_old_class"], golden.meta["samples_new_class"])
        for kind, beta in (("boosting", facts["beta1"]), ("compression", facts["beta2"])):
            found = class_weights(images, beta, torch.zeros(1, dtype=torch.float64))
            check(found, golden.tensor(f"t{facts['task']}_{kind}", torch.float64), EXACT, kind)
    with pytest.raises(ValueError, match="classes are weighed by their number of images"):
        class_weights((), 0.9, torch.zeros(1))


def terms_of(golden: Golden, phase: str, logits: Tensor, **layers: Tensor) -> dict[str, Tensor]:
    """The terms where classifiers give what is recorded; their inputs must be the right parts of the embedding."""
    meta = golden.meta
    embedding = torch.arange(float(6 * len(logits))).view(-1, 6)[:, : 4 if phase == "boosting" else 6]
    parts = {"old": embedding[:, :2], "feature": embedding[:, 2:4], "wide": embedding[:, :4]}

    def gives(name: str, value: Tensor) -> Any:
        def layer(x: Tensor) -> Tensor:
            assert torch.equal(x, parts[name]), name
            return value

        return layer

    head = SimpleNamespace(dim=2, **{name: gives(name, value) for name, value in layers.items()})
    images = counts(meta["known"], meta["total"], meta["samples_old_class"], meta["samples_new_class"])
    task = Task(2, (meta["known"] - 1, 1, meta["total"] - meta["known"]), images)
    targets = golden.tensor("targets", torch.float64)
    batch = Batch(torch.empty(0), targets, Composition(len(targets), 0, 2))
    method = FOSTER(
        distillation=meta["lambda_okd"], temperature=meta["temperature"],
        boosting_beta=(0.5, meta["beta1"]), compression_beta=meta["beta2"],
    )  # fmt: skip
    out, net = Output(logits, logits, embedding, []), cast(Network, SimpleNamespace(head=head))
    return method.loss(Step(out, None, None, batch, task, Phase(phase), net))


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("name", ["foster_0", "foster_1"])
def test_boosting(name: str, dtype: torch.dtype, tolerance: float) -> None:
    golden = Golden(name, FOLDER)
    logits, feature = (golden.tensor(key, dtype).requires_grad_() for key in ("logits", "fe_logits"))
    terms = terms_of(golden, "boosting", logits, feature=feature, old=golden.tensor("old_logits", dtype))
    held(golden, "boosting_loss_clf", terms["ce"], dtype, tolerance)
    held(golden, "boosting_loss_fe", terms["feature-ce"], dtype, tolerance)
    unweighted = terms["distill"] / golden.meta["lambda_okd"]
    held(golden, "boosting_loss_kd_unweighted", unweighted, dtype, tolerance)
    loss = torch.stack(list(terms.values())).sum()
    held(golden, "boosting_loss", loss, dtype, tolerance)
    for key, value in zip(("logits", "fe_logits"), torch.autograd.grad(loss, [logits, feature]), strict=True):
        held(golden, f"boosting_grad_{key}", value, dtype, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("name", ["foster_0", "foster_1"])
def test_compression(name: str, dtype: torch.dtype, tolerance: float) -> None:
    golden = Golden(name, FOLDER)
    student = golden.tensor("student_logits", dtype).requires_grad_()
    (loss,) = terms_of(golden, "compression", student, wide=golden.tensor("logits", dtype)).values()
    held(golden, "compression_loss", loss, dtype, tolerance)
    held(golden, "compression_grad_student_logits", torch.autograd.grad(loss, student)[0], dtype, tolerance)


def test_the_schedules_of_the_authors() -> None:
    recorded, method = Golden("schedules", FOLDER), FOSTER()
    run = Schedule(170, 0.1, momentum=0.9, weight_decay=5e-4, annealing="cosine-at-once", first_task=200 / 170)
    (first,) = method.phases(Task(0, SIZES))
    boosting, compression = method.phases(Task(1, SIZES))
    cases = (("first_task", first, 0), ("boosting", boosting, 1), ("compression", compression, 1))
    for name, phase, index in cases:
        made, facts = phase.schedule_in(run.in_task(index)), recorded.meta["phases"][f"foster_{name}"]
        assert (made.epochs, made.momentum, made.weight_decay) == tuple(
            facts[key] for key in ("epochs", "momentum", "weight_decay")
        )
        expected = recorded.arrays[f"foster_{name}"].tolist()
        assert [made.rate(epoch) for epoch in range(made.epochs)] == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_growth_is_that_of_pycil() -> None:
    """Shapes, numbers of parameters, and which blocks are copies of which."""
    golden, method = Golden("foster_growth_0", FOLDER), FOSTER()
    sizes = tuple(golden.meta["task_sizes"])
    net: Any = method.network(pycil_resnet32)
    unused = 650  # PyCIL's extractors have a classifier that nothing uses
    for index, facts in enumerate(golden.meta["tasks"]):
        last = copy.deepcopy(net.state_dict())
        body = "backbone.extractors.0." if index < 2 else "backbone.extractors.2."
        before = {name.removeprefix(body): tensor for name, tensor in last.items() if name.startswith(body)}
        method.grow(net, Task(index, sizes), list)
        if not index:
            assert list(net.head.blocks[0].weight.shape) == facts["fc"]
            continue
        head, extractors = net.head, net.backbone.extractors
        shapes = {"fc": head.wide, "fe": head.feature, "oldfc": head.old, "student_fc": head.blocks[0]}
        assert {key: list(layer.weight.shape) for key, layer in shapes.items()} == {key: facts[key] for key in shapes}
        old = last["head.blocks.0.weight"]
        count = len(old)
        assert torch.equal(head.old.weight, old)
        assert torch.equal(head.wide.weight[:count, :64], old) is facts["old_block_kept"]
        assert torch.equal(head.blocks[0].weight[:count], old) is facts["student_old_rows_equal_oldfc"]
        assert torch.equal(head.blocks[0].bias[:count], last["head.blocks.0.bias"])
        assert head.blocks[0].weight[count:].abs().max() <= facts["kaiming_uniform_bound_student"]
        for extractor in extractors:
            assert all(torch.equal(tensor, before[name]) for name, tensor in extractor.state_dict().items())
        boosting, compression = method.phases(Task(index, sizes))

        def number(phase: Phase) -> int:
            return sum(parameter.numel() for parameter in method.parameters(net, phase))

        never = 65 * facts["total_classes"]  # a feature head, which PyCIL's student has and does not use
        assert number(boosting) == facts["trainable"] - unused
        assert number(compression) == facts["student_trainable"] - unused - never
        teacher = (*extractors[:2], head.old, head.wide, head.feature)
        assert sum(p.numel() for part in teacher for p in part.parameters()) == facts["parameters"] - 2 * unused


@pytest.fixture
def net(registry: Registry) -> Any:
    """In the second task."""
    method = FOSTER()
    torch.manual_seed(0)
    made = method.network(lambda: registry.backbones["tiny"].build(registry.norms["tbbn"].build))
    for index in range(2):
        method.grow(made, Task(index, SIZES), list)
    return made


def test_each_phase_trains_its_own_and_no_other(net: Any) -> None:
    method, task = FOSTER(), Task(1, SIZES, (8, 8, 24, 24, 24))
    images, targets = torch.rand(8, 3, 8, 8), torch.tensor([2, 3, 4, 2, 3, 4, 0, 1])
    expected = {
        "boosting": {"backbone.extractors.1.", "head.wide.", "head.feature."},
        "compression": {"backbone.extractors.2.", "head.blocks.0."},
    }
    for phase in method.phases(task):
        engine = Engine(net, method, task, phase, Schedule(lr=0.1), None)
        before = copy.deepcopy(net.state_dict())
        engine.start_epoch(0)
        net.observe(Composition(6, 2, 1))
        engine.step(Batch(images, targets, Composition(6, 2, 1)))
        changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
        wanted = {name for name in before if name.startswith(tuple(expected[phase.name]))}
        assert changed == wanted
    assert engine.sums.keys() == {"balanced-distill"}


def test_views(net: Any) -> None:
    """The teacher says what the wide classifier says of both branches; the student what its own says of its own."""
    images, head = torch.rand(4, 3, 8, 8), net.head
    parts = [extractor.eval()(images)[0] for extractor in net.backbone.extractors]
    assert net.views == ("student", "teacher")
    net.eval()
    said = {}
    for view in ("teacher", "compression", "student"):
        net.look(view)
        said[view] = net(images)
    assert torch.equal(said["teacher"].logits, head.wide(torch.cat(parts[:2], dim=1)))
    assert torch.equal(said["student"].logits, head.blocks[0](parts[2]))
    assert torch.equal(said["compression"].logits, said["student"].logits)
    assert torch.equal(said["compression"].embedding, torch.cat(parts, dim=1))
    assert [each.embedding.shape[1] for each in said.values()] == [16, 24, 8]
    net.look("teacher")
    net.look()
    assert torch.equal(net(images).logits, said["student"].logits)
    assert FOSTER(scored="teacher").network(lambda: net.backbone.extractors[0]).views == ("teacher", "student")


def test_exemplars_are_chosen_by_the_network_that_is_asked_for(net: Any) -> None:
    for herded, dim in (("teacher", 16), ("student", 8)):
        net.look("compression")
        assert FOSTER(herded=herded).remember(net, Task(1, SIZES), list) is None
        assert net.eval()(torch.rand(2, 3, 8, 8)).embedding.shape[1] == dim


def test_released_is_the_authors(registry: Registry) -> None:
    spec = resolve("cifar100", registry, method="foster", protocol="released")
    assert spec.method_options["scored"] == "teacher"
    assert (spec.protocol.herding, spec.protocol.validation, spec.protocol.epoch) == ("icarl", 0.0, "passes")
