"""The two phases of BiC: what moves, what the norms keep, and what the double softmax of PyCIL's port does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cilnorm.batch import Batch, Composition, Task
from cilnorm.experiment import runner
from cilnorm.heads import BiasCorrected
from cilnorm.method import Phase, Schedule, Step
from cilnorm.network import Network, Output
from cilnorm.registry import Registry
from cilnorm.spec import Spec
from cilnorm.training.engine import Engine
from cilnorm_methods.bic import BiC

Tiny = Callable[..., Spec]
State = dict[str, Tensor]


def test_its_phases() -> None:
    method, run = BiC(), Schedule(250, 0.1, momentum=0.9, milestones=(100, 150, 200))
    assert method.phases(Task(0, (3, 2))) == (Phase(),)
    main, bias = method.phases(Task(1, (3, 2)))
    assert (main.rows, main.held_out, bias.rows, bias.held_out, bias.backbone) == (
        "mixed",
        0.1,
        "held-out",
        0.1,
        "batch",
    )
    assert main.schedule_in(run) == bias.schedule_in(run) == run
    slower = BiC(correction_lr=0.05).phases(Task(1, (3, 2)))[1].schedule_in(run)
    assert (slower.epochs, slower.lr) == (run.epochs, pytest.approx(run.lr / 20))
    longer = BiC(correction_epochs=2.0).phases(Task(1, (3, 2)))[1].schedule_in(run)
    assert (longer.epochs, longer.milestones, longer.lr) == (500, (200, 300, 400), 0.1)


@pytest.mark.parametrize("mode", ["batch", "train", "eval"])
def test_the_correction_moves_its_two_numbers_and_perhaps_statistics(
    tiny: Tiny, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    phases: list[tuple[str, State, State]] = []

    class Recorder(Engine):
        def start_epoch(self, *arguments: Any) -> None:
            super().start_epoch(*arguments)
            assert self.net.backbone.training is (self.phase.backbone != "eval")
            self.before = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}

        def finish_epoch(self) -> dict[str, float]:
            phases.append((self.phase.name, self.before, {k: v.clone() for k, v in self.net.state_dict().items()}))
            return super().finish_epoch()

    monkeypatch.setattr(runner, "engine_class", lambda *_: Recorder)
    spec = tiny(method="bic", norm="tbbn", epochs=1, correction_norms=mode)
    runner.run(spec, tmp_path / "run", device="cpu", registry=registry)
    assert [name for name, _, _ in phases] == ["main", "main", "bias", "main", "bias"]
    for number, (name, before, after) in enumerate(phases):
        changed = {key for key, tensor in before.items() if not torch.equal(tensor, after[key])}
        if name == "main":
            assert not any("corrections" in key for key in changed)
            assert "backbone.norm.running_mean" in changed
            continue
        newest = f"head.corrections.{number // 2}."
        statistics = {"running_mean", "running_var", "num_batches_tracked"} if mode == "train" else set()
        assert changed == {newest + "alpha", newest + "beta", *(f"backbone.norm.{each}" for each in statistics)}


def steps_of(double: bool) -> tuple[float, float]:
    """α of the new task after the second phase on confident logits, and how many new rows are still right, in percent.

    Ninety old classes and ten new ones, whose logits are too large by four.
    """
    torch.manual_seed(0)
    targets = torch.arange(100).repeat(4)
    raw = torch.randn(400, 100)
    raw[torch.arange(400), targets] += 8.0
    raw[:, 90:] += 4.0
    head = BiasCorrected(2)
    head.grow(90)
    head.grow(10)
    method, net, nothing = BiC(double_softmax=double), Network(nn.Identity(), head), torch.empty(0)
    optimizer = torch.optim.SGD(method.parameters(net, Phase("bias")), 0.1, 0.9)
    for _ in range(300):
        logits = head.correct(raw)
        batch = Batch(nothing, targets, Composition(400, 0, 1))
        step = Step(Output(logits, raw, nothing, []), None, None, batch, Task(1, (90, 10)), Phase("bias"), net)
        optimizer.zero_grad()
        torch.stack(list(method.loss(step).values())).sum().backward()
        optimizer.step()
    right = head.correct(raw)[targets >= 90].argmax(1) == targets[targets >= 90]
    return float(head.corrections[1].alpha.detach()), 100 * float(right.float().mean())


def test_the_correction_takes_back_what_new_classes_have_too_much() -> None:
    alpha, right = steps_of(double=False)
    assert alpha > 0
    assert right > 99


def test_a_double_softmax_turns_the_new_classes_upside_down() -> None:
    """Its gradient vanishes where rows are confident, so what is left pushes α below 0, and no new row is right."""
    alpha, right = steps_of(double=True)
    assert alpha < 0
    assert right == 0


def test_the_penalty_on_beta() -> None:
    head, nothing = BiasCorrected(2), torch.empty(0)
    head.grow(2)
    head.grow(2)
    nn.init.constant_(head.corrections[1].beta, 3.0)  # type: ignore[arg-type]
    logits, batch = torch.zeros(2, 4), Batch(nothing, torch.tensor([0, 3]), Composition(2, 0, 1))
    step = Step(
        Output(logits, logits, nothing, []), None, None, batch, Task(1, (2, 2)), Phase("bias"),
        Network(nn.Identity(), head),
    )  # fmt: skip
    assert list(BiC().loss(step)) == ["ce"]
    assert float(BiC(beta_penalty=0.1).loss(step)["beta"]) == pytest.approx(0.1 * 9 / 2)


@pytest.mark.parametrize("decay", [False, True])
def test_weight_decay_pulls_at_the_correction_only_if_asked(decay: bool) -> None:
    class Constant(BiC):
        def loss(self, step: Step) -> dict[str, Tensor]:
            return {"none": 0 * step.out.logits.sum()}

    method = Constant(decay_correction=decay)
    backbone = nn.Sequential(nn.Flatten())
    net = Network(Embedded(backbone), method.head(12))
    for _ in range(2):
        net.head.grow(2)
    engine = Engine(net, method, Task(1, (2, 2)), Phase("bias"), Schedule(1, 0.1, weight_decay=0.5), None)
    engine.start_epoch(0)
    engine.step(Batch(torch.randn(2, 3, 2, 2), torch.tensor([0, 3]), Composition(2, 0, 1)))
    newest = net.head.corrections[1]  # type: ignore[index]
    assert float(newest.alpha) == pytest.approx(0.95 if decay else 1.0)


class Embedded(nn.Module):
    """Images as they are."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.weight = layer, nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.layer(images), [images]
