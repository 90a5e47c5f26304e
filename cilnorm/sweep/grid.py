"""Tables to be filled: every method with every norm, each a run a seed.

A grid stands in registry.yaml, or in a file of its own with the same keys::

    about: what it shows
    methods: [ft, lucir]
    norms:
      - bn
      - tbbn
      - tbbn-exact: {norm: tbbn, norm.splits: exact}
    set: {epochs: 40}

An entry is a name that ``cilnorm list`` shows, or a label with values as ``--set`` takes them; the label is the name
unless a value ``norm`` or ``method`` says otherwise. Precedence: preset < ``set`` < entry < what the user asks for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cilnorm.registry import Registry, nearest
from cilnorm.spec import Settings, Spec, resolve
from cilnorm.values import SpecError, parsed

__all__ = ["Cell", "Grid", "read_grid"]

Options = Mapping[str, Any]
KEYS = ("about", "methods", "norms", "set")


@dataclass(frozen=True)
class Cell:
    """One run of a table; ``method`` and ``norm`` are what the table calls them."""

    method: str
    norm: str
    spec: Spec

    @property
    def name(self) -> str:
        """A folder's name that two cells share only if they ask for the same numbers."""
        label = re.sub(r"[^\w.+-]", "_", f"{self.method}-{self.norm}")
        return f"{label}-s{self.spec.seed}-{self.spec.key}"


@dataclass(frozen=True)
class Grid:
    """Methods and norms by label, with the values that each label stands for."""

    name: str
    methods: Mapping[str, Options]
    norms: Mapping[str, Options]
    about: str = ""
    common: Options = field(default_factory=dict)

    def cells(
        self, preset: str, seeds: Sequence[int], asked: Options, registry: Registry, settings: Settings
    ) -> list[Cell]:
        """Every cell with every seed; all of the first seed come first, so that a whole table is there early.

        Raises:
            SpecError: a cell can't be; the message names it.
        """
        cells = []
        for seed in seeds:
            for method, of_method in self.methods.items():
                for norm, of_norm in self.norms.items():
                    values = {**self.common, **of_method, **of_norm, **asked, "seed": seed}
                    try:
                        cells.append(Cell(method, norm, resolve(preset, registry, settings, **values)))
                    except SpecError as error:
                        raise SpecError(f"{method} x {norm}: {error}") from None
        return cells


def read_grid(name: str, settings: Settings) -> Grid:
    """A grid of registry.yaml by its name, or one from a YAML file.

    Raises:
        SpecError: there is no such grid or file, or it has other than the known keys.
    """
    if name in settings.grids:
        return _grid(name, settings.grids[name])
    path = Path(name)
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        raise SpecError(nearest("grid", name, settings.grids) + ", or a file *.yaml")
    try:
        return _grid(path.stem, parsed(path.read_text(encoding="utf-8"), name))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: {getattr(error, 'strerror', None) or 'no text'}") from error


def _grid(name: str, content: Any) -> Grid:
    if not isinstance(content, dict):
        raise SpecError(f"grid {name}: expected the keys methods and norms, found {content!r:.80}")
    for key in content:
        if key not in KEYS:
            raise SpecError(nearest(f"key of grid {name}", str(key), KEYS))
    common = content.get("set") or {}
    if not isinstance(common, dict):
        raise SpecError(f"grid {name}: set: expected names with values, found {common!r:.80}")
    axes = {kind: _axis(name, kind, content.get(f"{kind}s")) for kind in ("method", "norm")}
    return Grid(name, axes["method"], axes["norm"], str(content.get("about", "")), common)


def _axis(grid: str, kind: str, entries: Any) -> dict[str, dict[str, Any]]:
    """Values by label, the name among them."""
    if not isinstance(entries, list) or not entries:
        raise SpecError(f"grid {grid}: {kind}s: expected a list of names, found {entries!r:.80}")
    axis: dict[str, dict[str, Any]] = {}
    for entry in entries:
        label, values = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, {})
        if not isinstance(label, str) or not isinstance(values, dict):
            raise SpecError(f"grid {grid}: {kind}s: expected a name or `label: {{key: value}}`, found {entry!r:.80}")
        if label in axis:
            raise SpecError(f"grid {grid}: {kind}s: {label!r} stands there twice; give one another label")
        axis[label] = {kind: label, **values}
    return axis
