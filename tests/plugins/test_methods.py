"""What single methods do beside their losses: how they start, in which phases they learn, what they remember."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cilnorm import hookspecs
from cilnorm.batch import Batch, Composition, Task
from cilnorm.experiment.runner import run
from cilnorm.losses import nca
from cilnorm.method import Past, Phase, Schedule, Step
from cilnorm.network import Network, Output
from cilnorm.registry import Registry, load
from cilnorm.spec import Settings, read_settings, resolve
from cilnorm_methods.afc import AFC
from cilnorm_methods.der_plus_plus import DERPlusPlus
from cilnorm_methods.eeil import EEIL
from cilnorm_methods.er_ace import ERACE
from cilnorm_methods.icarl import ICaRL
from cilnorm_methods.lucir import LUCIR
from cilnorm_methods.podnet import PODNet
from cilnorm_methods.ssil import SSIL
from cilnorm_methods.wa import WA
from tests import fake
from tests.conftest import TINY

SECOND = Task(1, (3, 2))


def lucir_net(method: LUCIR, embeddings: list[Tensor]) -> Network:
    torch.manual_seed(0)
    net = Network(nn.Linear(3, 4), method.head(4))
    method.grow(net, Task(0, (3, 2)), lambda: pytest.fail("the first task has nothing to look at"))
    method.grow(net, SECOND, lambda: embeddings)
    return net


def test_lucir_imprints_the_mean_direction() -> None:
    embeddings = [torch.randn(7, 4) + 1, 5 * torch.randn(9, 4) - 2]
    net = lucir_net(LUCIR(), embeddings)
    old, new = (block.weight.detach() for block in net.head.blocks)
    length = sum(float(row.square().sum()) ** 0.5 for row in old) / len(old)
    for row, of_class in zip(new, embeddings, strict=True):
        direction = sum(x / x.square().sum().sqrt() for x in of_class)
        torch.testing.assert_close(row, length * direction / direction.square().sum().sqrt())


def test_lucir_without_imprinting_starts_at_random_and_looks_at_nothing() -> None:
    net = lucir_net(LUCIR(imprint=False), [])
    assert net.head.blocks[1].weight.shape == (2, 4)


def test_lucirs_optional_phase_trains_the_classifier_alone() -> None:
    """Its ImageNet script: 20 of 90 epochs at a tenth of the rate, a tenth of that from the tenth on."""
    assert LUCIR().phases(SECOND) == (Phase(),)
    method = LUCIR(balanced_epochs=20 / 90)
    assert method.phases(Task(0, (3, 2))) == (Phase(),)
    _, tail = method.phases(SECOND)
    assert (tail.rows, tail.backbone) == ("balanced", "eval")
    schedule = tail.schedule_in(Schedule(90, 0.1, milestones=(30, 60)))
    assert [schedule.rate(epoch) for epoch in (0, 9, 10, 19)] == pytest.approx([0.01, 0.01, 0.001, 0.001])
    assert schedule.epochs == 20
    net = lucir_net(method, [torch.randn(5, 4)] * 2)
    assert [id(p) for p in method.parameters(net, tail)] == [id(p) for p in net.head.parameters()]


def test_eeils_phases() -> None:
    """120 balanced epochs at 0.01 after 160 at 0.1; released: 40 at 0.001, not balanced."""
    released = EEIL(balanced_epochs=0.25, balanced_lr=0.01, balanced_rows="doubled", gradient_noise=0.3)
    for method, rows, epochs, rate in ((EEIL(), "balanced", 120, 0.1), (released, "doubled", 40, 0.01)):
        main, tail = method.phases(SECOND)
        run = Schedule(160, 0.1, milestones=(80, 120), clip=10000)
        assert main.schedule_in(run) == run
        assert tail.schedule_in(run) == Schedule(epochs, 0.1 * rate, clip=10000)
        assert (main.rows, tail.rows) == ("mixed", rows)
        assert main.gradient_noise == tail.gradient_noise == method.gradient_noise
        assert len(method.phases(Task(0, (3, 2)))) == 1


class Maps(nn.Module):
    """Two maps and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        first = self.norm(self.a(images))
        second = self.b(first.relu())
        return second.mean((2, 3)), [first, second]


