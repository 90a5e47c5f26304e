"""Running statistics, switched: frozen after the first task, or measured anew; for every norm that keeps any."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from cilnorm import registry as registries
from cilnorm.batch import Composition
from cilnorm.cli.app import app
from cilnorm.experiment.assembly import assemble, pick_device
from cilnorm.experiment.precise import balanced_rows, precise
from cilnorm.experiment.runner import resume, run
from cilnorm.method import Phase, Schedule
from cilnorm.norms import norm_factory
from cilnorm.registry import Registry
from cilnorm.running import (
    Statistics,
    freeze_statistics,
    frozen_parameters,
    measure_statistics,
    statistics_layers,
)
from cilnorm.spec import Spec, SpecError
from cilnorm.testing.toys import tell as tell_rows_too
from cilnorm.training.engine import Engine

pytestmark = pytest.mark.slow

Tiny = Callable[..., Spec]
NORMS = registries.load().norms
KEEPING = [name for name in NORMS if statistics_layers(norm_factory(name)(8))]


def rows(count: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, 8, 3, 3, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def tell(layer: nn.Module, count: int = 16) -> None:
    """Tells the layer, if it wants to know, of rows without a cut."""
    tell_rows_too(layer, Composition(count, 0, 0))


def trained(name: str) -> nn.Module:
    """A layer that has seen a few batches."""
    layer = norm_factory(name)(8)
    tell(layer)
    for seed in range(3):
        layer(rows(seed=seed))
    return layer


@pytest.mark.parametrize("name", KEEPING)
def test_what_several_measure_is_put_together(name: str) -> None:
    """Batches of two processes, of which one has an odd one; and a third that has none."""
    batches = [rows(count, seed).double() for seed, count in enumerate((16, 15, 16))]
    whole, first, second = (trained(name).double() for _ in range(3))
    measure_statistics(whole, batches, partial(tell, whole))
    lines: list[Tensor] = []

    def gather(line: Tensor) -> list[Tensor]:
        lines.append(line)
        return [*lines, torch.zeros_like(line)]

    measure_statistics(first, batches[::2], partial(tell, first), gather)
    measure_statistics(second, batches[1::2], partial(tell, second), gather)
    assert len(lines) == 2
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[key], value, rtol=1e-12, atol=1e-12, msg=key)


def test_norms_with_running_statistics_are_known_by_their_class() -> None:
    assert {"bn", "brn", "cn", "sn", "tbbn", "nbn", "spnorm"} <= set(KEEPING)
    for name in NORMS:
        layer = norm_factory(name)(8)
        assert (name in KEEPING) == any(buffer.startswith("running_") for buffer, _ in layer.named_buffers())


@pytest.mark.parametrize("name", KEEPING)
def test_a_frozen_layer_trains_as_it_evaluates_and_its_averages_stand_still(name: str) -> None:
    layer = trained(name)
    evaluated = copy.deepcopy(layer).eval()
    freeze_statistics(nn.Sequential(layer)).train()
    assert not frozen_parameters(layer)
    buffers = [buffer.clone() for buffer in layer.buffers()]
    for other in (layer, copy.deepcopy(layer).train(), pickle.loads(pickle.dumps(layer)).train()):
        x = rows(seed=9).requires_grad_()
        y = other(x)
        y.sin().sum().backward()
        torch.testing.assert_close(y, evaluated(rows(seed=9)), rtol=0, atol=0)
        assert all(torch.equal(one, two) for one, two in zip(other.buffers(), buffers, strict=True))
        affine = [p for name, p in other.named_parameters() if name not in getattr(other, "without_decay", ())]
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in affine)  # evaluation does without the others


@pytest.mark.parametrize("name", KEEPING)
def test_measuring_one_batch_evaluates_as_that_batch_was_trained(name: str) -> None:
    """With the same rows in training and measuring, evaluation differs by Bessel's correction at most."""
    layer = trained(name)
    momentum = layer.momentum
    measure_statistics(layer, [rows(seed=7)], partial(tell, layer))
    assert layer.training
    assert layer.momentum == momentum
    tell(layer)
    fresh = copy.deepcopy(layer)
    if name == "brn":
        fresh.num_batches_tracked.zero_()  # as batch normalisation
    torch.testing.assert_close(copy.deepcopy(layer).eval()(rows(seed=7)), fresh(rows(seed=7)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KEEPING)
def test_statistics_of_parts_are_pooled_to_those_of_the_whole(name: str) -> None:
    whole, parts = trained(name).double(), trained(name).double()
    x = torch.cat([rows(10, seed=1) - 2, rows(6, seed=2) + 2, rows(5, seed=3)]).double()
    for layer, batches in ((whole, [x]), (parts, list(x.split([10, 6, 5])))):
        measure_statistics(layer, batches, partial(tell, layer))
    for buffer, value in whole.named_buffers():
        if buffer != "num_batches_tracked":
            torch.testing.assert_close(parts.get_buffer(buffer), value, rtol=1e-12, atol=1e-12)


def test_a_shared_layer_is_measured_over_all_its_inputs() -> None:
    shared = norm_factory("bn")(8).double()
    measure_statistics(nn.Sequential(shared, nn.ReLU(), shared), [rows().double()])
    first = (rows().double() - rows().double().mean((0, 2, 3), keepdim=True)) / (
        rows().double().var((0, 2, 3), correction=0, keepdim=True) + 1e-5
    ).sqrt()
    both = torch.cat([rows().double(), first.relu()])
    torch.testing.assert_close(shared.running_mean, both.mean((0, 2, 3)))
    torch.testing.assert_close(shared.running_var, both.var((0, 2, 3), correction=0))


def test_what_can_not_be_measured_or_frozen_says_why_and_stays_as_it_was() -> None:
    layer = trained("bn")
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="no batch to measure"):
        measure_statistics(layer, [])
    with pytest.raises(RuntimeError):
        measure_statistics(layer, [rows(), torch.zeros(2, 3, 1, 1)])
    assert layer.momentum == 0.1
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    with pytest.raises(ValueError, match="0 is frozen"):
        measure_statistics(nn.Sequential(freeze_statistics(layer)), [rows()])
    with pytest.raises(ValueError, match="ReLU has no layer that keeps running statistics"):
        freeze_statistics(nn.ReLU())
    with pytest.raises(ValueError, match="0 is a BatchNorm2d, which can't be frozen"):
        freeze_statistics(nn.Sequential(nn.BatchNorm2d(2)))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"norm": "gn", "freeze": "after-first"}, "statistics.freeze: gn keeps no running statistics"),
        ({"norm": "frn", "precise": "class-balanced"}, "statistics.precise: frn keeps no running statistics"),
        ({"precise": "class-balanced", "track_running_stats": False}, "bn with .*False.* keeps no running"),
    ],
)
def test_norms_without_running_statistics_are_refused_by_name(
    asked: dict[str, Any], message: str, tiny: Tiny, registry: Registry, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=message):
        run(tiny(**asked), tmp_path / "run", device="cpu", registry=registry)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"freeze_affine": True}, "goes with statistics.freeze: after-first"),
        ({"freeze": "after-first", "precise": "class-balanced"}, "take one of the two"),
        ({"freeze": "always"}, "never.*after-first"),
    ],
)
def test_combinations_without_sense_are_refused(asked: dict[str, Any], message: str, tiny: Tiny) -> None:
    with pytest.raises(SpecError, match=message):
        tiny(**asked)


