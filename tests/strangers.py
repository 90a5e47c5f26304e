"""Throw-away distributions: a folder with modules and the metadata that an installer would have written."""

from __future__ import annotations

from pathlib import Path

NORM = """
from torch import nn
from cilnorm.hookspecs import Norm, hookimpl

@hookimpl
def cilnorm_norms():
    return {returned}
"""


def offers(returned: str) -> str:
    """A module whose hook returns this expression."""
    return NORM.format(returned=returned)


def norm(name: str) -> str:
    """A module that offers batch norm under another name."""
    return offers(f"[Norm({name!r}, nn.BatchNorm2d)]")


def settings(file: str) -> str:
    """A module that brings the presets and grids of a file beside it."""
    return f"""
from pathlib import Path
from cilnorm.hookspecs import SettingsFile, hookimpl

@hookimpl
def cilnorm_settings():
    return [SettingsFile(Path(__file__).with_name({file!r}))]
"""


def distribute(site: Path, name: str, modules: dict[str, str], entries: dict[str, str] | None = None) -> None:
    """Puts a distribution into ``site``; each module is an entry point of its own name unless ``entries`` says else."""
    metadata = site / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{key} = {value}" for key, value in (entries or {module: module for module in modules}).items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[cilnorm]", *lines]) + "\n")
    for module, source in modules.items():
        (site / f"{module}.py").write_text(source)
