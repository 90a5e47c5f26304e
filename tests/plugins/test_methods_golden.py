"""Objectives, classifiers and corrections of further methods against what their authors' or PyCIL's code computed.

All in float64, to 1e-10.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cilnorm.batch import Batch, Composition, Task
from cilnorm.experiment.evaluation import class_means, embed, predict
from cilnorm.heads import BiasCorrected, FixedCosine, Linear, align
from cilnorm.method import Method, Past, Phase, Step
from cilnorm.network import Network, Output
from cilnorm.training.memory import Memory, herd_icarl, per_class
from cilnorm.training.pixels import Augmentation
from cilnorm_methods.bic import BiC
from cilnorm_methods.der_plus_plus import DERPlusPlus
from cilnorm_methods.er_ace import ERACE
from cilnorm_methods.icarl import ICaRL
from cilnorm_methods.wa import WA
from tests.golden import METHODS, Golden, check, names

EXACT = 1e-10
NOTHING = torch.empty(0)
BIAS = Phase("bias")


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
        found = torch.autograd.grad(next(iter(values.values())), list(gradients.values()), retain_graph=True)
        for key, gradient in zip(gradients, found, strict=True):
            check(gradient, golden.expected(key, torch.float64), EXACT, key)


def task_of(golden: Golden) -> Task:
    """The task at hand, as one of two: all classes before it, and its own."""
    known, total = golden.meta["known"], golden.meta["total"]
    return Task(1, (known, total - known)) if known else Task(0, (total,))


def terms_of(
    method: Method,
    logits: Tensor,
    old_logits: Tensor | None,
    targets: Tensor,
    task: Task,
    phase: Phase | None = None,
    stored: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """A method's terms where its objective sees logits alone, the teacher's, and what is stored beside images."""
    net = Network(nn.Identity(), Linear(2))
    old = None if old_logits is None else Output(old_logits, old_logits, NOTHING, [])
    composition = Composition.of_one_kind(len(targets), task.index)
    step = Step(
        Output(logits, logits, NOTHING, []), old, None if old is None else Past(net),
        Batch(NOTHING, targets, composition, stored or {}), task, phase or Phase(), net,
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
    """Mammoth's: no mask in the first task, nor replay; buffers that have new classes by chance are passed over."""
    golden = Golden(name, METHODS)
    method, task = ERACE(mask_first_task=False, highest=True, buffer="past"), ace_task(golden, old)
    logits, buffered = tensor(golden, "logits", grad=True), tensor(golden, "buffer_logits", grad=True)
    targets, stored = tensor(golden, "targets"), tensor(golden, "buffer_targets")
    terms = terms_of(method, logits, None, targets, task)
    held(golden, {"loss_current": terms["ce-current"]}, {"grad_logits": logits})
    if not task.index:
        assert "ce-buffer" not in terms
    elif int(stored.max()) < old:
        assert terms["ce-buffer"].item() == 0
        terms = terms_of(method, torch.cat([logits, buffered]), None, torch.cat([targets, stored]), task)
        gradients = {"grad_logits": logits, "grad_buffer_logits": buffered}
        held(golden, {"loss": sum(terms.values()), "loss_buffer": terms["ce-buffer"]}, gradients)


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


@pytest.mark.parametrize("name", files("icarl_loss"))
def test_icarl_of_pycil(name: str) -> None:
    golden = Golden(name, METHODS)
    logits, old_logits = tensor(golden, "logits", grad=True), tensor(golden, "old_logits")
    method = ICaRL(objective="softmax", temperature=golden.meta["temperature"])
    terms = terms_of(method, logits, old_logits, tensor(golden, "targets"), task_of(golden))
    parts = {"loss_clf": terms["ce"], "loss_kd": terms["distill"]}
    held(golden, {"loss": sum(terms.values()), **parts}, {"grad_logits": logits})


@pytest.mark.parametrize("name", files("icarl_bce"))
def test_icarl(name: str) -> None:
    """With an output for every class from the start, as the authors have it: those to come are 0 for every row."""
    golden = Golden(name, METHODS)
    known, total, outputs = (golden.meta[key] for key in ("known", "total", "outputs"))
    sizes = (known, total - known, outputs - total) if known else (total, outputs - total)
    logits = tensor(golden, "logits", grad=True)
    old_logits = tensor(golden, "old_logits") if known else None
    terms = terms_of(ICaRL(), logits, old_logits, tensor(golden, "targets"), Task(len(sizes) - 2, sizes))
    assert list(terms) == (["bce", "distill"] if known else ["bce"])
    held(golden, {"loss": sum(terms.values())}, {"grad_logits": logits})


@pytest.mark.parametrize("name", files("herding_original"))
def test_the_herding_of_icarls_authors(name: str) -> None:
    golden = Golden(name, METHODS)
    assert herd_icarl(tensor(golden, "features"), golden.meta["m"]).tolist() == golden.arrays["order"].tolist()


