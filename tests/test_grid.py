"""Grids: which cells they mean, and that published values are compared only where they apply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cilnorm.cli_results import seed_list
from cilnorm.grid import read_grid
from cilnorm.published import METRICS, published
from cilnorm.registry import Registry
from cilnorm.spec import Settings, Spec, SpecError, read_settings, resolve

SETTINGS = read_settings()


def cells(name: str, registry: Registry, seeds: tuple[int, ...] = (0,), preset: str = "cifar100", **asked: Any) -> Any:
    return read_grid(name, SETTINGS).cells(preset, seeds, asked, registry, SETTINGS)


def test_the_papers_tables_have_their_cells_and_every_one_a_published_value(registry: Registry) -> None:
    for grid, count in (("norms", 8), ("methods", 18)):
        found = cells(grid, registry)
        assert len(found) == count
        for cell in found:
            values = published(cell.spec, cell.method, cell.norm)
            assert tuple(values) == METRICS, f"{cell.method} x {cell.norm}"
    spec = resolve("cifar100", registry, method="ssil", norm="tbbn")
    assert published(spec, "ssil", "tbbn") == {"A_f": 43.8, "A_a": 54.28, "F": 15.12, "A_l": 59.37}


def test_the_papers_instance_and_group_norms_have_no_affine_parameters(registry: Registry) -> None:
    options = {cell.norm: dict(cell.spec.norm_options) for cell in cells("norms", registry)}
    assert options["in"] == {"affine": False}
    assert options["gn"] == {"affine": False, "channels_per_group": 16}
    assert options["bn"] == {}


@pytest.mark.parametrize(
    ("preset", "asked"),
    [
        ("numerals", {}),
        ("quick", {}),
        ("cifar100", {"epochs": 2}),
        ("cifar100", {"tasks": 5}),
        ("cifar100", {"memory": 1000}),
        ("cifar100", {"rows": "32:32"}),
        ("cifar100", {"backbone": "resnet20"}),
        ("cifar100", {"classifier": "nme"}),
        ("cifar100", {"train_per_class": 100}),
        ("cifar100", {"stop_after": 3}),
        ("cifar100", {"first_task": 2}),
    ],
)
def test_published_values_are_for_the_papers_data_and_protocol_alone(
    preset: str, asked: dict[str, Any], registry: Registry
) -> None:
    assert published(resolve(preset, registry, **asked), "ft", "bn") == {}


def test_published_values_hold_for_both_protocols_and_momenta_and_no_other_label(registry: Registry) -> None:
    for preset, asked in (("cifar100", {"protocol": "released"}), ("cifar100-momentum", {"seed": 5})):
        spec = resolve(preset, registry, **asked)  # type: ignore[arg-type]
        assert published(spec, "ft", "bn")["A_f"] == 35.41
        assert published(spec, "ft", "bn-variant") == {}


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
    grids = Settings(SETTINGS.presets, SETTINGS.methods, {"g": {"methods": ["ft"], "norms": ["tbn"]}})
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
