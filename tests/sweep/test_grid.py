"""Grids: which cells they mean, and that published values are compared only where they apply."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cilnorm.cli.sweeps_and_results import seed_list
from cilnorm.metrics import TABULATED
from cilnorm.registry import Registry
from cilnorm.results.published import Reference, published
from cilnorm.spec import Settings, Spec, SpecError, read_settings, resolve
from cilnorm.sweep.grid import read_grid

SETTINGS = read_settings()


def cells(name: str, registry: Registry, seeds: tuple[int, ...] = (0,), preset: str = "cifar100", **asked: Any) -> Any:
    return read_grid(name, SETTINGS).cells(preset, seeds, asked, registry, SETTINGS)


def test_the_papers_tables_have_their_cells_and_every_one_a_published_value(registry: Registry) -> None:
    for grid, count in (("norms", 8), ("methods", 18)):
        found = cells(grid, registry, protocol="released")
        assert len(found) == count
        for cell in found:
            reference = published(cell.spec, cell.method, cell.norm, registry)
            assert tuple(reference.values) == TABULATED, f"{cell.method} x {cell.norm}: {reference.note}"
            assert ("can't be known" in reference.note) is (cell.method in ("podnet", "afc"))
    spec = resolve("cifar100", registry, method="ssil", norm="tbbn", protocol="released")
    expected = {"A_f": 43.8, "A_a": 54.28, "F": 15.12, "A_l": 59.37}
    assert published(spec, "ssil", "tbbn", registry).values == expected


def test_the_papers_instance_and_group_norms_have_no_affine_parameters(registry: Registry) -> None:
    options = {cell.norm: dict(cell.spec.norm_options) for cell in cells("norms", registry)}
    assert options["in"] == {"affine": False}
    assert options["gn"] == {"affine": False, "channels_per_group": 16}
    assert options["bn"] == {}


RELEASED = {"protocol": "released"}


@pytest.mark.parametrize(
    ("asked", "note"),
    [
        ({"protocol": "corrected"}, "protocol corrected, published with released"),
        ({"lr": 0.001}, "lr 0.001, published with 0.1"),
        ({"schedule.momentum": 0.9}, "momentum 0.9, published with 0"),
        ({"weight_decay": 0.0}, "weight_decay 0, published with 0.0001"),
        ({"milestones": [60, 120]}, "milestones 60 120, published with 80 120"),
        ({"clip": 1.0}, "clip 1, published with 10000"),
        ({"epochs": 2}, "epochs 2, published with 160; milestones 1 2, published with 80 120"),
        ({"first_task": 2}, "first_task 2, published with 1"),
        ({"flip": False}, "flip false, published with true"),
        ({"crop": "random"}, "crop random, published with resized"),
        ({"class_order": 1993}, "class_order 1993, published with the seed's"),
        ({"backbone": "resnet20"}, "backbone resnet20, published with resnet32"),
        ({"tasks": 5}, "tasks 5, published with 10"),
        ({"memory": 1000}, "memory 1000, published with 2000"),
        ({"rows": "32:32"}, "rows 32:32, published with 48:16"),
        ({"classifier": "nme"}, "classifier nme, published with head"),
        ({"train_per_class": 100}, "train_per_class 100, published with none"),
        ({"stop_after": 3}, "stop_after 3, published with none"),
        ({"budget": "floor"}, "protocol.budget floor, published with ceil"),
        ({"norm.eps": 1e-3}, "norm.eps 0.001, published with 1e-05"),
        ({"lr": 0.001, "protocol": "corrected"}, "protocol corrected, published with released; lr 0.001, published"),
    ],
)
def test_a_run_under_other_conditions_is_not_compared_and_the_note_says_which(
    asked: dict[str, Any], note: str, registry: Registry
) -> None:
    found = published(resolve("cifar100", registry, **{**RELEASED, **asked}), "ft", "bn", registry)
    assert (found.values, found.note[: len(note)]) == ({}, note)


@pytest.mark.parametrize(
    ("method", "norm", "asked", "note"),
    [
        (
            "podnet",
            "bn",
            {"spatial": 0, "flat": 0},
            "method.spatial 0, published with 3; method.flat 0, published with 1",
        ),
        ("podnet", "bn", {"annealing": "steps"}, "annealing steps, published with cosine"),
        ("podnet", "bn", {"backbone": "resnet20"}, "backbone resnet20, published with resnet32"),
        ("eeil", "bn", {"balanced_rows": "mixed"}, "method.balanced_rows mixed, published with doubled"),
        ("ft", "gn", {}, "norm.affine true, published with false; norm.channels_per_group none, published with 16"),
        ("ft", "tbbn", {"norm.splits": "exact"}, "norm.splits exact, published with released"),
        ("lucir", "bn", {"clip": 10000}, "clip 10000, published with 0"),
    ],
)
def test_options_of_method_and_norm_are_conditions(
    method: str, norm: str, asked: dict[str, Any], note: str, registry: Registry
) -> None:
    spec = resolve("cifar100", registry, method=method, norm=norm, **{**RELEASED, **asked})
    assert published(spec, method, norm, registry) == Reference({}, note)


def test_what_can_not_be_known_of_a_published_value_may_be_any_of_what_it_may_have_been(registry: Registry) -> None:
    asked = {**RELEASED, "backbone": "resnet32-rebuffi", "crop": "random", "brightness": 63 / 255}
    found = published(resolve("cifar100", registry, method="afc", **asked), "afc", "bn", registry)
    assert found.values["A_f"] == 39.9
    assert found.note == "its backbone, rows, crop and brightness can't be known"
    other = published(resolve("cifar100", registry, method="afc", **asked, blocks=3), "afc", "bn", registry)
    assert other == Reference({}, "backbone.blocks 3, published with 5")


def test_a_seed_is_no_condition_and_another_label_or_data_set_has_no_value(registry: Registry) -> None:
    spec = resolve("cifar100", registry, **{**RELEASED, "seed": 5, "precision": "bf16", "engine": "eager"})
    assert published(spec, "ft", "bn", registry).values["A_f"] == 35.41
    assert published(replace(spec, class_order=5), "ft", "bn", registry).values["A_f"] == 35.41
    assert published(spec, "ft", "bn-variant", registry) == Reference()
    for preset in ("quick", "numerals"):
        assert published(resolve(preset, registry), "ft", "bn", registry) == Reference()


def test_conditions_are_written_for_imagenet100_too(registry: Registry) -> None:
    asked: dict[str, Any] = {"dataset": "imagenet100-podnet", "backbone": "resnet18", "class_order": 1993, "pad": 0}
    asked |= {**RELEASED, "crop_size": 224, "epochs": 100, "milestones": [40, 80]}
    spec = resolve("cifar100", registry, **asked)
    found = published(spec, "ft", "bn", registry)
    assert (found.values["A_f"], found.note) == (39.4, "its dataset can't be known")
    other = resolve("cifar100", registry, **{**asked, "dataset": "imagenet100-1993"})
    assert published(other, "ft", "bn", registry) == Reference()
    assert published(replace(spec, class_order=None), "ft", "bn", registry).note.startswith(
        "class_order the seed's, pub"
    )
    for method, values in (("lucir", {}), ("podnet", {"spatial": 8, "flat": 10, "balanced_lr": 0.2})):
        found = published(resolve("cifar100", registry, method=method, **asked, **values), method, "bn", registry)
        assert found.values, found.note
    afc = resolve("cifar100", registry, method="afc", **asked)
    assert "method.consolidation 4, published with 10" in published(afc, "afc", "bn", registry).note


# The values of other papers, under their own conditions

PODNET_B50 = [64.83, 63.19, 60.72, 57.98, 66.49, 64.98, 63.89]


@pytest.mark.parametrize(
    ("grid", "preset", "asked", "expected"),
    [
        ("podnet-b50", "cifar100-podnet-b50", {}, PODNET_B50),
        ("podnet-b50", "cifar100-podnet-b50", {"class_order": "podnet-3"}, PODNET_B50),
        ("podnet-b50", "imagenet100-podnet-b50", {}, [75.54, 74.33, 68.31, 62.48, None, None, None]),
        ("lucir-b50", "cifar100-podnet-b50", {"class_order": 1993}, [63.42, 60.18]),
        ("survey-b0", "cifar100-pycil", {}, [59.31, 58.2, 67.09, 64.65, 69.74, 67.99]),
        ("der-b0", "cifar100-der", {}, [58.66, 58.17, 58.03, 53.97, 69.46, 67.33, 75.36, 74.09, None]),
    ],
)  # fmt: skip
def test_the_tables_that_people_know_have_their_values_beside_them(
    grid: str, preset: str, asked: dict[str, Any], expected: list[float | None], registry: Registry
) -> None:
    found = cells(grid, registry, preset=preset, **asked)
    references = [published(cell.spec, cell.method, cell.norm, registry) for cell in found]
    assert [reference.values.get("A_a") for reference in references] == expected, [each.note for each in references]
    assert len({cell.name for cell in found}) == len(found)
    for reference in references:
        assert bool(reference.values) == reference.note.startswith("it is from ")
        assert set(reference.values) <= {"A_a", "A_f"}


def test_the_same_tasks_said_in_another_way_are_the_same_condition(registry: Registry) -> None:
    spec = resolve("cifar100-podnet-b50", registry, tasks=6)
    assert published(spec, "podnet", "bn", registry).values == {"A_a": 64.83}
    listed = resolve("cifar100-podnet-b50", registry, task_classes=[50, 10, 10, 10, 10, 10], rows="64:64")
    assert published(listed, "podnet", "bn", registry).values == {"A_a": 64.83}
    for asked, note in (
        ({"memory": 2000}, "memory_per_class none, published with 20"),
        ({"batches": "stratified"}, "rows 96:32, published with 128; protocol.batches stratified, published with shuf"),
        ({"classifier": "nme"}, "classifier nme, published with head"),
        ({"class_order": 1993}, "class_order 1993, published with a list of 100"),
        ({"increment": 4}, "increment 4, published with "),
    ):
        other = resolve("cifar100-podnet-b50", registry, **asked)
        found = published(other, "podnet", "bn", registry)
        assert (found.values, found.note[: len(note)]) == ({}, note)


def test_cells_of_the_first_seed_come_first_and_share_no_folder(registry: Registry) -> None:
    found = cells("methods", registry, seeds=(3, 1))
    assert [cell.spec.seed for cell in found] == [3] * 18 + [1] * 18
    assert len({cell.name for cell in found}) == 36
    assert cells("norms", registry)[6].name.startswith("ft-cn_-s0-")  # no star in a folder's name
    shared = {cell.name for cell in found} & {cell.name for cell in cells("norms", registry, seeds=(1,))}
    assert len(shared) == 3  # FT with bn, cn and tbbn stands in both


def test_a_grid_of_ones_own(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    content = {
        "methods": ["ft", {"far": {"method": "lucir", "less_forget": 9}}],
        "norms": ["bn", {"exact": {"norm": "tbbn", "norm.splits": "exact"}}],
        "set": {"epochs": 3, "memory": 500},
    }
    path.write_text(yaml.safe_dump(content))
    grid = read_grid(str(path), SETTINGS)
    assert grid.name == "mine"
    found = {(c.method, c.norm): c.spec for c in cells(str(path), registry, memory=300)}
    assert list(found) == [("ft", "bn"), ("ft", "exact"), ("far", "bn"), ("far", "exact")]
    last: Spec = found["far", "exact"]
    assert (last.method, last.norm, last.memory, last.schedule.epochs) == ("lucir", "tbbn", 300, 3)
    assert (last.method_options["less_forget"], dict(last.norm_options)) == (9.0, {"splits": "exact"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"methods": ["ft"], "norm": ["bn"]}, "no key of grid grid called 'norm'; did you mean 'norms'"),
        ({"methods": ["ft"]}, "grid grid: norms: expected a list of names, found None"),
        ({"methods": ["ft"], "norms": [3]}, "norms: expected a name or `label: {key: value}`, found 3"),
        ({"methods": ["ft"], "norms": ["bn", "bn"]}, "'bn' stands there twice"),
        ({"methods": ["ft"], "norms": ["bn"], "set": [1]}, "set: expected names with values"),
        ([1], "expected the keys methods and norms"),
    ],
)
def test_a_grid_that_can_not_be_read(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(SpecError) as caught:
        read_grid(str(path), SETTINGS)
    assert message in str(caught.value)


def test_unknown_grids_and_cells_are_named(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no grid called 'norm'; did you mean 'norms'\? .* or a file \*\.yaml"):
        read_grid("norm", SETTINGS)
    with pytest.raises(SpecError, match=r"none\.yaml: No such file"):
        read_grid(str(tmp_path / "none.yaml"), SETTINGS)
    grids = Settings(SETTINGS.presets, SETTINGS.own, {"g": {"methods": ["ft"], "norms": ["tbn"]}})
    with pytest.raises(SpecError, match=r"^ft x tbn: no norm called 'tbn'"):
        read_grid("g", grids).cells("quick", [0], {}, registry, grids)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0", [0]), ("0,1,2", [0, 1, 2]), ("0-4", [0, 1, 2, 3, 4]), ("3", [3]), ("0-2, 7", [0, 1, 2, 7]), ("5-5", [5])],
)
def test_seeds_as_a_list_and_as_a_range(text: str, seeds: list[int]) -> None:
    assert seed_list(text) == seeds


@pytest.mark.parametrize("text", ["", "0,", "4-0", "0-", "-1", "0,0", "0-3,2", "a", "0-999999999", "1.5", "0--2"])
def test_what_is_no_list_of_seeds(text: str) -> None:
    with pytest.raises(SpecError, match="--seeds takes different whole numbers, 0,1,2 or 0-4 say"):
        seed_list(text)
