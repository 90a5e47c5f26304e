"""A plugin package to begin with: files from the templates beside this one, ready to install, test and change."""

from __future__ import annotations

import re
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from cilnorm.hookspecs import API_VERSION
from cilnorm.registry import NAME, Registry
from cilnorm.values import SpecError

__all__ = ["KINDS", "make_package"]

KINDS = ("norm", "method", "backbone", "dataset", "logger", "preset")
SHARED = {  # template -> file of the package
    "pyproject.toml": "pyproject.toml",
    "readme.md": "README.md",
    "workflow.yml": ".github/workflows/test.yml",
    "gitignore": ".gitignore",
    "init.py": "{package}/__init__.py",
    "test.py": "tests/test_{module}.py",
}


def make_package(kind: str, name: str, into: Path, registry: Registry) -> Path:
    """Writes ``into/cilnorm-NAME`` with one record of a kind, or a preset with a grid; returns the folder.

    Args:
        name: what users will type after ``--norm`` and the like.

    Raises:
        SpecError: no such kind; no name for a record, or one that is taken; a folder that is there already.
    """
    if kind not in KINDS:
        raise SpecError(f"there is no plugin of the kind {kind!r}; it is one of {', '.join(KINDS)}")
    if not NAME.fullmatch(name) or not name[0].isalpha() or not name.isascii():
        raise SpecError(f"{name!r} is no name for a {kind}: lower case letters first, then digits and _ . + * - too")
    if owner := _owner(kind, name, registry):
        raise SpecError(f"the {kind} {name!r} is already there, from {owner}")
    module = re.sub(r"\W+", "_", name).strip("_")
    facts = {
        "kind": kind,
        "name": name,
        "module": module,
        "package": f"cilnorm_{module}",
        "distribution": f"cilnorm-{module.replace('_', '-')}",
        "title": "".join(word.capitalize() for word in module.split("_")),
        "api_version": API_VERSION,
        "version": version("cilnorm"),
    }
    folder = into / str(facts["distribution"])
    if folder.exists():
        raise SpecError(f"{folder} is there already; give --out another place")
    beside = {"settings.yaml": "{package}/settings.yaml"} if kind == "preset" else {}
    for template, path in {**SHARED, f"{kind}.py": "{package}/{module}.py", **beside}.items():
        target = folder / path.format(**facts)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_rendered(template, facts), encoding="utf-8")
    return folder


def _owner(kind: str, name: str, registry: Registry) -> str:
    """The distribution that has the name; empty where it is free."""
    for shelf in registry.shelves:
        if shelf.kind == kind and name in shelf:
            return shelf.sources.get(shelf[name].name, "a plugin")
    taken = {each: sections.owner for sections in registry.settings for each in sections.names}
    return taken.get((kind, name), "") or (taken.get(("grid", name), "") if kind == "preset" else "")


def _rendered(template: str, facts: dict[str, object]) -> str:
    from jinja2 import Environment, StrictUndefined

    text = (files("cilnorm.starter") / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
    return Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(text).render(facts)