def test_afc_measures_on_batch_statistics_and_moves_none() -> None:
    torch.manual_seed(0)
    method = AFC(proxies=2)
    net = Network(Maps(), method.head(5)).eval().requires_grad_(False)
    method.grow(net, Task(0, (3,)), list)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    batches = [Batch(torch.randn(n, 3, 2, 2), torch.tensor([0, 1, 2] * 2)[:n], Composition(n, 0, 0)) for n in (6, 4)]
    past = method.remember(net, Task(0, (3,)), lambda: batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in past.net.state_dict().items())

    slow = copy.deepcopy(net).train()
    sums = [torch.zeros(4), torch.zeros(5)]
    for batch in batches:
        noise = [torch.zeros_like(each, requires_grad=True) for each in slow(batch.images).maps]
        first = slow.backbone.norm(slow.backbone.a(batch.images)) + noise[0]
        second = slow.backbone.b(first.relu()) + noise[1]
        nca(slow.head(second.mean((2, 3)))[0], batch.targets).backward()
        for total, each in zip(sums, noise, strict=True):
            for row in each.grad:
                total += torch.stack([plane.square().sum() for plane in row]) / len(batch.targets)
    for stage, total in enumerate(sums):
        torch.testing.assert_close(past.tensors[f"importance-{stage}"], total / total.mean())
        assert past.tensors[f"importance-{stage}"].std() > 0.05


