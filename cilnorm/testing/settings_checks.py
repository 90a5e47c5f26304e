"""What presets and grids promise: that they say what they are, and that runs can be made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from cilnorm import registry as registries
from cilnorm.hookspecs import SettingsFile
from cilnorm.presets import EVERY, Sections, check_added, read_sections
from cilnorm.registry import Registry
from cilnorm.spec import SpecError, read_settings, resolve
from cilnorm.sweep.grid import read_grid
from cilnorm.testing.checks import Broken, Check, wants

__all__ = ["added", "settings_checks"]

WHERE = "docs/plugins.md, and cilnorm.hookspecs.SettingsFile"


def added(record: SettingsFile, registry: Registry | None = None) -> tuple[Sections, Registry]:
    """A file, read, and a registry in which it is.

    Raises:
        Broken: it can't be read, or does not only add to what is there.
    """
    registry = registry or registries.load()
    try:
        sections = read_sections(record.path, record.path.name, "(checked)")
        if not any(replace(each, owner=sections.owner) == sections for each in registry.settings):
            home = registry.settings[0].owner
            sources = {
                shelf.kind: {n: home if owner == home else sections.owner for n, owner in shelf.sources.items()}
                for shelf in registry.shelves
            }
            check_added(sections, registry.settings, sources)
            registry = replace(registry, settings=(*registry.settings, sections))
    except SpecError as error:
        raise Broken(f"{error}. See {WHERE}.") from error
    return sections, registry


def resolved(preset: str, registry: Registry, **asked: Any) -> None:
    try:
        resolve(preset, registry, **asked)
    except SpecError as error:
        told = ", ".join(f"--{key} {value}" for key, value in asked.items())
        raise Broken(f"no run can be made of --preset {preset} {told}".rstrip() + f": {error}") from error


def about(values: Any) -> None:
    said = values.get("about") if isinstance(values, dict) else None
    wants(isinstance(said, str) and bool(said.strip()), "it does not say what it is; give it a line `about:`")


def of_preset(name: str, values: Any, registry: Registry) -> Iterator[tuple[str, Callable[[Any], None]]]:
    def with_methods(_: Any) -> None:
        for method in registry.methods:
            resolved(name, registry, method=method)

    yield "says_what_it_is", lambda _: about(values)
    yield "resolves", lambda _: resolved(name, registry)
    yield "resolves_with_every_method", with_methods


def of_grid(name: str, values: Any, presets: list[str], registry: Registry) -> Iterator[tuple[str, Any]]:
    def cells(_: Any) -> None:
        settings = read_settings(registry=registry)
        problem = ""
        for preset in presets:
            try:
                read_grid(name, settings).cells(preset, (0,), {}, registry, settings)
                return
            except SpecError as error:
                problem = problem or f"with --preset {preset}: {error}"
        raise Broken(f"its runs can't be made, neither with quick nor with a preset of the same file; {problem}")

    yield "says_what_it_is", lambda _: about(values)
    yield "every_cell_resolves", cells


def settings_checks(sections: Sections, registry: Registry) -> Iterator[Check]:
    """The checks of a file that is in the registry."""
    for name, values in sections.presets.items():
        for promise, work in of_preset(name, values, registry):
            yield Check("preset", name, promise, work, sections, WHERE)
    for part, name, by_preset in sections.own:
        every = list(read_settings(registry=registry).presets) if EVERY in by_preset else []
        others = [preset for preset in {**dict.fromkeys(every), **by_preset} if preset not in sections.presets]

        def values_fit(_: Any, part: str = part, name: str = name, others: list[str] = others) -> None:
            for preset in others:
                if preset != EVERY:
                    resolved(preset, registry, **{part: name})

        if others:
            yield Check(part, name, "values_with_presets", values_fit, sections, WHERE)
    for name, values in sections.grids.items():
        for promise, work in of_grid(name, values, ["quick", *sections.presets], registry):
            yield Check("grid", name, promise, work, sections, WHERE)
