"""Tries every network in ``docs/architectures.md`` again; ``python -m benchmarks.architectures`` tries all norms."""

from __future__ import annotations

import pytest
import timm
import torchvision

from benchmarks.architectures import ARCHITECTURES, TABLE, tried
from cilnorm import registry

pytestmark = pytest.mark.slow


WAYS = ("norm_layer=norm_factory", "norm_layer=norm_act_factory", "convert_norms")
PARTS = 3  # of the norms, one for each network in turn: all of them with all of them take six minutes


def documented() -> dict[str, dict[str, str]]:
    """By network, what the two tables say in each column, without the reasons for a no."""
    found: dict[str, dict[str, str]] = {}
    columns: list[str] = []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if name == "network":
            columns = [cell.strip("`") for cell in cells]
        elif line.startswith(("| timm", "| torchvision")):
            said = (cell.partition(" ")[0] for cell in cells)
            found.setdefault(name, {}).update(zip(columns, said, strict=True))
    return found


def test_the_table_has_every_norm_and_enough_networks() -> None:
    text = TABLE.read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in registry.load().norms)
    assert len(documented()) == len(ARCHITECTURES) >= 25


OF_THE_TABLE = f"timm {timm.__version__} and torchvision {torchvision.__version__.partition('+')[0]}"


@pytest.mark.skipif(OF_THE_TABLE not in TABLE.read_text(encoding="utf-8"), reason="the table is of other versions")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("at", range(len(ARCHITECTURES)), ids=[f"{a.source}-{a.name}" for a in ARCHITECTURES])
def test_the_table_is_true(at: int) -> None:
    row = tried(ARCHITECTURES[at], list(registry.load().norms)[at % PARTS :: PARTS])
    ways = zip(WAYS, (row.norm_layer, row.norm_act, row.convert), strict=True)
    found = {column: text.partition(",")[0] for column, text in [*ways, *row.norms.items()]}
    said = documented()[row.architecture]
    assert found == {column: said[column] for column in found}