class Plain:
    """Images that are what they are; mirrored ones count for the means if ``flip`` says so."""

    def __init__(self, images: Tensor, flip: bool) -> None:
        self.images, self.augmentation = images, Augmentation(flip=flip)

    def clean_parts(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        return (self.images[indices] for indices in parts)


class Map(nn.Module):
    """A linear map of flattened images."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        return images.flatten(1) @ self.weight, []


def net_of(weight: Tensor) -> Network:
    net = Network(Map(weight), Linear(weight.shape[1]))
    net.head.grow(1)
    return net.double()


def test_the_means_of_icarl_count_mirror_images() -> None:
    golden = Golden("icarl_means_flipped_0", METHODS)
    labels, images = tensor(golden, "labels"), tensor(golden, "exemplars")
    of_class = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    means = class_means(net_of(tensor(golden, "network")), Plain(images, flip=True), of_class)  # type: ignore[arg-type]
    held(golden, {"class_means": means})


@pytest.mark.parametrize("name", files("herding_0") + files("herding_1") + files("herding_2"))
def test_the_memory_and_the_nearest_means_of_pycil(name: str) -> None:
    """Lists are cut as tasks come, chosen once, and their means follow the network."""
    golden = Golden(name, METHODS)
    samples, labels, queries = (tensor(golden, key) for key in ("samples", "labels", "queries"))
    pixels = Plain(torch.cat([samples, queries]).unsqueeze(1).unsqueeze(1), flip=False)
    memory, first = Memory(), 0
    for index, classes in enumerate(golden.meta["task_classes"]):
        net = net_of(tensor(golden, f"t{index}_network"))
        candidates = [(labels == label).nonzero()[:, 0] for label in range(first, first + classes)]
        first += classes
        budget, fixed = golden.meta["memory_size"], golden.meta["fixed_per_class"]
        count = fixed or per_class(budget, first)
        assert count == golden.meta["per_class"][index]
        memory = memory.collect(candidates, embed(net, pixels), count, "greedy", False)  # type: ignore[arg-type]
        assert memory.indices.tolist() == golden.arrays[f"t{index}_memory"].tolist()
        means = class_means(net, pixels, memory.exemplars)  # type: ignore[arg-type]
        check(means, tensor(golden, f"t{index}_class_means64"), 1e-8, "means")  # PyCIL adds 1e-8 to lengths
        rows = torch.arange(len(queries)) + len(samples)
        nearest = predict(net, pixels, rows, means)  # type: ignore[arg-type]
        assert nearest.tolist() == golden.arrays[f"t{index}_nme_top"][:, 0].tolist()


def test_der_plus_plus() -> None:
    """Its rows of the buffer hold new classes too, so the terms are taken apart: a row is past by its label."""
    golden = Golden("derpp_0", METHODS)
    logits, first, second = (tensor(golden, key, grad=True) for key in ("logits", "mse_logits", "ce_logits"))
    classes, labels = golden.meta["classes"], tensor(golden, "ce_targets")
    method = DERPlusPlus(golden.meta["alpha"], golden.meta["beta"])
    current = terms_of(method, logits, None, tensor(golden, "targets"), Task(0, (classes,)))
    stored = torch.cat([tensor(golden, "stored_logits"), torch.full_like(second, torch.nan)])
    past = terms_of(
        method, torch.cat([first, second]), None, torch.cat([labels.flip(0), labels]), Task(1, (classes, 0)),
        stored={"logits": stored},
    )  # fmt: skip
    assert past["ce"].item() == 0
    parts = {
        "loss_current": current["ce"],
        "mse": past["mse"] / method.logits,
        "ce_buffer": past["ce-past"] / method.labels,
    }
    gradients = {"grad_logits": logits, "grad_mse_logits": first, "grad_ce_logits": second}
    held(golden, {"loss": sum([*current.values(), *past.values()]), **parts}, gradients)


def test_der_plus_plus_before_anything_is_stored() -> None:
    golden = Golden("derpp_1", METHODS)
    logits = tensor(golden, "logits", grad=True)
    terms = terms_of(DERPlusPlus(), logits, None, tensor(golden, "targets"), Task(0, (golden.meta["classes"],)))
    held(golden, {"loss": sum(terms.values()), "loss_current": terms["ce"]}, {"grad_logits": logits})


def test_der_plus_plus_in_one_pass_over_halves() -> None:
    golden = Golden("derpp_one_forward_0", METHODS)
    logits, targets = tensor(golden, "logits", grad=True), tensor(golden, "targets")
    method, task = DERPlusPlus(golden.meta["alpha"], golden.meta["beta"]), Task(1, (logits.shape[1], 0))
    stored = {"logits": tensor(golden, "stored_logits")}
    terms = terms_of(method, logits, None, targets, task, stored=stored)
    held(golden, {"loss_replay": sum(terms.values())}, {"grad_logits": logits})


@pytest.mark.parametrize(("outputs", "share"), [("all", 0.25), ("stored", 1.0)])
def test_der_plus_plus_averages_over_all_outputs_of_the_stream_as_where_they_exist_from_the_start(
    outputs: Any, share: float
) -> None:
    """The rows that are stored know a quarter of the outputs; the others add nothing."""
    torch.manual_seed(0)
    logits, stored = torch.randn(6, 6), torch.cat([torch.randn(6, 3), torch.full((6, 3), torch.nan)], 1)
    terms = terms_of(
        DERPlusPlus(outputs=outputs, draws="same"), logits, None, torch.tensor([4, 5, 0, 1, 2, 0]),
        Task(1, (3, 3, 6)), stored={"logits": stored},
    )  # fmt: skip
    squares = (logits[2:, :3] - stored[2:, :3]).square()
    torch.testing.assert_close(terms["mse"], 0.3 * share * squares.mean())


def corrections(golden: Golden, sizes: tuple[int, ...], start: str = "") -> BiasCorrected:
    """A classifier of blocks of these sizes with the α and β that are stored."""
    head = BiasCorrected(2)
    for index, size in enumerate(sizes):
        head.grow(size)
        for name in ("alpha", "beta"):
            getattr(head.corrections[index], name).data = tensor(golden, start + name)[index : index + 1].clone()
    return head


def numbers(head: BiasCorrected) -> tuple[list[Tensor], list[Tensor]]:
    """Every α and every β."""
    return [each.alpha for each in head.corrections], [each.beta for each in head.corrections]


@pytest.mark.parametrize("name", [name for name in files("bic") if "pytorch" not in name])
def test_bic(name: str) -> None:
    golden = Golden(name, METHODS)
    sizes = tuple(golden.meta["task_sizes"])
    head, task = corrections(golden, sizes), Task(len(sizes) - 1, sizes)
    raw, targets = tensor(golden, "raw_logits", grad=True), tensor(golden, "targets")
    logits = head.correct(raw)
    held(golden, {"corrected_logits": logits})
    method = BiC(temperature=golden.meta["temperature"])
    terms = terms_of(method, logits, tensor(golden, "old_logits"), targets, task)
    parts = {"stage1_loss_clf": terms["ce"] / (1 - golden.meta["lamda"])}
    held(golden, {"stage1_loss": sum(terms.values()), **parts}, {"stage1_grad_raw_logits": raw})
    for double, kind in ((True, "double_softmax"), (False, "correct")):
        loss = sum(terms_of(BiC(double_softmax=double), head.correct(raw), None, targets, task, BIAS).values())
        held(golden, {f"stage2_{kind}_loss": loss})
        alphas, betas = numbers(head)
        found = torch.autograd.grad(loss, [raw, *alphas, *betas])
        check(found[0], golden.expected(f"stage2_{kind}_grad_raw_logits", torch.float64), EXACT, kind)
        gradients = torch.cat(found[1:]).chunk(2)
        for which, gradient in zip(("alpha", "beta"), gradients, strict=True):
            check(gradient, golden.expected(f"stage2_{kind}_grad_{which}", torch.float64), EXACT, f"{kind} {which}")


@pytest.mark.parametrize("name", [name for name in files("bic") if "pytorch" not in name])
def test_the_second_stage_of_pycils_bic(name: str) -> None:
    """Some steps of SGD with momentum, whose weight decay pulls at α and β of the newest task."""
    golden = Golden(name, METHODS)
    sizes, meta = tuple(golden.meta["task_sizes"]), golden.meta
    head, task = corrections(golden, sizes, "start_"), Task(len(sizes) - 1, sizes)
    moving = list(BiC().parameters(Network(nn.Identity(), head), BIAS))
    raw, targets = tensor(golden, "raw_logits"), tensor(golden, "targets")
    optimizer = torch.optim.SGD(
        moving, meta["after_lr"], meta["after_momentum"], weight_decay=meta["after_weight_decay"]
    )
    for _ in range(meta["after_steps"]):
        optimizer.zero_grad()
        terms = terms_of(BiC(double_softmax=True), head.correct(raw), None, targets, task, BIAS)
        sum(terms.values()).backward()
        optimizer.step()
    alphas, betas = numbers(head)
    held(golden, {"after_alpha": torch.cat(alphas), "after_beta": torch.cat(betas)})


def test_bic_of_another_port() -> None:
    """sairin1202's: τ² KD without a weight of its own, and a second stage without the double softmax."""
    golden = Golden("bic_pytorch_0", METHODS)
    known, total, size = (golden.meta[key] for key in ("known", "total", "task_size"))
    head = corrections(golden, (size,) * 5)
    raw, targets = tensor(golden, "raw_logits", grad=True), tensor(golden, "targets")
    logits, old = head.correct(raw), head.correct(tensor(golden, "old_raw_logits"))
    held(golden, {"corrected_logits": logits})
    method, task = BiC(temperature=golden.meta["temperature"]), Task(1, (known, total - known))
    terms = terms_of(method, logits[:, :total], old[:, :known].detach(), targets, task)
    loss = golden.meta["temperature"] ** 2 * terms["distill"] / (known / total) + terms["ce"]
    held(golden, {"stage1_loss": loss}, {"stage1_grad_raw_logits": raw})
    loss = terms_of(method, logits[:, :total], None, targets, task, BIAS)["ce"]
    newest = head.corrections[1]
    held(golden, {"stage2_loss": loss}, {"stage2_grad_alpha_last": newest.alpha, "stage2_grad_beta_last": newest.beta})
