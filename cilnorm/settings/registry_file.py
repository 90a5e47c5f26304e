"""registry.yaml, read: presets, what a method changes with them, and grids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from cilnorm.registry import nearest
from cilnorm.values import SpecError, mappings, parsed

__all__ = ["Options", "Settings", "check_known", "names_with_values", "read_settings"]

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """registry.yaml, read: values by preset, what a paper's method changes with it, and grids."""

    presets: Mapping[str, Options]
    methods: Mapping[str, Mapping[str, Options]]
    grids: Mapping[str, Any] = field(default_factory=dict)


def read_settings(path: Path | None = None) -> Settings:
    """Reads registry.yaml, the shipped one by default; presets that extend another are completed.

    What a method changes in ``every`` preset comes before what it changes in single ones.

    Raises:
        SpecError: it is no YAML, or has other than the known sections.
    """
    packaged = files("cilnorm") / "registry.yaml"
    beside = Path(__file__).resolve().parents[2] / "registry.yaml"  # where an editable install has it
    source = path or (packaged if packaged.is_file() else beside)
    content = names_with_values(source.read_text(encoding="utf-8"), str(path or "registry.yaml"))
    check_known("section of registry.yaml", content, ("presets", "methods", "grids"))
    content = {section: mappings(value, f"{path or 'registry.yaml'}: {section}") for section, value in content.items()}
    presets: dict[str, Options] = {}
    methods = {name: mappings(own, f"methods.{name}") for name, own in content.get("methods", {}).items()}
    for name, values in content.get("presets", {}).items():
        presets[name] = {key: value for key, value in values.items() if key != "extends"}
        if base := str(values.get("extends", "")):
            check_known("earlier preset", [base], list(presets)[:-1])
            presets[name] = _merged(presets[base], presets[name])
            for own in methods.values():
                own[name] = _merged(own.get(base, {}), own.get(name, {}))
    for own in methods.values():
        if every := own.pop("every", {}):
            own |= {name: _merged(every, own.get(name, {})) for name in presets}
    return Settings(presets, methods, content.get("grids", {}))


def _merged(base: Options, over: Options) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if nested else value
    return merged


def names_with_values(text: str, where: str) -> dict[str, Any]:
    """What a YAML text of names with values says.

    Raises:
        SpecError: it says something else; the message begins with ``where``.
    """
    content = parsed(text, where)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SpecError(f"{where}: expected names with values, found {type(content).__name__}")
    return content


def check_known(kind: str, asked: Iterable[str], known: Iterable[str]) -> None:
    """Raises SpecError for the first of ``asked`` that is not known, naming the nearest that is."""
    known = list(known)
    for key in asked:
        if key not in known:
            raise SpecError(nearest(kind, key, known))
