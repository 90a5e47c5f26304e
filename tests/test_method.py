"""Schedules, tails, and what the engine makes of a phase."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from cilnorm.batch import Batch, Composition, Task
from cilnorm.heads import Cosine, Head, Linear, Proxies
from cilnorm.method import Method, Phase, Schedule, Step, Tail
from cilnorm.network import Network
from cilnorm.training.engine import Engine


def test_cosine_annealing_is_that_of_the_released_code() -> None:
    """torch's closed form, asked for epoch t - 1 before epoch t, so the first two epochs share a rate."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 160)
    schedule = Schedule(160, 0.1, annealing="cosine", milestones=(3,))
    for epoch in range(160):
        assert schedule.rate(epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
        optimizer.step()
        if epoch:
            scheduler.step()
    assert schedule.rate(0) == schedule.rate(1) == 0.1 > schedule.rate(2)


def test_the_first_task_may_take_longer() -> None:
    run = Schedule(8, milestones=(6,), momentum=0.9, first_task=2.5)
    first = run.in_task(0)
    assert (first.epochs, first.milestones, first.momentum) == (20, (15,), 0.9)
    assert run.in_task(1) == run.in_task(9) == run
    short = Schedule(4, milestones=(2,), first_task=0.1).in_task(0)
    assert (short.epochs, short.milestones) == (1, (1,))  # no milestone comes before the first epoch
    for times in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="first_task"):
            Schedule(first_task=times)


def test_the_first_task_may_have_a_schedule_of_its_own() -> None:
    """PyCIL's for iCaRL, WA and DER."""
    run = Schedule(
        170, 0.1, 0.9, 2e-4, milestones=(80, 120),
        first_epochs=200, first_milestones=(60, 120, 170), first_lr=0.2, first_weight_decay=5e-4,
    )  # fmt: skip
    first, later = run.in_task(0), run.in_task(1)
    assert (first.epochs, first.milestones, first.lr, first.weight_decay) == (200, (60, 120, 170), 0.2, 5e-4)
    assert (later.epochs, later.milestones, later.lr, later.weight_decay) == (170, (80, 120), 0.1, 2e-4)
    assert [first.rate(epoch) for epoch in (59, 60, 120, 170)] == pytest.approx([0.2, 0.02, 0.002, 0.0002])
    assert Schedule(5, first_weight_decay=0.0).in_task(0).weight_decay == 0
    for values, message in (
        ({"first_epochs": 0}, "first_epochs must be at least 1, not 0"),
        ({"first_lr": 0.0}, "first_lr must be above 0"),
        ({"first_weight_decay": -1.0}, "first_weight_decay can't be negative"),
        ({"first_epochs": 3, "first_task": 2.0}, "first_epochs and first_task both say how long the first task"),
    ):
        with pytest.raises(ValueError, match=message):
            Schedule(**values)  # type: ignore[arg-type]


def test_a_tail_shrinks_with_the_run() -> None:
    tail = Tail(0.25, 0.01, (0.5,))
    run = Schedule(160, 0.1, momentum=0.9, milestones=(80, 120), gamma=0.2, clip=3.0)
    whole = Schedule(40, 0.001, momentum=0.9, milestones=(20,), gamma=0.2, clip=3.0)
    assert tail.of(run) == Phase(schedule=tail).schedule_in(run) == whole
    assert [tail.of(Schedule(epochs)).epochs for epochs in (1, 2, 10, 40)] == [1, 1, 2, 10]
    own = Schedule(3)
    assert Phase(schedule=own).schedule_in(run) == own
    assert Phase().schedule_in(run) == run


class Backbone(nn.Module):
    dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.norm(self.layer(images))
        return x.mean((2, 3)), [x]


@dataclass(frozen=True)
class Steep(Method):
    """A loss with large gradients; moves the backbone alone in phases that are called so."""

    def parameters(self, net: Network, phase: Phase) -> Iterable[nn.Parameter]:
        return net.backbone.parameters() if phase.name == "backbone" else net.parameters()

    def loss(self, step: Step) -> dict[str, Tensor]:
        return {"steep": 1000 * nn.functional.cross_entropy(step.out.logits, step.batch.targets)}


