"""Every term of every objective against the values and gradients of the released code."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cilnorm import losses
from cilnorm.batch import Batch, Composition, Task
from cilnorm.heads import Cosine, Proxies
from cilnorm.method import Method, Past, Phase, Step
from cilnorm.network import Network, Output
from cilnorm_methods.afc import AFC
from cilnorm_methods.eeil import EEIL
from cilnorm_methods.lucir import LUCIR
from cilnorm_methods.podnet import PODNet
from cilnorm_methods.ssil import SSIL
from tests.golden import Golden, check, names

FLOAT32 = 2e-5


def tensor(golden: Golden, key: str, *, grad: bool = False) -> Tensor:
    value = golden.tensor(key, torch.float32)
    return value.requires_grad_() if grad else value


def held(golden: Golden, loss: Tensor, value: str, gradients: dict[str, Tensor]) -> None:
    """Compares a loss and its gradients with what is stored."""
    check(loss, tensor(golden, value), FLOAT32, value)
    found = torch.autograd.grad(loss, list(gradients.values()))
    for (key, _), gradient in zip(gradients.items(), found, strict=True):
        check(gradient, tensor(golden, key), FLOAT32, key)


def step_of(
    out: Output, old: Output | None, targets: Tensor, task: Task, composition: Composition, phase: Phase | None = None
) -> Step:
    net = Network(torch.nn.Identity(), Cosine(2))
    past = None if old is None else Past(net)
    return Step(out, old, past, Batch(torch.empty(0), targets, composition), task, phase or Phase(), net)


def from_logits(
    golden: Golden, method: Method, logits: Tensor, *, current: int | None = None, phase: str = "main"
) -> Tensor:
    """The sum of a method's terms where the objective sees logits alone."""
    index, old_logits = golden.meta["t"], tensor(golden, "old_logits")
    task = Task(index, (golden.meta["classes_per_task"],) * (index + 1))
    targets = tensor(golden, "targets")
    current = len(targets) if current is None else current
    composition = Composition(current, len(targets) - current, index)
    nothing = torch.empty(0)
    out, old = Output(logits, logits, nothing, []), Output(old_logits, old_logits, nothing, [])
    terms = method.loss(step_of(out, old, targets, task, composition, Phase(phase)))
    return torch.stack(list(terms.values())).sum()


@pytest.mark.parametrize("name", names("loss_eeil"))
def test_eeil(name: str) -> None:
    golden = Golden(name)
    settings = {"temperature": golden.meta["T"], "distillation": golden.meta["lamb"]}
    logits = tensor(golden, "logits", grad=True)
    released = from_logits(golden, EEIL(**settings, distil_newest=False), logits)
    held(golden, released, "unbalanced_loss", {"unbalanced_grad": logits})
    for method in (EEIL(**settings), EEIL(**settings, distil_newest=False)):
        held(golden, from_logits(golden, method, logits, phase="balanced"), "balanced_loss", {"balanced_grad": logits})
    held(golden, from_logits(golden, EEIL(**settings), logits), "balanced_loss", {"balanced_grad": logits})


@pytest.mark.parametrize("name", names("loss_ssil"))
@pytest.mark.parametrize(("distilled", "prefix"), [("newest", "port"), ("every", "original")])
def test_ssil(name: str, distilled: str, prefix: str) -> None:
    golden = Golden(name)
    logits = tensor(golden, "logits", grad=True)
    method = SSIL(temperature=golden.meta["T"], distilled=distilled)
    loss = from_logits(golden, method, logits, current=golden.meta["n_current"])
    held(golden, loss, f"{prefix}_loss", {f"{prefix}_grad": logits})


