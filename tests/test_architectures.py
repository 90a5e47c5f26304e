"""Tries every network in ``docs/architectures.md`` again; ``python -m benchmarks.architectures`` writes the page."""

from __future__ import annotations

import pytest
import timm
import torchvision

from benchmarks.architectures import ARCHITECTURES, TABLE, Architecture, tried
from cilnorm import registry

pytestmark = pytest.mark.slow


def documented() -> dict[str, list[str]]:
    """The cells of both tables by network, without the reasons for a no."""
    cells: dict[str, list[str]] = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith(("| timm", "| torchvision")):
            name, *rest = (cell.strip() for cell in line.strip("|").split("|"))
            cells.setdefault(name, []).extend(cell.partition(" ")[0] for cell in rest)
    return cells


def test_the_table_has_every_norm_and_enough_networks() -> None:
    text = TABLE.read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in registry.load().norms)
    assert len(documented()) == len(ARCHITECTURES) >= 25


OF_THE_TABLE = f"timm {timm.__version__} and torchvision {torchvision.__version__.partition('+')[0]}"


@pytest.mark.skipif(OF_THE_TABLE not in TABLE.read_text(encoding="utf-8"), reason="the table is of other versions")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=[f"{a.source}-{a.name}" for a in ARCHITECTURES])
def test_the_table_is_true(architecture: Architecture) -> None:
    row = tried(architecture)
    found = [row.norm_layer, row.norm_act, row.convert, *row.norms.values()]
    assert [text.partition(",")[0] for text in found] == documented()[row.architecture]
