"""Prints what CHANGELOG.md says of a version: the text of its release.

    python .ci/release_notes.py 0.2.0

It refuses a version that is not the package's, is called unreleased, or has nothing written about it.
"""

import re
import sys
import tomllib
from pathlib import Path


def notes(version: str, root: Path) -> str:
    """The entries of a version, without its heading."""
    packaged = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if version != packaged:
        raise SystemExit(f"the tag says {version}, pyproject.toml {packaged}")
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(version)}(?P<rest>| .*)\n(?P<text>(?:(?!^## ).*\n?)*)", changelog, re.M)
    if found is None or not found["text"].strip():
        raise SystemExit(f"CHANGELOG.md has nothing about {version}")
    if "unreleased" in found["rest"]:
        raise SystemExit(f"CHANGELOG.md calls {version} unreleased; give it its date")
    return found["text"].strip() + "\n"


if __name__ == "__main__":
    print(notes(sys.argv[1], Path(__file__).resolve().parent.parent), end="")
