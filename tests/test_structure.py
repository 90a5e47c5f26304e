"""The shape of the code: who may import whom, what is public, how long things are, and the table of contents."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cilnorm.hookspecs import GROUP
from tests.conftest import ROOT

# A module imports only from rows above its own, and within its row from those named in WITHIN.
ROWS = (
    ("hookspecs", "batch", "images", "streams", "files", "layout", "sealed", "values", "text", "identity", "output"),
    ("losses", "heads", "network", "registry", "charts", "orders", "running"),
    ("method", "local_similarity", "precision"),
    ("data", "memory", "protocol", "norms", "options"),
    ("feed",),
    ("engine",),
    ("capture",),
    ("spec",),
    ("grid", "published"),
    ("assemble", "metrics", "evaluation", "environment", "records", "folder", "checkpoint", "figures"),
    ("tuning", "guard", "events", "rehearsal", "precise"),
    ("trials",),
    ("runner",),
    ("jobs", "table", "probe"),
    ("workers", "board", "results", "progress", "terminal", "loggers", "export", "doctor"),
    ("report", "comparison", "slurm"),
    ("cli_results", "cli_care", "cli_show"),
    ("cli",),
)
WITHIN = {
    "network": {"heads"},
    "local_similarity": {"method"},
    "evaluation": {"assemble"},
    "folder": {"metrics", "environment", "records"},
    "layout": {"files"},
    "sealed": {"files"},
    "checkpoint": {"environment"},
    "figures": {"metrics"},
    "guard": {"events"},
    "loggers": {"terminal"},
}
FOR_PLUGINS = {name for row in ROWS[:3] for name in row} - {"registry"}
PLUGINS = ("cilnorm_norms", "cilnorm_methods", "cilnorm_backbones", "cilnorm_datasets", "cilnorm_loggers")
OF_BATCH_NORM = {"num_features", "eps", "momentum", "affine", "track_running_stats", "device", "dtype"}

CORE_FILES = sorted((ROOT / "cilnorm").glob("*.py"))
PLUGIN_FILES = sorted(path for package in PLUGINS for path in (ROOT / "plugins" / package).glob("*.py"))
FILES = CORE_FILES + PLUGIN_FILES


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[tuple[str, str]]:
    """(package, module) of every import in a file, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = ".".join(
                [path.parent.name] * node.level + [node.module] * bool(node.module)
            )  # level: dots before it
            names = [home] if "." in home else [f"{home}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {(name.split(".")[0], [*name.split("."), ""][1]) for name in names}
    return found


def test_the_table_of_rows_names_every_module_once() -> None:
    modules = {path.stem for path in CORE_FILES} - {"__init__"}
    listed = [name for row in ROWS for name in row]
    assert len(listed) == len(set(listed))
    missing = modules - set(listed)
    assert not missing, f"say in ROWS of {named(Path(__file__))} from which rows {sorted(missing)} may import"


@pytest.mark.parametrize("path", CORE_FILES, ids=named)
def test_the_core_imports_one_way(path: Path) -> None:
    if path.stem == "__init__":  # imports when a name is first asked for; its TYPE_CHECKING block names its homes
        return
    [row] = [at for at, names in enumerate(ROWS) if path.stem in names]
    allowed = {name for names in ROWS[:row] for name in names} | WITHIN.get(path.stem, set())
    for package, module in imports(path):
        assert package not in PLUGINS, f"{named(path)} imports the plugin {package}; the core knows none"
        if package == "cilnorm":
            assert module in allowed, f"{named(path)} imports cilnorm.{module}, which stands no row above it"


def test_exceptions_within_a_row_are_used() -> None:
    for name, others in WITHIN.items():
        path = ROOT / "cilnorm" / f"{name}.py"
        if path.exists():
            assert {("cilnorm", other) for other in others} <= imports(path), f"{name} needs no exception any more"


@pytest.mark.parametrize("path", PLUGIN_FILES, ids=named)
def test_plugins_import_the_vocabulary_and_never_one_another(path: Path) -> None:
    for package, module in imports(path):
        if package == "cilnorm":
            assert module in FOR_PLUGINS, f"{named(path)} imports cilnorm.{module}, which is not for plugins"
        if package in PLUGINS:
            assert package == path.parent.name, f"{named(path)} imports {package}"


def test_importing_the_face_does_not_import_torch() -> None:
    code = "import cilnorm, cilnorm.cli, cilnorm.hookspecs, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("path", CORE_FILES, ids=named)
def test_public_names_exist_and_say_what_they_are(path: Path) -> None:
    module = importlib.import_module("cilnorm" if path.stem == "__init__" else f"cilnorm.{path.stem}")
    assert module.__doc__
    assert list(module.__all__) == sorted(module.__all__, key=isort_order)
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isroutine(thing):
            assert thing.__doc__, f"{named(path)}: {name} has no docstring"


def isort_order(name: str) -> tuple[int, str]:
    """CONSTANTS, then Classes, then functions, as the linter sorts them."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2), name


@pytest.mark.parametrize("path", FILES, ids=named)
def test_nothing_is_too_long(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.count("\n")
    assert lines <= 350, f"{named(path)} has {lines} lines"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        length = (node.end_lineno or 0) - node.lineno + 1
        assert length <= 60, f"{named(path)}: {node.name} has {length} lines"
        arguments = {argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
        own = arguments - {"self", "cls"} - (OF_BATCH_NORM if "num_features" in arguments else set())
        commands = path.stem.startswith("cli") and node.decorator_list
        kernel = any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)  # has pointers, sizes
        assert len(own) <= 9 or commands or kernel, f"{named(path)}: {node.name} takes {len(own)} arguments"


def test_the_table_of_contents_lists_every_plugin_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = project["entry-points"][GROUP]
    hooked = {
        f"{path.parent.name}.{path.stem}": path for path in PLUGIN_FILES if "\n@hookimpl\n" in path.read_text()
        or "\n@hookspecs.hookimpl\n" in path.read_text()
    }  # fmt: skip
    assert sorted(listed.values()) == sorted(hooked)
    for name, module in listed.items():
        package, stem = module.split(".")
        assert name == f"{package.removeprefix('cilnorm_')}.{stem}"


def test_every_name_of_the_package_is_there() -> None:
    import cilnorm

    assert dir(cilnorm) == sorted(cilnorm.__all__)
    assert set(cilnorm._HOMES) | {"registry"} == set(cilnorm.__all__)
    with pytest.raises(AttributeError, match="module 'cilnorm' has no attribute 'nrom_factory'"):
        cilnorm.nrom_factory  # noqa: B018


def test_the_package_is_typed() -> None:
    assert (ROOT / "cilnorm" / "py.typed").exists()
