"""The nearest mean of exemplars beside the head."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cilnorm.experiment.evaluation import class_means, predict
from cilnorm.experiment.runner import resume, run
from cilnorm.heads import Linear
from cilnorm.network import Network
from cilnorm.registry import Registry
from cilnorm.spec import Spec, SpecError
from cilnorm.training.pixels import Augmentation, Pixels
from cilnorm.training.protocol import PROTOCOLS

pytestmark = pytest.mark.slow

Tiny = Callable[..., Spec]


class Corners(nn.Module):
    """The first column's means of the three channels: an embedding that a mirror changes."""

    dim = 3

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        return images[:, :, :, 0].mean(2), [images]


def pixels(flip: bool) -> Pixels:
    images = torch.randint(0, 256, (30, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return Pixels(images, (0.5,) * 3, (0.25,) * 3, Augmentation(flip=flip))


def network() -> Network:
    net = Network(Corners(), Linear(3))
    net.head.grow(3)
    return net


def unit(vector: Tensor) -> Tensor:
    return vector / vector.square().sum().sqrt()


@pytest.mark.parametrize("flip", [False, True])
def test_class_means_and_predictions_are_icarls(flip: bool) -> None:
    images, net = pixels(flip), network()
    exemplars = [torch.tensor([0, 4, 7]), torch.tensor([9]), torch.tensor([3, 20])]
    means = class_means(net, images, exemplars)
    slow = []
    for indices in exemplars:
        total = torch.zeros(3)
        for image in images.clean(indices):
            total += unit(image[:, :, 0].mean(1)) + (unit(image[:, :, -1].mean(1)) if flip else 0)
        slow.append(unit(total))
    torch.testing.assert_close(means, torch.stack(slow))
    nearest = []
    for image in images.clean(torch.arange(30)):
        distances = [float((unit(image[:, :, 0].mean(1)) - mean).square().sum()) for mean in slow]
        nearest.append(distances.index(min(distances)))
    assert predict(net, images, torch.arange(30), means).tolist() == nearest
    assert predict(net, images, torch.arange(30)).tolist() != nearest


def test_mirror_images_may_be_left_out() -> None:
    exemplars, net = [torch.tensor([0, 4, 7]), torch.tensor([9]), torch.tensor([3, 20])], network()
    without = class_means(net, pixels(flip=True), exemplars, mirrored=False)
    assert torch.equal(without, class_means(net, pixels(flip=False), exemplars))
    assert not torch.equal(without, class_means(net, pixels(flip=True), exemplars))


@pytest.mark.parametrize("field", ["mirrored_means", "head_start"])
def test_each_of_pycils_departures_is_one_field(field: str, tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    value = PROTOCOLS["pycil"][field]
    common = {"classifier": "nme", "epochs": 1, "tasks": 2}
    plain = run(tiny(**common), tmp_path / "plain", device="cpu", registry=registry)
    other = run(tiny(**common, **{field: value}), tmp_path / "other", device="cpu", registry=registry)
    first = [json.loads(line) for line in (plain.folder / "events.jsonl").read_text().splitlines()]
    second = [json.loads(line) for line in (other.folder / "events.jsonl").read_text().splitlines()]
    terms = [[event["terms"] for event in told if event["event"] == "epoch"] for told in (first, second)]
    assert (terms[0] == terms[1]) == (field == "mirrored_means")
    assert tiny(**common).key != tiny(**common, **{field: value}).key


def test_both_numbers_are_reported(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    """The matrix is the chosen classifier's; training does not depend on the choice."""
    by_head = run(tiny(), tmp_path / "head", device="cpu", registry=registry)
    by_mean = run(tiny(classifier="nme"), tmp_path / "nme", device="cpu", registry=registry)
    assert by_mean.matrix != by_head.matrix
    events = [json.loads(line) for line in (tmp_path / "nme" / "events.jsonl").read_text().splitlines()]
    rows = [event for event in events if event["event"] == "accuracy"]
    assert [row["accuracy"] for row in rows] == by_mean.matrix
    assert [row["by_head"] for row in rows] == by_head.matrix
    assert by_mean.summary["by_head"] == {name: by_head.summary[name] for name in by_mean.summary["by_head"]}
    assert by_mean.summary["by_head"].keys() >= {"A_f", "A_a", "F"}
    assert "by_head" not in by_head.summary


def test_both_numbers_survive_an_interruption(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    spec = tiny(classifier="nme")
    whole = run(spec, tmp_path / "whole", device="cpu", registry=registry)

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "epoch" and event["task"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(spec, tmp_path / "cut", device="cpu", registry=registry, watch=[stop])
    stopped = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert stopped["state"] == "interrupted"
    assert "A_f" in stopped["by_head"]
    resumed = resume(tmp_path / "cut", device="cpu", registry=registry)
    assert resumed.matrix == whole.matrix
    assert resumed.summary["by_head"] == whole.summary["by_head"]


def test_another_classifier_is_refused_and_the_choice_is_part_of_the_key(tiny: Tiny) -> None:
    with pytest.raises(SpecError, match="classifier: 'knn' is none of head, nme"):
        tiny(classifier="knn")
    assert tiny(classifier="nme").key != tiny().key
    assert dataclasses.replace(tiny(classifier="nme"), classifier="head") == tiny()
