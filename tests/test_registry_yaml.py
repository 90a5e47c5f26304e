"""registry.yaml: every name resolves, every key is a field, no value repeats a default or what it extends."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from cilnorm.batch import Task
from cilnorm.method import Schedule
from cilnorm.presets import OWN
from cilnorm.registry import Registry, load
from cilnorm.results.published import published
from cilnorm.spec import SECTIONS, Settings, Spec, read_settings, resolve, to_mapping
from cilnorm.training.pixels import Augmentation
from tests.conftest import ROOT

CONTENT = yaml.safe_load((ROOT / "registry.yaml").read_text(encoding="utf-8"))
PRESETS: dict[str, dict[str, Any]] = CONTENT["presets"]
SETTINGS = read_settings()  # once: reading takes longer than resolving
PARTS = ("method", "norm", "backbone", "dataset")


@pytest.fixture(scope="module")
def shelves() -> Registry:
    return load(strict=True)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def defaults(preset: Mapping[str, Any], registry: Registry) -> dict[str, Any]:
    """Every key that a preset may set, and the value that it has otherwise."""
    found = {
        field.name: field.default for field in dataclasses.fields(Spec) if field.default is not dataclasses.MISSING
    }
    for section, made in SECTIONS.items():
        found |= {f"{section}.{field.name}": field.default for field in dataclasses.fields(made)}
    for shelf in registry.shelves:
        if shelf.kind not in PARTS:  # loggers decide no number
            continue
        build = shelf[preset[shelf.kind]].build
        found |= {f"{shelf.kind}_options.{p.name}": p.default for p in inspect.signature(build).parameters.values()}
    return found


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_resolves(name: str, shelves: Registry) -> None:
    spec = resolve(name, shelves, SETTINGS)
    assert spec.preset == name
    whole = SETTINGS.presets[name]
    assert whole["about"]
    for part in PARTS:
        assert whole[part] == getattr(spec, part), "presets use names, not aliases"


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", sorted(load().methods))
def test_a_preset_resolves_with_every_method(name: str, method: str, shelves: Registry) -> None:
    for protocol in (None, "released"):
        asked = {"protocol": protocol} if protocol else {}
        assert resolve(name, shelves, SETTINGS, method=method, **asked).method == method


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_known_keys_to_other_values_than_the_defaults(name: str, shelves: Registry) -> None:
    own = {key: value for key, value in PRESETS[name].items() if key not in ("about", "extends")}
    base = SETTINGS.presets.get(PRESETS[name].get("extends", ""), {})
    otherwise = defaults(SETTINGS.presets[name], shelves)
    inherited = dict(flat(base))
    for key, value in flat(own):
        if key in PARTS:
            continue
        assert key in otherwise, f"{name}: {key} is no field"
        if key in inherited:
            assert inherited[key] != value, f"{name}: {key} repeats what it extends"
        else:
            assert plain(otherwise[key]) != value, f"{name}: {key} repeats its default"


@pytest.mark.parametrize(("part", "section"), OWN.items())
def test_values_of_a_method_or_norm_are_options_of_it_and_no_defaults(
    part: str, section: str, shelves: Registry
) -> None:
    for name, presets in CONTENT[section].items():
        record = next(shelf for shelf in shelves.shelves if shelf.kind == part)[name]
        where = f"{section}.{name}"
        assert record.name == name, "registry.yaml uses names, not aliases"
        fields = {p.name: p.default for p in inspect.signature(record.build).parameters.values()}
        by_preset = [(preset, values) for preset, values in presets.items() if preset != "every"]
        by_preset += [(preset, presets.get("every", {})) for preset in PRESETS]
        for preset, values in by_preset:
            base = SETTINGS.own[part][name].get(PRESETS[preset].get("extends", ""), {})
            assert preset in PRESETS, f"{where}: no preset {preset}"
            asked: dict[str, Any] = {part: name}
            spec = resolve(preset, shelves, SETTINGS, **asked)
            plainly = resolve(preset, shelves, Settings(SETTINGS.presets, {}), **asked)
            for key, value in flat(values):
                if key not in fields and base.get(key, value) != value:
                    found = dict(flat(to_mapping(spec)))[key]  # what the preset before said is taken back
                    assert type(found)(value) == found
                elif key in fields:
                    assert plain(fields[key]) != value, f"{where}.{preset}: {key} repeats its default"
                    assert plain(getattr(spec, f"{part}_options")[key]) == value
                else:
                    bare = Spec(spec.method, spec.norm, spec.backbone, spec.dataset)
                    made, before, default = (dict(flat(to_mapping(each))) for each in (spec, plainly, bare))
                    changes = made[key] != before[key] or made[key] != default[key]
                    assert changes, f"{where}.{preset}: {key} repeats its default and the preset's value"


@pytest.mark.parametrize("method", ["podnet", "afc"])
def test_podnet_and_afc_may_run_as_their_authors_ran_them(method: str, shelves: Registry) -> None:
    spec = resolve("cifar100-podnet", shelves, SETTINGS, method=method)
    assert spec.backbone == "resnet32-rebuffi"
    assert spec.augmentation == Augmentation(pad=4, crop="random", flip=True, brightness=63 / 255)
    authors = Schedule(160, 0.1, 0.9, 5e-4, "cosine", clip=0.0, clamp=5.0, milestones=spec.schedule.milestones)
    assert spec.schedule == authors
    assert spec.protocol == resolve("cifar100", shelves, SETTINGS, method=method, protocol="released").protocol
    second = (
        shelves.methods[method].build(**spec.method_options).phases(Task(1, (10, 10)))[1].schedule_in(spec.schedule)
    )
    assert (second.epochs, second.lr, second.annealing) == (20, 0.05, "steps")
    for wanting in ("128", "50 classes", "20 exemplars a class"):
        assert wanting in SETTINGS.presets["cifar100-podnet"]["about"]


@pytest.mark.parametrize("method", ["ft", "eeil", "lucir", "podnet", "ssil", "afc"])
def test_imagenet100_is_what_was_published(method: str, shelves: Registry) -> None:
    """As far as it is known; which 100 classes they were is not."""
    spec = resolve("imagenet100", shelves, SETTINGS, method=method, protocol="released")
    found = published(spec, method, "bn", shelves)
    assert set(found.values) == {"A_f", "A_a", "F", "A_l"}
    assert found.note.startswith("its dataset")
    later = 50 if method in ("podnet", "afc") else 40
    rates = [spec.schedule.rate(epoch) / spec.schedule.lr for epoch in (0, later)]
    assert rates[0] == 1 > rates[1]


@pytest.mark.parametrize("preset", ["imagenet100-1993", "imagenet100-podnet", "tiny-imagenet", "mini-imagenet"])
def test_methods_weigh_their_terms_on_photographs_as_their_authors_do(preset: str, shelves: Registry) -> None:
    lucir, podnet, afc = (
        resolve(preset, shelves, SETTINGS, method=m).method_options for m in ("lucir", "podnet", "afc")
    )
    assert lucir["less_forget"] == 10
    assert (podnet["spatial"], podnet["flat"]) == (8, 10)
    assert afc["consolidation"] == 10


@pytest.mark.parametrize(
    ("preset", "rows", "epochs", "stem", "given"),
    [
        ("imagenet100", 64, 100, 56, 224),
        ("imagenet100-1993", 128, 90, 56, 224),
        ("imagenet100-podnet", 64, 90, 112, 224),
        ("tiny-imagenet", 64, 100, 32, 64),
        ("mini-imagenet", 64, 100, 42, 84),
    ],
)
def test_presets_of_photographs(preset: str, rows: int, epochs: int, stem: int, given: int, shelves: Registry) -> None:
    """Rows of a batch, epochs, side of the first stage's map, which tells the stem, and what the network is given."""
    spec = resolve(preset, shelves, SETTINGS)
    assert (sum(spec.rows), spec.schedule.epochs) == (rows, epochs)
    net = shelves.backbones[spec.backbone].build(nn.BatchNorm2d, **spec.backbone_options)
    with torch.no_grad():
        maps = net(torch.zeros(1, 3, given, given))[1]
    assert maps[0].shape[2] == stem


@pytest.mark.parametrize("method", ["podnet", "afc"])
def test_podnet_and_afc_may_run_their_authors_protocol(method: str, shelves: Registry) -> None:
    spec, in_ten = (
        resolve(name, shelves, SETTINGS, method=method) for name in ("cifar100-podnet-b50", "cifar100-podnet")
    )
    assert spec.sizes(100) == (50, 10, 10, 10, 10, 10)
    assert [spec.exemplars(seen) for seen in (50, 60, 100)] == [20, 20, 20]
    assert sum(spec.rows) == 128
    assert spec.protocol == dataclasses.replace(in_ten.protocol, batches="shuffled")
    assert (spec.schedule, spec.augmentation) == (in_ten.schedule, in_ten.augmentation)
    assert resolve("cifar100-podnet-b50", shelves, SETTINGS, method=method, increment=5).sizes(100) == (50, *(5,) * 10)
