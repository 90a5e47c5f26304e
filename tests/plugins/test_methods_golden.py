"""Objectives, classifiers and corrections of further methods against what their authors' or PyCIL's code computed.

All in float64, to 1e-10.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from cilnorm.batch import Batch, Composition, Task
from cilnorm.heads import Linear, align
from cilnorm.method import Method, Past, Phase, Step
from cilnorm.network import Network, Output
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
        nn.init.zeros_(net.head.blocks[-1].bias).data += bias[rows]
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
