"""The site: its links lead somewhere, its commands run, and the reference has all that can be chosen or set."""

from __future__ import annotations

import configparser
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from cilnorm.cli.app import app
from cilnorm.registry import load
from cilnorm.settings.options import options_of
from cilnorm.spec import SECTIONS, Spec, read_settings
from cilnorm.testing.collection import records_of
from tests import pages
from tests.conftest import ROOT
from tests.test_starter import installed
from tests.test_structure import PUBLIC

DOCS = ROOT / "docs"
MADE = ("gallery", "modules", "options")  # folders that the build fills
PAGES = sorted(
    path
    for path in (*DOCS.glob("*.md"), *DOCS.glob("reference/*.md"), *DOCS.glob("tutorials/*.md"))
    if path.name not in ("changelog.md", "commands.md", "events.md")
)
TUTORIALS = sorted(DOCS.glob("tutorials/*.md"))
AT_ROOT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
SHORT = ("--tasks", "2", "--set", "classes=4", "--epochs", "1", "--memory", "16", "--set", "train_per_class=20")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def reference() -> dict[str, str]:
    """The pages that are made from the code, by their path below docs/reference."""
    sys.path.insert(0, str(DOCS / "_ext"))
    try:
        made: dict[str, str] = importlib.import_module("reference_pages").pages()
    finally:
        sys.path.remove(str(DOCS / "_ext"))
    return made


@pytest.mark.parametrize("page", [*AT_ROOT, *PAGES], ids=named)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    wrong = []
    for link in pages.links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            wrong.append(f"{link}: no such file")
        elif anchor and anchor not in pages.headings(target):
            wrong.append(f"{link}: no such heading; there are {sorted(pages.headings(target))}")
    assert not wrong, "\n".join(wrong)


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A head-line: `x`\n\n[a](b.md) [c](#a-head-line-x) [w](https://x.org) `[n](o.md)`\n\n## a\n## a\n"
    )
    assert list(pages.links(page)) == ["b.md", "#a-head-line-x"]
    assert pages.headings(page) == {"a-head-line-x", "a", "a-1"}


def test_every_page_has_its_place(reference: dict[str, str]) -> None:
    listed = set()
    for page in PAGES:
        for block in pages.blocks(page, "{toctree}"):
            entries = [line for line in block.text.splitlines() if line and not line.startswith(":")]
            listed |= {(page.parent / entry).relative_to(DOCS).as_posix() for entry in entries}
    committed = {path.relative_to(DOCS).with_suffix("").as_posix() for path in PAGES}
    made = {f"reference/{path.rpartition('.')[0]}" for path in reference}
    assert listed == (committed | made | {"gallery/index"}) - {"index"}


def test_every_public_module_is_in_the_reference(reference: dict[str, str]) -> None:
    assert set(importlib.import_module("reference_pages").PUBLIC) == PUBLIC
    for name in PUBLIC:
        assert f".. automodule:: cilnorm.{name}\n   :members:\n" in reference[f"modules/{name}.rst"]
    for hook in ("norms", "methods", "backbones", "datasets", "loggers", "settings"):
        assert f".. autofunction:: cilnorm.hookspecs.cilnorm_{hook}\n" in reference["modules/hookspecs.rst"]


def test_every_name_of_the_package_is_in_the_reference(reference: dict[str, str]) -> None:
    import cilnorm

    page = reference["modules/cilnorm.rst"]
    assert [name for name in cilnorm.__all__ if not re.search(rf"cilnorm\.{name}(``)?$", page, re.M)] == []


def test_every_command_and_option_is_in_the_reference(reference: dict[str, str]) -> None:
    group: Any = typer.main.get_command(app)
    sections = re.split(r"^## ", reference["commands.md"], flags=re.M)
    for name, command in group.commands.items():
        [section] = [section for section in sections if section.startswith(f"`cilnorm {name}`\n")]
        for parameter in command.params:
            if parameter.name != "help":
                shown = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.metavar or parameter.name
                assert shown.casefold() in section.casefold(), f"{name} {shown}"