@pytest.mark.parametrize("name", names("loss_lucir"))
def test_lucir(name: str) -> None:
    golden = Golden(name)
    index, size = golden.meta["t"], golden.meta["classes_per_task"]
    task = Task(index, (size,) * (index + 1))
    features, old_features = tensor(golden, "features", grad=True), tensor(golden, "ref_features")
    head = Cosine(features.shape[1])
    for _ in range(index + 1):
        head.grow(size)
    with torch.no_grad():
        head.scale.copy_(tensor(golden, "sigma"))
        for block, weights in zip(head.blocks, tensor(golden, "weights").split(size), strict=True):
            block.weight.copy_(weights)
    out = Output(*head(features), features, [])
    old = Output(out.logits, out.scores, old_features, []) if index else None
    targets = tensor(golden, "targets")
    step = step_of(out, old, targets, task, Composition(len(targets), 0, index))
    method = LUCIR(
        less_forget=golden.meta["lamb_base"], rank=golden.meta["lamb_mr"],
        rank_margin=golden.meta["dist"], rank_k=golden.meta["K"],
    )  # fmt: skip
    terms = method.loss(step)
    check(terms["ce"], tensor(golden, "loss_ce_only"), FLOAT32, "ce")
    check(sum(terms.values()) - terms.get("rank", 0), tensor(golden, "loss_no_margin"), FLOAT32, "without rank")
    found = {"grad_features": features, "grad_sigma": head.scale}
    blocks = [block.weight for block in head.blocks]
    gradients = torch.cat(torch.autograd.grad(sum(terms.values()), blocks, retain_graph=True))
    check(gradients, tensor(golden, "grad_weights"), FLOAT32, "grad_weights")
    held(golden, sum(terms.values()), "loss_total", found)


def maps_of(golden: Golden, which: str, *, grad: bool = False) -> list[Tensor]:
    return [tensor(golden, f"{which}_att{j}", grad=grad) for j in range(len(golden.meta["shapes"]))]


@pytest.mark.parametrize("name", names("loss_podnet_afc"))
def test_map_distances(name: str) -> None:
    golden = Golden(name)
    new, old = maps_of(golden, "new", grad=True), maps_of(golden, "old")
    for pooling in losses.POOLINGS:
        check(losses.pod(new, old, pooling), tensor(golden, f"pod_{pooling}"), FLOAT32, pooling)
    grads = {f"pod_spatial_grad{j}": each for j, each in enumerate(new)}
    held(golden, losses.pod(new, old), "pod_spatial", grads)
    weights = [tensor(golden, f"importance{j}") for j in range(len(new))]
    grads = {f"afc_grad{j}": each for j, each in enumerate(new)}
    held(golden, losses.weighted_map_distance(new, old, weights), "afc_loss", grads)
    features = tensor(golden, "new_features", grad=True)
    flat = losses.cosine_distance(features, tensor(golden, "old_features"))
    held(golden, flat, "pod_flat", {"pod_flat_grad": features})


@pytest.mark.parametrize("name", names("loss_podnet_afc"))
def test_podnet_and_afc_sum_their_terms(name: str) -> None:
    """λ √(seen / new) before every distillation term, nothing before the classification."""
    golden = Golden(name)
    new, old = maps_of(golden, "new"), maps_of(golden, "old")
    logits, targets, task = torch.randn(5, 6), torch.tensor([0, 5, 2, 4, 1]), Task(2, (2, 2, 2))
    embedding = tensor(golden, "new_features"), tensor(golden, "old_features")
    step = step_of(
        Output(logits, logits, embedding[0], new), Output(logits, logits, embedding[1], old), targets, task,
        Composition(5, 0, 2),
    )  # fmt: skip
    weights = {f"importance-{j}": tensor(golden, f"importance{j}") for j in range(len(new))}
    step = Step(step.out, step.old, Past(step.net, weights), step.batch, task, step.phase, step.net)
    strength = math.sqrt(3)
    expected = {
        "pod-spatial": 3 * strength * tensor(golden, "pod_spatial"),
        "pod-flat": strength * tensor(golden, "pod_flat"),
        "importance-weighted": 4 * strength * tensor(golden, "afc_loss"),
        "nca": losses.nca(logits, targets),
    }
    for method, terms in ((PODNet(), ("nca", "pod-spatial", "pod-flat")), (AFC(), ("nca", "importance-weighted"))):
        found = method.loss(step)
        assert tuple(found) == terms
        for term in terms:
            check(found[term], expected[term], FLOAT32, term)


