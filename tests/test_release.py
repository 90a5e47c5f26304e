"""A release takes its notes from the changelog, and its site stands beside those of earlier versions."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

CHANGELOG = """# Changelog

## 0.3.0 (unreleased)

- Not yet.

## 0.2.0 (2026-12-01)

- One thing, which
  takes two lines.
- Another.

## 0.1.0

- The first.
"""


def notes_of(version: str, packaged: str, root: Path) -> str:
    (root / "pyproject.toml").write_text(f'[project]\nname = "cilnorm"\nversion = "{packaged}"\n')
    (root / "CHANGELOG.md").write_text(CHANGELOG)
    notes = runpy.run_path(str(ROOT / ".ci" / "release_notes.py"))["notes"]
    return str(notes(version, root))


def test_the_notes_are_the_entries_of_that_version(tmp_path: Path) -> None:
    assert notes_of("0.2.0", "0.2.0", tmp_path) == "- One thing, which\n  takes two lines.\n- Another.\n"
    assert notes_of("0.1.0", "0.1.0", tmp_path) == "- The first.\n"


@pytest.mark.parametrize(
    ("version", "packaged", "said"),
    [
        ("0.2.0", "0.1.0", "the tag says 0.2.0, pyproject.toml 0.1.0"),
        ("0.3.0", "0.3.0", "calls 0.3.0 unreleased"),
        ("0.2", "0.2", "nothing about 0.2"),
    ],
)
def test_a_version_that_is_not_ready_is_refused(version: str, packaged: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=said):
        notes_of(version, packaged, tmp_path)


def test_the_wheel_is_checked_from_the_repositorys_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a folder `cilnorm` lies, as in the workflow, and is not what was installed."""
    (tmp_path / "cilnorm").mkdir()
    (tmp_path / "cilnorm" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(ROOT / ".ci" / "check_wheel.py"))["installed_at"]()
    assert Path(found).name == "__init__.py"
    assert not Path(found).is_relative_to(tmp_path)


def test_the_changelog_speaks_of_the_packaged_version_or_the_next() -> None:
    found = subprocess.run(
        [sys.executable, ".ci/release_notes.py", "9.9.9"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 1
    assert "the tag says 9.9.9, pyproject.toml" in found.stderr


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.name)
def test_what_a_workflow_calls_is_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    for job in jobs.values():
        needs = job.get("needs", [])
        assert {needs} <= jobs.keys() if isinstance(needs, str) else set(needs) <= jobs.keys()
    for called in re.findall(r"\.ci/[\w.]+", text):
        assert (ROOT / called).is_file(), called


@pytest.mark.skipif(not (shutil.which("git") and shutil.which("bash")), reason="needs git and bash")
def test_the_sites_of_two_versions_stand_side_by_side(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
        done = subprocess.run(["git", *identity, *words], cwd=home, capture_output=True, text=True, check=True)
        return done.stdout

    home = tmp_path
    git("init", "--quiet", "--bare", "origin.git")
    git("init", "--quiet", "--initial-branch=main", "checkout")
    home = tmp_path / "checkout"
    git("remote", "add", "origin", str(tmp_path / "origin.git"))
    git("commit", "--quiet", "--allow-empty", "--message", "code")
    (home / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "put_site.sh", home / ".ci")
    for version in ("0.2.0", "0.10.0"):
        site = tmp_path / f"site-{version}"
        site.mkdir()
        (site / "index.html").write_text(version)
        done = subprocess.run(["bash", ".ci/put_site.sh", str(site), version], cwd=home, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        git("worktree", "prune")
        git(
            "worktree",
            "remove",
            "--force",
            git("worktree", "list", "--porcelain").rpartition("worktree ")[2].split()[0],
        )
    git("fetch", "--quiet", "origin")
    kept = git("ls-tree", "-r", "--name-only", "origin/gh-pages").split()
    assert kept == [
        ".nojekyll",
        "0.10.0/index.html",
        "0.2.0/index.html",
        "index.html",
        "stable/index.html",
        "versions.html",
    ]
    assert git("show", "origin/gh-pages:stable/index.html") == "0.10.0"
    listed = git("show", "origin/gh-pages:versions.html")
    assert listed.index(">0.10.0<") < listed.index(">0.2.0<")