def test_every_option_of_every_record_is_in_the_reference(reference: dict[str, str]) -> None:
    for shelf in load().shelves:
        sections = re.split(r"^## ", reference[f"options/{shelf.kind}s.md"], flags=re.M)
        ours = [record for name, record in shelf.items() if shelf.sources[name].startswith("cilnorm ")]
        assert ours
        for record in ours:
            [section] = [section for section in sections if section.startswith(f"`{record.name}`\n")]
            for option in options_of(shelf.kind, record.build):
                assert f"\n| `{option}` |" in section, f"{record.name} {option}"


def test_every_setting_and_preset_is_in_the_reference(reference: dict[str, str]) -> None:
    for made in (Spec, *SECTIONS.values()):
        for key in options_of("", made):
            assert key in SECTIONS or "_options" in key or f"\n| `{key}` |" in reference["options/settings.md"], key
    for name in read_settings().presets:
        assert f"\n## `{name}`\n" in reference["options/presets.md"]


def test_the_reference_reads_as_markdown(reference: dict[str, str]) -> None:
    """No reStructuredText where Markdown is read, no address that is no link, no bare sign that would be one."""
    for name, text in reference.items():
        prose = re.sub(r"```.*?```|`[^`]*`|^    .*$", "", text, flags=re.S | re.M)
        if name.endswith(".md"):
            assert "``" not in prose, name
            assert not re.search(r"(?<![<(])https?://", prose), name
            assert not re.search(r"(?<!\\)[*_]\w", re.sub(r"<[^>]*>", "", prose)), name


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=named)
def test_the_commands_of_a_tutorial_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(tmp_path)
    for number, block in enumerate(pages.blocks(page, "yaml")):
        assert number == 0
        Path("mine.yaml").write_text(block.text)
    for words in pages.commands(page):
        run(words, site)


def run(words: list[str], site: Path) -> None:
    """A command as the page has it; runs are cut short, and in this process, to import torch once."""
    if words[:3] == ["pip", "install", "-e"]:
        installed(Path(words[3].removesuffix("[test]")).resolve(), site)
        importlib.invalidate_caches()
    elif words[:2] == ["cilnorm", "check"]:  # of what `cilnorm new` makes, tests/test_starter.py runs every check
        assert records_of(words[2])
    elif words[0] == "python":  # which tests/test_examples.py runs
        assert words[1] in (ROOT / "tests" / "test_examples.py").read_text().replace('" / "', "/")
    else:
        assert words[0] == "cilnorm", words
        short = SHORT if words[1] == "run" and "--dry-run" not in words else ()
        result = CliRunner().invoke(app, [*words[1:], *short])
        assert result.exit_code == 0, f"{' '.join(words)}\n{result.output}"


@pytest.mark.parametrize("page", TUTORIALS, ids=named)
def test_a_tutorial_has_something_to_do_and_says_what_comes_next(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert pages.blocks(page, "sh")
    assert re.search(r"^Next: ", text, re.M)
    assert text.splitlines()[2].startswith("You get ")


@pytest.mark.parametrize("page", [page for page in TUTORIALS if pages.blocks(page, "python")], ids=named)
def test_the_code_of_a_tutorial_runs(page: Path) -> None:
    for block in pages.blocks(page, "python"):
        exec(compile(block.text, named(page), "exec"), {})


def test_the_needs_of_the_site_are_the_same_everywhere() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    assert tox["testenv:docs"]["deps"].split() == extra


def test_what_is_made_is_not_kept() -> None:
    paths = [f"docs/{name}/page.md" for name in ("gallery", "reference/modules", "reference/options")]
    paths += [f"docs/reference/{name}.md" for name in ("changelog", "commands", "events")]
    found = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode != 128:  # no checkout
        assert found.stdout.split() == paths