def test_a_spec_that_asks_for_nothing_has_the_key_of_the_time_before(tiny: Tiny) -> None:
    plain = tiny()
    assert plain.statistics == Statistics()
    assert len({plain.key, tiny(freeze="after-first").key, tiny(precise="class-balanced").key}) == 3
    assert replace(plain, statistics=Statistics("after-first")).key == tiny(freeze="after-first").key


def averages(net: nn.Module) -> list[Tensor]:
    return [buffer.clone() for name, buffer in net.named_buffers() if "running" in name or "tracked" in name]


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("norm", ["bn", "tbbn"])
def test_after_the_first_task_the_statistics_of_a_run_stand_still(
    norm: str, affine: bool, tiny: Tiny, registry: Registry, tmp_path: Path
) -> None:
    nets = []
    for name, tasks in (("first", 1), ("all", 3)):
        spec = tiny(norm=norm, freeze="after-first", freeze_affine=affine, stop_after=tasks)
        folder = run(spec, tmp_path / name, device="cpu", registry=registry).folder
        nets.append(weights(folder))
    first, last = nets
    for name, value in first.items():
        stands = "running" in name or "tracked" in name or (affine and name.startswith("backbone.norm."))
        assert torch.equal(value, last[name]) == stands, name
    plain = run(tiny(norm=norm, stop_after=1), tmp_path / "plain", device="cpu", registry=registry)
    assert all(torch.equal(value, first[name]) for name, value in weights(plain.folder).items())


def weights(folder: Path) -> dict[str, Tensor]:
    from cilnorm.storage.checkpoint import Checkpoints

    return Checkpoints(folder / "checkpoints", {}).newest()["net"]


