"""Objectives, classifiers and corrections of further methods against what their authors' or PyCIL's code computed.

All in float64, to 1e-10.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from cilnorm.batch import Batch, Composition, Task
from cilnorm.heads import FixedCosine, Linear, align
from cilnorm.method import Method, Past, Phase, Step
from cilnorm.network import Network, Output
from cilnorm_methods.er_ace import ERACE
from cilnorm_methods.wa import WA
from tests.golden import METHODS, Golden, check, names

EXACT = 1e-10
NOTHING = torch.empty(0)


def files(prefix: str) -> list[str]:
    return names(prefix, METHODS)


def tensor(golden: Golden, key: str, *, grad: bool = False) -> Tensor:
    """An input in float64."""
    value = golden.tensor(key, torch.float64)
    return value.requires_grad_() if grad else value


def held(golden: Golden, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None = None) -> None:
    """Compares values, and the gradients of the first of them, by the names under which they are stored."""
    for key, value in values.items():
        check(value, golden.expected(key, torch.float64), EXACT, key)
    if gradients:
        found = torch.autograd.grad(next(iter(values.values())), list(gradients.values()))
        for key, gradient in zip(gradients, found, strict=True):
            check(gradient, golden.expected(key, torch.float64), EXACT, key)


def task_of(golden: Golden) -> Task:
    """The task at hand, as one of two: all classes before it, and its own."""
    known, total = golden.meta["known"], golden.meta["total"]
    return Task(1, (known, total - known)) if known else Task(0, (total,))


def terms_of(
    method: Method, logits: Tensor, old_logits: Tensor | None, targets: Tensor, task: Task, phase: Phase | None = None
) -> dict[str, Tensor]:
    """A method's terms where its objective sees logits alone."""
    net = Network(nn.Identity(), Linear(2))
    old = None if old_logits is None else Output(old_logits, old_logits, NOTHING, [])
    composition = Composition.of_one_kind(len(targets), task.index)
    step = Step(
        Output(logits, logits, NOTHING, []), old, None if old is None else Past(net),
        Batch(NOTHING, targets, composition), task, phase or Phase(), net,
    )  # fmt: skip
    return method.loss(step)


@pytest.mark.parametrize("name", files("wa_loss"))
def test_wa(name: str) -> None:
    golden = Golden(name, METHODS)
    logits, task = tensor(golden, "logits", grad=True), task_of(golden)
    method = WA(temperature=golden.meta["temperature"])
    terms = terms_of(method, logits, tensor(golden, "old_logits"), tensor(golden, "targets"), task)
    strength = golden.meta["kd_lambda"]
    parts = {"loss_clf": terms["ce"] / (1 - strength), "loss_kd": terms["distill"] / strength}
    held(golden, {"loss": sum(terms.values()), **parts}, {"grad_logits": logits})


@pytest.mark.parametrize("name", [name for name in files("wa_align") if "logits" not in name])
def test_the_alignment_of_wa(name: str) -> None:
    golden = Golden(name, METHODS)
    known, weight, bias = golden.meta["known"], tensor(golden, "weight"), tensor(golden, "bias")
    net = Network(nn.Identity(), Linear(weight.shape[1]))
    for rows in (slice(known), slice(known, None)):
        net.head.grow(len(weight[rows]))
        net.head.double().imprint(weight[rows])
        net.head.blocks[-1].bias.data = bias[rows]
    factor = align(weight, known)
    WA(bias=True).remember(net, task_of(golden), list)
    biases = torch.cat([block.bias for block in net.head.blocks])
    logits = net.head(tensor(golden, "features"))[0]
    held(golden, {"gamma": factor, "aligned_weight": net.head.weights, "aligned_bias": biases, "logits": logits})
    check(align(weight, known), torch.ones((), dtype=torch.float64), 1e-6, "a second alignment")


def test_without_a_bias_aligned_weights_are_aligned_logits() -> None:
    """Which is how DER-ClassIL corrects WA's network."""
    golden = Golden("wa_align_logits_0", METHODS)
    logits, weight, known = tensor(golden, "logits"), tensor(golden, "weight"), golden.meta["known"]
    embedding = torch.randn(5, weight.shape[1], dtype=torch.float64)
    before = embedding @ weight.T
    factor = align(weight, known)
    held(golden, {"gamma": factor})
    check(embedding @ weight.T, torch.cat([before[:, :known], factor * before[:, known:]], dim=1), EXACT, "weights")
    corrected = torch.cat([logits[:, :known], factor * logits[:, known:]], dim=1)
    held(golden, {"corrected_logits": corrected})


def ace_task(golden: Golden, old: int) -> Task:
    """A task whose last class is the highest that was met: in a classifier that grows all classes have been met."""
    met = [*golden.arrays["seen_before"].tolist(), *golden.arrays["targets"].tolist()]
    return Task(1, (old, max(met) + 1 - old)) if old else Task(0, (max(met) + 1,))


@pytest.mark.parametrize(("name", "old"), [("er_ace_0", 10), ("er_ace_1", 0), ("er_ace_2", 8)])
def test_er_ace(name: str, old: int) -> None:
    """Mammoth's: no mask in the first task, nor replay; where its buffer has rows of new classes, ours has none."""
    golden = Golden(name, METHODS)
    method, task = ERACE(mask_first_task=False, highest=True), ace_task(golden, old)
    logits, buffered = tensor(golden, "logits", grad=True), tensor(golden, "buffer_logits", grad=True)
    targets, stored = tensor(golden, "targets"), tensor(golden, "buffer_targets")
    terms = terms_of(method, logits, None, targets, task)
    held(golden, {"loss_current": terms["ce-current"]}, {"grad_logits": logits})
    if not task.index:
        assert "ce-past" not in terms
    elif int(stored.max()) < old:
        assert terms["ce-past"].item() == 0
        terms = terms_of(method, torch.cat([logits, buffered]), None, torch.cat([targets, stored]), task)
        gradients = {"grad_logits": logits, "grad_buffer_logits": buffered}
        held(golden, {"loss": sum(terms.values()), "loss_buffer": terms["ce-past"]}, gradients)


@pytest.mark.parametrize(("name", "old"), [("er_ace_authors_0", 0), ("er_ace_authors_1", 10)])
def test_er_ace_of_its_authors(name: str, old: int) -> None:
    golden = Golden(name, METHODS)
    logits = tensor(golden, "logits", grad=True)
    terms = terms_of(ERACE(highest=True), logits, None, tensor(golden, "targets"), ace_task(golden, old))
    held(golden, {"loss_current": terms["ce-current"]}, {"grad_logits": logits})
    paper = terms_of(ERACE(), logits, None, tensor(golden, "targets"), ace_task(golden, old))
    assert paper["ce-current"] < terms["ce-current"], "classes to come compete in the authors' code alone"


def test_the_classifier_of_er_ace() -> None:
    golden = Golden("er_ace_head_0", METHODS)
    features, weight = tensor(golden, "features", grad=True), tensor(golden, "weight")
    head = FixedCosine(weight.shape[1], golden.meta["scale"], golden.meta["epsilon"])
    head.grow(len(weight))
    head.double().imprint(weight)
    logits, _ = head(features)
    held(golden, {"scores": logits})
    upstream = (logits * tensor(golden, "upstream")).sum()
    gradients = torch.autograd.grad(upstream, [features, head.blocks[0].weight])
    for key, gradient in zip(("grad_features", "grad_weight"), gradients, strict=True):
        check(gradient, golden.expected(key, torch.float64), EXACT, key)
