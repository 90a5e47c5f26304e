"""registry.yaml and what plugins add to it: presets, what methods and norms change with them, and grids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cilnorm.presets import EVERY, OWN, Options, names_with_values, read_sections, shipped
from cilnorm.registry import Registry, nearest
from cilnorm.values import SpecError

__all__ = ["Options", "Settings", "check_known", "names_with_values", "read_settings"]


@dataclass(frozen=True)
class Settings:
    """Values by preset, what a paper's method or norm changes with it, and grids.

    Attributes:
        own: what a part of the run, by its kind and name, changes with a preset.
        owners: the distribution of a preset or grid, by (kind, name).
    """

    presets: Mapping[str, Options]
    own: Mapping[str, Mapping[str, Mapping[str, Options]]]
    grids: Mapping[str, Any] = field(default_factory=dict)
    owners: Mapping[tuple[str, str], str] = field(default_factory=dict)


def read_settings(path: Path | None = None, registry: Registry | None = None) -> Settings:
    """The settings of registry.yaml and of the plugins in ``registry``; presets that extend another are completed.

    What a method or norm changes in ``every`` preset comes before what it changes in single ones.

    Args:
        path: a file to read in their place.
        registry: whose plugins' files are taken as well; without it, what is shipped alone.

    Raises:
        SpecError: it is no YAML, or has other than the known sections.
    """
    found = [read_sections(path, str(path))] if path else list(registry.settings if registry else ()) or [shipped()]
    raw: dict[str, Options] = {}
    own: dict[str, dict[str, dict[str, Options]]] = {part: {} for part in OWN}
    for sections in found:
        raw |= sections.presets
        for part, name, by_preset in sections.own:
            own[part][name] = {**own[part].get(name, {}), **by_preset}
    changes = [by_preset for by_name in own.values() for by_preset in by_name.values()]
    presets: dict[str, Options] = {}
    for name, values in raw.items():
        presets[name] = {key: value for key, value in values.items() if key != "extends"}
        if base := str(values.get("extends", "")):
            check_known("earlier preset", [base], list(presets)[:-1])
            presets[name] = _merged(presets[base], presets[name])
            for changed in changes:
                changed[name] = _merged(changed.get(base, {}), changed.get(name, {}))
    for changed in changes:
        if every := changed.pop(EVERY, {}):
            changed |= {name: _merged(every, changed.get(name, {})) for name in presets}
    grids = {name: values for sections in found for name, values in sections.grids.items()}
    owners = {name: sections.owner for sections in found for name in sections.names}
    return Settings(presets, own, grids, owners)


def _merged(base: Options, over: Options) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if nested else value
    return merged


def check_known(kind: str, asked: Iterable[str], known: Iterable[str]) -> None:
    """Raises SpecError for the first of ``asked`` that is not known, naming the nearest that is."""
    known = list(known)
    for key in asked:
        if key not in known:
            raise SpecError(nearest(kind, key, known))