def test_frozen_parameters_are_in_no_optimiser(tiny: Tiny, registry: Registry) -> None:
    parts = assemble(tiny(), registry, pick_device("cpu"))
    task = parts.stream.tasks[1]
    parts.net.head.grow(2)
    freeze_statistics(parts.net, affine=True)
    engine = Engine(parts.net, parts.method, task, Phase(), Schedule(), None)
    names = {name for name, parameter in parts.net.named_parameters() if parameter.requires_grad}
    assert names == {name for name, _ in parts.net.named_parameters() if ".norm." not in name}
    assert len(engine.parameters) == len(names)
    engine.start_epoch(0)
    assert not parts.net.backbone.norm.training
    assert parts.net.backbone.training


@pytest.mark.parametrize("norm", ["bn", "tbbn", "brn"])
@pytest.mark.parametrize("asked", [{"precise": "class-balanced"}, {"freeze": "after-first"}], ids=str)
def test_a_switched_run_goes_on_to_the_same_bits(
    asked: dict[str, Any], norm: str, tiny: Tiny, registry: Registry, tmp_path: Path
) -> None:
    spec = tiny(norm=norm, **asked)
    whole = run(spec, tmp_path / "whole", device="cpu", registry=registry)
    plain = run(tiny(norm=norm), tmp_path / "plain", device="cpu", registry=registry)
    assert any(not torch.equal(value, weights(plain.folder)[name]) for name, value in weights(whole.folder).items())
    saved = 0

    def watch(event: dict[str, Any]) -> None:
        nonlocal saved
        if event["event"] == "epoch" and event["task"] == 2 and event["epoch"] == event["of"]:
            saved += 1
            raise RuntimeError("as if the process had died")

    with pytest.raises(RuntimeError, match="as if the process had died"):
        run(spec, tmp_path / "half", device="cpu", registry=registry, watch=[watch])
    assert saved == 1
    again = resume(tmp_path / "half", device="cpu", registry=registry)
    assert again.matrix == whole.matrix
    assert all(torch.equal(value, weights(again.folder)[name]) for name, value in weights(whole.folder).items())


def test_rows_are_balanced_in_every_stretch(tiny: Tiny, registry: Registry) -> None:
    from cilnorm.training.memory import Memory

    parts = assemble(tiny(), registry, pick_device("cpu"))
    task = parts.stream.tasks[1]
    memory = Memory(tuple(of_class[:5] for of_class in parts.stream.by_class(parts.stream.tasks[0])))
    found = balanced_rows(memory, parts, task, seed=0)
    classes = parts.stream.targets[found].view(-1, task.seen)
    assert len(found) == 5 * task.seen == len(set(found.tolist()))
    assert all(sorted(row) == list(range(task.seen)) for row in classes.tolist())
    assert set(memory.indices.tolist()) <= set(found.tolist())
    assert torch.equal(found, balanced_rows(memory, parts, task, seed=0))
    assert not torch.equal(found, balanced_rows(memory, parts, task, seed=1))


def test_a_run_that_measures_anew_has_the_statistics_of_its_weights(
    tiny: Tiny, registry: Registry, tmp_path: Path
) -> None:
    """Only averages and counters differ from the run without, as long as nothing is trained on them."""
    folders = {
        name: run(tiny(stop_after=1, precise=name), tmp_path / name, device="cpu", registry=registry).folder
        for name in ("never", "class-balanced")
    }
    plain, measured = weights(folders["never"]), weights(folders["class-balanced"])
    differing = {name for name, value in plain.items() if not torch.equal(value, measured[name])}
    assert differing == {f"backbone.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


def test_the_probe_measures_a_finished_run_and_leaves_it_alone(finished: Any, registry: Registry) -> None:
    before = (finished.folder / "checkpoints" / "last.pt").read_bytes()
    told: list[str] = []
    accuracy = precise(finished.folder, device="cpu", registry=registry, tell=told.append)
    assert accuracy["before"] == finished.matrix[-1]
    assert json.loads((finished.folder / "probes" / "precise.json").read_text()) == accuracy
    assert precise(finished.folder, device="cpu", registry=registry) == accuracy
    assert (finished.folder / "checkpoints" / "last.pt").read_bytes() == before
    assert len(told) == 2


def test_the_command_knows_both_probes() -> None:
    result = CliRunner().invoke(app, ["probe", "precis", "nowhere"])
    assert result.exit_code
    assert "did you mean 'precise'?" in result.output + result.stderr