def proxies_of(golden: Golden) -> Proxies:
    weights = tensor(golden, "clf_weights")
    head = Proxies(weights.shape[1], golden.meta["proxies"])
    head.grow(golden.meta["classes"])
    head.imprint(weights)
    with torch.no_grad():
        head.scale.fill_(golden.meta["scale"])
    return head


@pytest.mark.parametrize("name", names("loss_podnet_afc"))
def test_proxies_and_nca(name: str) -> None:
    golden = Golden(name)
    head, features = proxies_of(golden), tensor(golden, "clf_features", grad=True)
    targets = tensor(golden, "clf_targets")
    logits, scores = head(features)
    check(head.similarities(features), tensor(golden, "raw_logits"), FLOAT32, "raw_logits")
    check(scores, tensor(golden, "logits"), FLOAT32, "logits")
    check(F.cross_entropy(logits, targets), tensor(golden, "ce_margin_loss"), FLOAT32, "ce")
    keys = {"nca_grad_features": features, "nca_grad_weights": head.blocks[0].weight, "nca_grad_scale": head.scale}
    held(golden, losses.nca(logits, targets, golden.meta["margin"]), "nca_loss", keys)


@pytest.mark.parametrize("margin", [0.0, 0.6, 5.0])
def test_the_margin_of_nca_is_inert(margin: float) -> None:
    """PODNet's paper takes 0.6 from the true class; its code takes it from all of them, where it cancels."""
    golden = Golden("loss_podnet_afc_1")
    logits = proxies_of(golden)(tensor(golden, "clf_features"))[0].detach().requires_grad_()
    targets = tensor(golden, "clf_targets")
    loss = losses.nca(logits, targets, margin)
    check(loss, tensor(golden, "nca_loss_margin0"), FLOAT32, "nca")
    with_none = torch.autograd.grad(losses.nca(logits, targets), logits)[0]
    check(torch.autograd.grad(loss, logits)[0], with_none, FLOAT32, "gradient")
    # Taken from the true class alone it would matter, so the test can fail.
    moved = losses.nca(logits - 0.6 * F.one_hot(targets, logits.shape[1]), targets)
    assert (moved - loss).abs().item() > 0.1


def test_importance() -> None:
    golden = Golden("afc_importance")
    gradients = [tensor(golden, f"grad{j}") for j in range(len(golden.meta["batches"]))]
    total = torch.stack([losses.channel_importance(gradient) for gradient in gradients]).sum(0)
    check(total, tensor(golden, "accumulated"), FLOAT32, "accumulated")
    check(total / total.mean(), tensor(golden, "normalised"), FLOAT32, "normalised")


def test_ranking_without_an_old_row_or_with_few_new_classes() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.2], [0.7, 0.1, 0.4]], requires_grad=True)
    nothing = losses.margin_ranking(scores, torch.tensor([2, 2]), 2, 2, 0.5)
    assert nothing.item() == 0
    assert torch.autograd.grad(nothing, scores)[0].abs().max() == 0
    # One new class: of the two hardest there is one. max(0, 0.5 - 0.9 + 0.2) and max(0, 0.5 - 0.7 + 0.4).
    found = losses.margin_ranking(scores, torch.tensor([1, 0]), 2, 2, 0.5)
    torch.testing.assert_close(found, torch.tensor(0.1))


Distance = Callable[[Tensor, Tensor], Tensor]


@pytest.mark.parametrize(
    "distance",
    [
        losses.cosine_distance,
        lambda a, b: losses.pod([a.view(4, 2, 2, 2)], [b.view(4, 2, 2, 2)]),
        lambda a, b: losses.weighted_map_distance([a.view(4, 2, 2, 2)], [b.view(4, 2, 2, 2)], [torch.ones(2)]),
        lambda a, b: losses.distill(a, b, 2.0),
    ],
)
def test_equal_tensors_are_at_distance_zero_with_gradient_zero(distance: Distance) -> None:
    """A norm that acts alike in training and evaluation makes student and teacher equal at a task's first step."""
    tensor = torch.randn(4, 8, requires_grad=True)
    value = distance(tensor, tensor.detach().clone())
    assert abs(value.item()) < 1e-6
    assert torch.autograd.grad(value, tensor)[0].abs().max() < 1e-6
