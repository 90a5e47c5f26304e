"""The probe of a run's norm layers: nothing else moves, and what it measures agrees with the layers' own averages."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from cilnorm.cli.app import app
from cilnorm.experiment.assembly import assemble, pick_device
from cilnorm.experiment.runner import Result, run
from cilnorm.registry import Registry
from cilnorm.results.probe import _Work, bn_bias, distances, norm_layers
from cilnorm.spec import Spec
from cilnorm.storage.checkpoint import Checkpoints
from cilnorm.storage.run_folder import FolderError

pytestmark = pytest.mark.slow

Tiny = Callable[..., Spec]


def at_work(spec: Spec, folder: Path, registry: Registry) -> _Work:
    parts = assemble(spec, registry, pick_device("cpu"))
    Checkpoints(folder / "checkpoints", {"spec": spec.key, "images": "of-blobs"}).read(parts.net, parts.stream.tasks)
    return _Work(spec, replace(parts, net=parts.net.eval()), parts.stream.tasks, registry)


@pytest.mark.parametrize("norm", ["bn", "tbbn", "cn"])
def test_the_probe_of_a_run(norm: str, tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    folder = run(tiny(norm=norm), tmp_path / "run", device="cpu", registry=registry).folder
    before = (folder / "checkpoints" / "last.pt").read_bytes()
    told: list[str] = []
    probe = bn_bias(folder, epochs=2, device="cpu", registry=registry, tell=told.append)
    assert list(probe.accuracy) == ["before", "statistics", "affine", "both"]
    rows = [[float(cell) for cell in row[1:]] for row in list(csv.reader(open(folder / "accuracy.csv")))[1:][-1:]]  # noqa: SIM115
    assert probe.accuracy["before"] == rows[0]
    assert len(told) == 4
    assert {(row["layer"], row["images"]) for row in probe.layers} == {
        ("backbone.norm", kind) for kind in ("all", "old", "new")
    }
    assert [(row["layer"], row["images"], row["task"]) for row in probe.tasks] == [
        ("backbone.norm", "task", task) for task in (1, 2, 3)
    ]
    (newest,) = [row for row in probe.layers if row["images"] == "new"]  # all of them fit into what is measured
    assert [probe.tasks[2][measure] for measure in ("mean", "scale")] == [newest["mean"], newest["scale"]]
    with open(folder / "probes" / "bn-bias.csv") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["layer", "images", "mean", "scale", "task"]
    assert [row["task"] for row in table] == ["", "", "", "1", "2", "3"]
    names = {path.name for path in (folder / "probes").iterdir()}
    assert names == {"bn-bias.json", "bn-bias.csv", "bn-bias.png", "bn-bias.svg", "bn-bias.pdf"}
    written = json.loads((folder / "probes" / "bn-bias.json").read_text())
    assert (written["accuracy"], written["tasks"]) == (probe.accuracy, probe.tasks)
    assert (folder / "checkpoints" / "last.pt").read_bytes() == before
    again = bn_bias(folder, epochs=2, device="cpu", registry=registry)
    assert again == probe


@pytest.mark.parametrize("variant", ["statistics", "affine", "both"])
def test_each_variant_moves_what_it_says_and_nothing_else(
    variant: str, finished: Result, tiny: Tiny, registry: Registry
) -> None:
    work = at_work(tiny(), finished.folder, registry)
    before = {name: tensor.clone() for name, tensor in work.parts.net.state_dict().items()}
    after = work.retuned(variant, 1, 0.1).state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    averages = {"backbone.norm.running_mean", "backbone.norm.running_var"}
    affine = {"backbone.norm.weight", "backbone.norm.bias"}
    expected = {"statistics": averages, "affine": affine, "both": averages | affine}[variant]
    assert moved - {"backbone.norm.num_batches_tracked"} == expected
    assert all(torch.equal(tensor, before[name]) for name, tensor in work.parts.net.state_dict().items())


def test_measured_averages_are_those_of_the_batches(finished: Result, tiny: Tiny, registry: Registry) -> None:
    """One by one, as a slow loop over the same batches has them."""
    work = at_work(tiny(), finished.folder, registry)
    layer: Any = work.retuned("statistics", 0, 0.1).get_submodule("backbone.norm")
    conv: Any = work.parts.net.get_submodule("backbone.conv")
    means, variances = [], []
    for batch in work._batches(work.images(work.tasks), "statistics", 0):
        x = conv(batch.images).detach().transpose(0, 1).flatten(1)
        means.append(x.mean(1))
        variances.append(x.var(1))
    torch.testing.assert_close(layer.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack(variances).mean(0))


def test_averages_of_one_task_lie_nearest_to_that_task(finished: Result, tiny: Tiny, registry: Registry) -> None:
    work = at_work(tiny(), finished.folder, registry)
    for task in range(3):
        layer: Any = work.parts.net.get_submodule("backbone.norm")
        of_task = replace(work, tasks=work.tasks[task : task + 1])
        measured: Any = of_task.retuned("statistics", 0, 0.1).get_submodule("backbone.norm")
        layer.load_state_dict(measured.state_dict())
        far = [row["mean"] for row in work.by_task()]
        assert far.index(min(far)) == task


def test_distances_by_hand() -> None:
    one, other = nn.BatchNorm2d(2, eps=0), nn.BatchNorm2d(2, eps=0)
    one.running_mean = torch.tensor([1.0, 3.0])
    one.running_var = torch.tensor([4.0, 1.0])
    other.running_mean = torch.tensor([0.0, 2.0])
    other.running_var = torch.tensor([1.0, 16.0])
    found = distances(one, other)
    assert found["mean"] == pytest.approx((1 + 1 / 4) / 2)
    assert found["scale"] == pytest.approx((torch.log(torch.tensor(2.0)) + torch.log(torch.tensor(4.0))).item() / 2)


def test_layers_without_averages_are_trained_alone(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    folder = run(tiny(norm="gn", **{"norm.groups": 2}), tmp_path / "run", device="cpu", registry=registry).folder
    probe = bn_bias(folder, epochs=1, device="cpu", registry=registry)
    assert list(probe.accuracy) == ["before", "affine"]
    assert probe.layers == []


def test_norm_layers_are_found_by_their_type(finished: Result, tiny: Tiny, registry: Registry) -> None:
    work = at_work(tiny(), finished.folder, registry)
    assert list(norm_layers(work.parts.net, work.spec, registry)) == ["backbone.norm"]


def test_what_can_not_be_probed(finished: Result, registry: Registry, tiny: Tiny, tmp_path: Path) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "accuracy":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny(), tmp_path / "half", device="cpu", registry=registry, watch=[stop])
    with pytest.raises(FolderError, match="is not finished; `cilnorm resume"):
        bn_bias(tmp_path / "half", device="cpu", registry=registry)
    result = CliRunner().invoke(app, ["probe", "bn-bais", str(finished.folder)])
    assert result.exit_code == 2
    assert "no probe called 'bn-bais'; did you mean 'bn-bias'?" in result.stderr
