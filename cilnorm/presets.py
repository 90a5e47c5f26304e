"""Files with presets, what methods and norms change with them, and grids: registry.yaml, and those of plugins.

Such a file has the sections ``presets``, ``methods``, ``norms`` and ``grids`` of registry.yaml. It can only add. A name
that is there already is refused, and so is a value for a method or norm with a preset if its owner brings neither.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from cilnorm.text import nearest
from cilnorm.values import SpecError, mappings, parsed

__all__ = [
    "EVERY",
    "OWN",
    "SECTIONS",
    "Options",
    "Sections",
    "check_added",
    "names_with_values",
    "read_sections",
    "shipped",
]

Options = Mapping[str, Any]
OWN = {"method": "methods", "norm": "norms"}  # the parts of a run that change presets, and where they do
SECTIONS = ("presets", *OWN.values(), "grids")
PARTS = ("method", "norm", "backbone", "dataset")
EVERY = "every"  # in the place of a preset: with every one


@dataclass(frozen=True)
class Sections:
    """One file, read.

    Attributes:
        owner: the distribution that brings it, with its version.
        presets, grids: values by name, as the file has them.
        methods, norms: values by name and preset.
    """

    owner: str
    presets: Mapping[str, Options]
    methods: Mapping[str, Mapping[str, Options]]
    norms: Mapping[str, Mapping[str, Options]]
    grids: Mapping[str, Options]

    @property
    def names(self) -> Iterator[tuple[str, str]]:
        """(kind, name) of everything that it adds."""
        yield from (("preset", name) for name in self.presets)
        yield from (("grid", name) for name in self.grids)

    @property
    def own(self) -> Iterator[tuple[str, str, Mapping[str, Options]]]:
        """(part, name, values by preset) of every method and norm that changes presets."""
        for part, section in OWN.items():
            yield from ((part, name, by_preset) for name, by_preset in getattr(self, section).items())


def read_sections(source: Traversable, where: str, owner: str = "") -> Sections:
    """Reads a file.

    Args:
        where: what messages call it.

    Raises:
        SpecError: it is not there, no YAML, larger than what people write, or has other than the known sections.
    """
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{where}: {getattr(error, 'strerror', None) or 'no text'}") from error
    content = names_with_values(text, where)
    for name in content:
        if name not in SECTIONS:
            raise SpecError(nearest("section of registry.yaml", name, SECTIONS))
    read = {name: mappings(content.get(name, {}), f"{where}: {name}") for name in SECTIONS}
    sections = Sections(owner, **read)
    for part, name, by_preset in sections.own:
        mappings(by_preset, f"{OWN[part]}.{name}")
    return sections


@functools.cache
def shipped() -> Sections:
    """Registry.yaml.

    Raises:
        SpecError: as ``read_sections``.
    """
    packaged = files("cilnorm") / "registry.yaml"
    beside = Path(__file__).resolve().parents[1] / "registry.yaml"  # where an editable install has it
    source = packaged if packaged.is_file() else beside
    return read_sections(source, "registry.yaml", f"cilnorm {importlib.metadata.version('cilnorm')}")


def names_with_values(text: str, where: str) -> dict[str, Any]:
    """What a YAML text of names with values says.

    Raises:
        SpecError: it says something else; the message begins with ``where``.
    """
    content = parsed(text, where)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SpecError(f"{where}: expected names with values, found {type(content).__name__}")
    return content


def check_added(new: Sections, present: Sequence[Sections], sources: Mapping[str, Mapping[str, str]]) -> None:
    """Looks whether a file only adds to those that are there, registry.yaml first.

    Args:
        sources: the distribution of each method and norm, by part and name.

    Raises:
        SpecError: it takes a name, changes what belongs to others, or names what is not there.
    """
    owners = {name: sections.owner for sections in present for name in sections.names}
    for kind, name in new.names:
        if (kind, name) in owners:
            raise SpecError(f"the {kind} {name!r} of {new.owner} is already there, from {owners[kind, name]}")
    found = {name: dict(values) for name, values in present[0].presets.items()}
    for name, values in new.presets.items():
        if (base := str(values.get("extends", ""))) and base not in found:
            raise SpecError(f"preset {name} extends {base!r}: {nearest('earlier preset', base, found)}")
        found[name] = {**found.get(base, {}), **values}
        for part in PARTS:
            if not isinstance(found[name].get(part), str):
                raise SpecError(f"preset {name} has no {part}; a preset names {', '.join(PARTS)} or extends one")
    for part, name, by_preset in new.own:
        if name not in sources[part]:
            raise SpecError(nearest(part, name, sources[part]))
        where, home = f"{OWN[part]}.{name}", sources[part][name]
        for preset in by_preset:
            if preset not in (*found, EVERY):
                raise SpecError(f"{where}: {nearest('preset of its own or of cilnorm', preset, found)}")
            if preset not in new.presets and home != new.owner:
                raise SpecError(
                    f"{where}.{preset}: the {part} is from {home}, the preset not from {new.owner}; "
                    "add a preset that extends it, and change that"
                )