def test_afc_measures_on_current_and_remembered_images_without_a_cut(tmp_path: Path) -> None:
    seen: list[list[Batch]] = []

    class Watching(AFC):
        def remember(self, net: Network, task: Task, batches: Callable[[], Iterable[Batch]]) -> Past:
            seen.append(list(batches()))
            return super().remember(net, task, lambda: seen[-1])

    class Plugin:
        @hookspecs.hookimpl
        def cilnorm_methods(self) -> list[hookspecs.Method]:
            return [hookspecs.Method("watching", Watching)]

    registry = load(extra=[fake, Plugin()], strict=True)
    spec = resolve("tiny", registry, Settings({"tiny": TINY}, {}), method="watching", norm="tbbn", tasks=2)
    run(spec, tmp_path / "run", device="cpu", registry=registry)
    for task, batches in enumerate(seen):
        assert {batch.composition for batch in batches} == {Composition(16, 0, task)}
        assert len(batches) == -(-(72 + 24 * task) // 16)
    assert set(torch.cat([batch.targets for batch in seen[1]]).tolist()) == set(range(6))


@pytest.mark.parametrize(
    ("name", "fields", "protocol"),
    [
        (
            "eeil",
            {"distil_newest": False, "balanced_rows": "doubled", "balanced_epochs": 0.25},
            {"current_rows": "union", "drop_last": True},
        ),
        ("lucir", {"imprint": False}, {"current_rows": "union", "drop_last": False}),
        ("ssil", {"distilled": "newest"}, {"current_rows": "task", "drop_last": False, "epoch": "cycle"}),
        ("podnet", {}, {"herding": "icarl", "herd_again": False, "budget": "floor", "keep": "last"}),
        ("afc", {}, {"herding": "icarl", "epoch": "passes", "validation": 0.0, "test_images": "all"}),
        ("der++", {}, {"herding": "greedy", "epoch": "passes", "keep": "last", "budget": "floor"}),
        ("er-ace", {"highest": True, "cosine": True}, {"herding": "greedy", "epoch": "passes", "budget": "floor"}),
        ("icarl", {"last_relu": False}, {"herding": "icarl", "epoch": "passes", "budget": "ceil", "herd_again": False}),
        ("wa", {}, {"herding": "greedy", "epoch": "passes", "keep": "last", "budget": "floor"}),
    ],
)
def test_the_released_protocol(registry: Registry, name: str, fields: dict[str, Any], protocol: dict[str, Any]) -> None:
    settings = Settings({"tiny": TINY}, {})
    spec = resolve("tiny", registry, settings, method=name, protocol="released")
    assert {key: spec.method_options[key] for key in fields} == fields
    assert {key: getattr(spec.protocol, key) for key in protocol} == protocol
    corrected = resolve("tiny", registry, settings, method=name)
    assert all(corrected.method_options[key] != value for key, value in fields.items())


@pytest.mark.parametrize("preset", ["cifar100", "cifar100-momentum"])
@pytest.mark.parametrize("name", ["podnet", "afc"])
def test_the_authors_schedule_on_cifar100(registry: Registry, name: str, preset: str) -> None:
    """160 epochs of cosine annealing from 0.1, momentum 0.9, weight decay 5e-4, gradients clamped at 5."""
    schedule = resolve(preset, registry, method=name).schedule
    assert (schedule.epochs, schedule.lr, schedule.momentum, schedule.weight_decay) == (160, 0.1, 0.9, 5e-4)
    assert (schedule.annealing, schedule.clamp, schedule.clip) == ("cosine", 5.0, 0.0)
    assert resolve(preset, registry, method="eeil").schedule.annealing == "steps"
    assert resolve(preset, registry, method="lucir").schedule.clip == 0


@pytest.mark.parametrize("method", [LUCIR, PODNet, AFC])
def test_the_scale_starts_at_one_unless_told_otherwise(method: type[LUCIR] | type[PODNet] | type[AFC]) -> None:
    assert method().head(4).scale.tolist() == [1]
    assert method(scale=5.0).head(4).scale.tolist() == [5]


def test_aliases(registry: Registry) -> None:
    builds = {"ss-il": SSIL, "ucir": LUCIR, "eeil": EEIL, "podnet": PODNet, "afc": AFC}
    assert {name: registry.methods[name].build for name in builds} == builds


def test_wa_clips_weights_after_each_step_and_not_those_of_pycil() -> None:
    for method in (WA(), WA(bias=True, non_negative=False)):
        torch.manual_seed(0)
        net = Network(nn.Linear(3, 4), method.head(4))
        method.grow(net, Task(0, (3,)), list)
        assert (net.head.blocks[0].bias is not None) is method.bias
        before = net.head.weights.detach().clone()
        net.head.constrain()
        assert torch.equal(net.head.weights, before.clamp(min=0) if method.non_negative else before)
        assert before.min() < 0


def test_wa_tests_teaches_and_goes_on_with_the_aligned_network(tmp_path: Path) -> None:
    """Rows of every block are as long as the first block's, on average, once a task has ended."""
    registry = load(extra=[fake], strict=True)
    spec = resolve("tiny", registry, Settings({"tiny": TINY}, {}), method="wa", norm="tbbn", tasks=3)
    result = run(spec, tmp_path / "run", device="cpu", registry=registry)
    saved = torch.load(result.folder / "checkpoints" / "last.pt", weights_only=True)
    for state in (saved["net"], saved["past"]):
        rows = [state[f"head.blocks.{task}.weight"].norm(dim=1) for task in range(3)]
        torch.testing.assert_close(rows[2].mean(), torch.cat(rows[:2]).mean())
        assert all((state[f"head.blocks.{task}.weight"] >= 0).all() for task in range(3))
        assert "head.blocks.0.bias" not in state


def ace_terms(method: ERACE, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Of a batch in the second of two tasks of three classes."""
    nothing = torch.empty(0)
    step = Step(
        Output(logits, logits, nothing, []), None, None, Batch(nothing, targets, Composition(3, 0, 1)),
        Task(1, (3, 3)), Phase(), Network(nn.Identity(), ERACE().head(2)),
    )  # fmt: skip
    return method.loss(step)


@pytest.mark.parametrize(
    ("options", "pushed"),
    [
        ({}, {3}),
        ({"highest": True}, {3, 5}),
        ({"competing": "task"}, {3, 4, 5}),
    ],
)
def test_whom_current_rows_of_er_ace_push_down(options: dict[str, Any], pushed: set[int]) -> None:
    """The rows are two of class 3, whichever their order, and one of class 1."""
    for order in ([0, 1, 2], [1, 2, 0]):
        targets = torch.tensor([3, 3, 1])[order]
        logits = torch.randn(3, 6, requires_grad=True)
        terms = ace_terms(ERACE(**options, buffer="past"), logits, targets)
        current, buffer = (
            torch.autograd.grad(terms[f"ce-{kind}"], logits, retain_graph=True)[0] for kind in ("current", "buffer")
        )
        moved = {int(column) for column in current.abs().sum(0).nonzero()[:, 0]}
        assert moved == (pushed if len(pushed) > 1 else set())  # a class that competes with nobody is not moved
        assert not current[targets == 1].any()
        assert not buffer[targets == 3].any()
        assert buffer[targets == 1].all(), "stored rows see every class"


def test_the_buffer_of_er_ace_has_new_classes_in_their_share() -> None:
    logits = torch.randn(5, 6, dtype=torch.float64)
    targets = torch.tensor([3, 4, 3, 1, 0])
    found = ace_terms(ERACE(), logits, targets)["ce-buffer"]
    new, old = F.cross_entropy(logits[:3], targets[:3]), F.cross_entropy(logits[3:], targets[3:])
    torch.testing.assert_close(found, (new + old) / 2)  # three new classes of six
    without = ace_terms(ERACE(), logits[:3], targets[:3])["ce-buffer"]
    torch.testing.assert_close(without, new / 2)


def test_icarl_predicts_by_nearest_means_in_every_preset_of_ours(registry: Registry) -> None:
    for preset in read_settings().presets:
        assert resolve(preset, registry, method="icarl").classifier == "nme"
        assert resolve(preset, registry, method="icarl", classifier="head").classifier == "head"
        assert resolve(preset, registry, method="ft").classifier == "head"


def test_the_embedding_of_icarls_authors_is_signed() -> None:
    assert [ICaRL().signed_embedding, ICaRL(last_relu=False).signed_embedding] == [False, True]
    assert [ERACE().signed_embedding, LUCIR().signed_embedding] == [False, True]


def test_icarls_mean_over_classes() -> None:
    logits, targets = torch.randn(4, 5), torch.tensor([0, 3, 4, 1])
    nothing, net = torch.empty(0), Network(nn.Identity(), ICaRL().head(2))
    teacher = Output(torch.randn(4, 2), logits, nothing, [])
    step = Step(
        Output(logits, logits, nothing, []), teacher, Past(net), Batch(nothing, targets, Composition(2, 2, 1)),
        Task(1, (2, 3, 5)), Phase(), net,
    )  # fmt: skip
    of_all, of_seen = (sum(ICaRL(divisor=name).loss(step).values()) for name in ("all", "seen"))
    torch.testing.assert_close(of_seen, 2 * of_all)
    wanted = torch.cat([teacher.logits.sigmoid(), torch.eye(5)[targets][:, 2:]], dim=1)
    torch.testing.assert_close(of_seen, nn.functional.binary_cross_entropy(logits.sigmoid(), wanted))


def test_der_plus_plus_takes_half_of_the_past_rows_for_each_term_or_all_for_both() -> None:
    """Whatever the order of rows; outputs that an image did not know when it was stored add nothing to the mean."""
    targets, nothing = torch.tensor([0, 4, 1, 3, 5, 2, 1]), torch.empty(0)
    logits, stored = torch.randn(7, 6, requires_grad=True), torch.randn(7, 4)
    stored[targets < 2, 2:] = torch.nan
    stored[targets > 3] = torch.nan
    net = Network(nn.Identity(), DERPlusPlus().head(2))
    batch = Batch(nothing, targets, Composition(2, 5, 1), {"logits": stored})
    step = Step(Output(logits, logits, nothing, []), None, None, batch, Task(2, (2, 2, 2)), Phase(), net)
    squares = (logits[:, :4] - stored).square()
    for draws, first, second in (("half", [0, 2], [3, 5, 6]), ("same", [0, 2, 3, 5, 6], [0, 2, 3, 5, 6])):
        terms = DERPlusPlus(draws=draws).loss(step)  # type: ignore[arg-type]
        torch.testing.assert_close(terms["mse"], 0.3 * squares[first].nansum() / (len(first) * 6))
        ce = nn.functional.cross_entropy(logits[second], targets[second])
        torch.testing.assert_close(terms["ce-past"], 0.5 * ce)
        torch.testing.assert_close(terms["ce"], nn.functional.cross_entropy(logits[[1, 4]], targets[[1, 4]]))
        assert torch.autograd.grad(sum(terms.values()), logits, retain_graph=True)[0].isfinite().all()
