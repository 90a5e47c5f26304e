"""The shape of the code: which package may import which, what is public, how long things are, the table of contents."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from cilnorm.hookspecs import GROUP
from tests.conftest import ROOT

# The packages of cilnorm/ and what each may import; `vocabulary` is the top level without the modules named here.
MAY_IMPORT = {
    "vocabulary": set(),
    "training": {"vocabulary"},
    "data": {"vocabulary"},
    "settings": {"vocabulary"},
    "spec": {"vocabulary", "settings", "training"},
    "storage": {"vocabulary", "settings", "training", "spec"},
    "experiment": {"vocabulary", "data", "settings", "training", "spec", "storage"},
    "results": {"vocabulary", "data", "settings", "training", "spec", "storage", "experiment"},
    "sweep": {"vocabulary", "data", "settings", "training", "spec", "storage"},
    "starter": {"vocabulary"},
    "testing": {"vocabulary", "settings", "training", "spec", "storage", "experiment", "sweep"},
    "api": {"vocabulary", "data", "settings", "training", "spec", "storage", "experiment", "results", "sweep"},
    "integrations": {"vocabulary"},
    "cli": {
        *("vocabulary", "data", "settings", "training", "spec", "storage", "experiment", "results", "sweep", "api"),
        *("testing", "starter"),
    },
}
# What a plugin may import from cilnorm: these paths are promised, whoever writes the plugin.
PUBLIC = {
    "batch",
    "files",
    "growing",
    "heads",
    "hookspecs",
    "images",
    "losses",
    "method",
    "metrics",
    "network",
    "norms",
    "registry",
    "rows_aware",
    "running",
    "spec",
    "telling",
    "values",
}
PLUGINS = ("cilnorm_norms", "cilnorm_methods", "cilnorm_backbones", "cilnorm_datasets", "cilnorm_loggers")
OF_BATCH_NORM = {"num_features", "eps", "momentum", "affine", "track_running_stats", "device", "dtype"}

CORE_FILES = sorted((ROOT / "cilnorm").rglob("*.py"))
PLUGIN_FILES = sorted(path for package in PLUGINS for path in (ROOT / "plugins" / package).rglob("*.py"))
FILES = CORE_FILES + PLUGIN_FILES


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    base = ROOT if path.is_relative_to(ROOT / "cilnorm") else ROOT / "plugins"
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, inside functions and for types too, by their whole names."""
    found = set()
    home = module_name(path).split(".")
    home = home if path.name == "__init__.py" else home[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            inside = {f"{start}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else start for name in inside}
    return found


def package_of(module: str) -> str:
    """The row of ``MAY_IMPORT`` in which a module of cilnorm stands; the face belongs to none."""
    first = module.split(".")[1] if "." in module else ""
    if first == "__main__":  # ``python -m cilnorm``
        return "cli"
    return first if first in MAY_IMPORT or not first else "vocabulary"


def within_cilnorm(path: Path) -> Iterator[tuple[str, str]]:
    for other in imports(path):
        if other.split(".")[0] == "cilnorm":
            yield other, package_of(other)


def test_packages_import_one_way() -> None:
    wrong = []
    for path in CORE_FILES:
        mine = package_of(module_name(path))
        for other, package in within_cilnorm(path):
            if mine and package and package != mine and package not in MAY_IMPORT[mine]:
                wrong.append(f"{named(path)} imports {other}: {mine} may import {sorted(MAY_IMPORT[mine])}")
        wrong += [
            f"{named(path)} imports the plugin {other}; the core knows none"
            for other in imports(path)
            if other.split(".")[0] in PLUGINS
        ]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_by_way_of_others() -> None:
    within = {name: {other for other in imports(path) if other in MODULES} for name, path in MODULES.items()}
    within.pop("cilnorm")  # imports when a name is first asked for
    left = dict(within)
    while free := [name for name, others in left.items() if not others & left.keys() - {name}]:
        for name in free:
            del left[name]
    assert not left, f"in a circle: {sorted(left)}"


def test_plugins_import_what_is_public_and_never_one_another() -> None:
    wrong = []
    for path in PLUGIN_FILES:
        own = module_name(path).split(".")[0]
        for other in imports(path):
            package, _, rest = other.partition(".")
            if package == "cilnorm" and rest not in PUBLIC:
                wrong.append(f"{named(path)} imports {other}, which is not for plugins")
            if package in PLUGINS and package != own:
                wrong.append(f"{named(path)} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_integrations_import_what_is_public() -> None:
    allowed = {f"cilnorm.{name}" for name in PUBLIC}
    wrong = [
        f"{named(path)} imports {other}, which is not public"
        for path in (ROOT / "cilnorm" / "integrations").glob("*.py")
        for other, package in within_cilnorm(path)
        if package != "integrations" and other not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_public_modules_are_there() -> None:
    assert {f"cilnorm.{name}" for name in PUBLIC} <= MODULES.keys()


def test_importing_the_face_does_not_import_torch() -> None:
    code = "import cilnorm, cilnorm.cli.app, cilnorm.hookspecs, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_exist_and_say_what_they_are() -> None:
    wrong = []
    for path in CORE_FILES:
        module = importlib.import_module(module_name(path))
        names = list(getattr(module, "__all__", ()))
        if not module.__doc__:
            wrong.append(f"{named(path)} has no docstring")
        if names != sorted(names, key=isort_order):
            wrong.append(f"{named(path)}: __all__ is not sorted")
        for name in names:
            thing = getattr(module, name)
            if (inspect.isclass(thing) or inspect.isroutine(thing)) and not thing.__doc__:
                wrong.append(f"{named(path)}: {name} has no docstring")
    assert not wrong, "\n".join(wrong)


def isort_order(name: str) -> tuple[int, str]:
    """CONSTANTS, then Classes, then functions, as the linter sorts them."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2), name


def test_nothing_is_too_long() -> None:
    wrong = []
    for path in FILES:
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > 350:
            wrong.append(f"{named(path)} has {lines} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                wrong += [f"{named(path)}: {node.name} {fault}" for fault in faults(node, path)]
    assert not wrong, "\n".join(wrong)


def faults(node: ast.FunctionDef | ast.AsyncFunctionDef, path: Path) -> Iterator[str]:
    length = (node.end_lineno or 0) - node.lineno + 1
    if length > 60:
        yield f"has {length} lines"
    arguments = {argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
    own = arguments - {"self", "cls"} - (OF_BATCH_NORM if "num_features" in arguments else set())
    command = path.parent.name == "cli" and node.decorator_list
    kernel = any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)  # has pointers, sizes
    if len(own) > 9 and not command and not kernel:
        yield f"takes {len(own)} arguments"


def test_the_table_of_contents_lists_every_plugin_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = project["entry-points"][GROUP]
    marks = ("\n@hookimpl\n", "\n@hookspecs.hookimpl\n")
    hooked = [module_name(path) for path in PLUGIN_FILES if any(mark in path.read_text() for mark in marks)]
    assert sorted(listed.values()) == sorted(hooked)
    for name, module in listed.items():
        package, stem = module.split(".")
        assert name == f"{package.removeprefix('cilnorm_')}.{stem}"


def test_every_name_of_the_package_is_there() -> None:
    import cilnorm

    assert dir(cilnorm) == sorted(cilnorm.__all__)
    assert set(cilnorm._HOMES) | {"registry"} == set(cilnorm.__all__)
    for name in cilnorm.__all__:
        assert getattr(cilnorm, name) is not None
    with pytest.raises(AttributeError, match="module 'cilnorm' has no attribute 'nrom_factory'"):
        cilnorm.nrom_factory  # noqa: B018


def test_every_package_that_ships_is_typed() -> None:
    for package in (ROOT / "cilnorm", *(ROOT / "plugins" / name for name in PLUGINS)):
        assert (package / "py.typed").exists(), f"{package.name} has no py.typed"