def trained(phase: Phase, schedule: Schedule, epochs: int = 1, seed: int = 0) -> tuple[Network, Network, Engine]:
    """The network before and after one step an epoch."""
    torch.manual_seed(0)
    net = Network(Backbone(), Linear(4))
    net.head.grow(2)
    before = copy.deepcopy(net)
    batch = Batch(torch.randn(8, 3, 2, 2), torch.tensor([0, 1] * 4), Composition(8, 0, 0))
    engine = Engine(net, Steep(), Task(0, (2,)), phase, schedule, None, seed)
    for epoch in range(epochs):
        engine.start_epoch(epoch)
        engine.step(batch)
    return before, net, engine


def moved(before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    return {name: (b - a).detach() for (name, a), b in pairs if not torch.equal(a, b)}


def test_clamp_bounds_each_entry() -> None:
    schedule = Schedule(lr=1.0, weight_decay=0.0, clamp=0.01)
    steps = torch.cat([change.flatten() for change in moved(*trained(Phase(), schedule)[:2]).values()])
    assert steps.abs().max().item() == pytest.approx(0.01, rel=1e-4)
    free = torch.cat([c.flatten() for c in moved(*trained(Phase(), Schedule(lr=1.0))[:2]).values()])
    assert free.abs().max() > 1


def test_what_a_phase_leaves_out_gets_no_gradient_until_another_moves_it() -> None:
    before, net, _ = trained(Phase("backbone"), Schedule())
    assert {name.partition(".")[0] for name in moved(before, net)} == {"backbone"}
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in net.head.parameters())
    Engine(net, Steep(), Task(0, (2,)), Phase(), Schedule(), None)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_gradient_noise_has_the_size_that_is_asked_for_and_a_stream_of_its_own() -> None:
    def change(eta: float, seed: int = 0, epochs: int = 1) -> Tensor:
        schedule = Schedule(lr=1.0, weight_decay=0.0, clamp=1e-12)  # noise comes after the clamp: it is all there is
        before, net, _ = trained(Phase(gradient_noise=eta), schedule, epochs, seed)
        return torch.cat(
            [(b - a).detach().flatten() for a, b in zip(before.parameters(), net.parameters(), strict=True)]
        )

    noise = change(0.3)
    assert noise.std().item() == pytest.approx(0.3, rel=0.25)
    assert torch.equal(noise, change(0.3))
    assert not torch.equal(noise, change(0.3, seed=1))
    second = change(0.3, epochs=2) - noise
    assert second.std().item() == pytest.approx(0.3 / 2**0.55, rel=0.25)
    assert change(0.0).abs().max() <= 1e-11


@pytest.mark.parametrize(("mode", "still"), [("train", False), ("eval", True)])
def test_the_mode_of_the_backbone(mode: str, still: bool) -> None:
    before, net, engine = trained(Phase(backbone=mode), Schedule())
    assert torch.equal(before.backbone.norm.running_mean, net.backbone.norm.running_mean) is still
    assert engine.net.head.training


@pytest.mark.parametrize("head", [Linear(6), Cosine(6), Proxies(6, 3)])
def test_what_heads_offer(head: Head) -> None:
    rows = 3 if isinstance(head, Proxies) else 1
    for classes in (4, 2):
        head.grow(classes)
    assert head.weights.shape == (6 * rows, 6)
    logits, scores = head(torch.randn(5, 6))
    assert logits.shape == scores.shape == (5, 6)
    shared = [] if isinstance(head, Linear) else [head.scale]
    assert [id(p) for p in head.newest()] == [id(p) for p in (*head.blocks[1].parameters(), *shared)]
    weights = torch.randn(2 * rows, 6)
    old = head.blocks[0].weight.detach().clone()
    head.imprint(weights)
    assert torch.equal(head.weights[4 * rows :], weights)
    assert torch.equal(head.weights[: 4 * rows], old)


def test_cosine_and_proxies_scale_their_scores() -> None:
    for head in (Cosine(6), Proxies(6, 2)):
        head.grow(4)
        nn.init.constant_(head.scale, 3.0)
        logits, scores = head(torch.randn(5, 6))
        torch.testing.assert_close(logits, 3 * scores)


def test_how_weights_start() -> None:
    """Proxies normal with deviation 1/sqrt(dim), cosine weights uniform in +-1/sqrt(dim)."""
    wide = Proxies(400, 10)
    wide.grow(10)
    assert wide.weights.std().item() == pytest.approx(400**-0.5, rel=0.05)
    cosine = Cosine(400)
    cosine.grow(100)
    assert cosine.weights.abs().max().item() == pytest.approx(400**-0.5, rel=0.01)
