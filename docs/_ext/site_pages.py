"""Sphinx: writes the pages that are made from the code, and reads docstrings and links as they stand here."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from reference_pages import pages

__all__ = ["setup"]

MADE = ("modules", "options")  # folders below docs/reference that hold nothing else
FOLDER_LINK = re.compile(r"\[([^\]]+)\]\(([\w./-]+)\)")


def write_pages(app: Any) -> None:
    """Writes what changed, so that Sphinx reads no more than that again, and removes what is made no more."""
    home, wanted = Path(app.srcdir) / "reference", pages()
    for folder in MADE:
        for path in (home / folder).rglob("*.*"):
            if path.relative_to(home).as_posix() not in wanted:
                path.unlink() if path.is_file() else shutil.rmtree(path)
    for name, text in wanted.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def unlink_folders(app: Any, name: str, source: list[str]) -> None:
    """A link to a folder, which GitHub shows and a site does not, becomes its words."""
    here = Path(app.env.doc2path(name)).parent
    source[0] = FOLDER_LINK.sub(lambda link: f"`{link[1]}`" if (here / link[2]).is_dir() else link[0], source[0])


def mark_literal_blocks(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """In our docstrings an indented block after a blank line is code or an equation, without the ``::`` of Sphinx.

    Signs that reStructuredText would take for marks of its own are escaped elsewhere.
    """
    found: list[str] = []
    literal = False
    for line in lines:
        indented, blank = line.startswith("    "), not line.strip()
        if indented and not literal and found and not found[-1].strip() and not _in_section(found):
            found += ["::", ""]
            literal = True
        elif not indented and not blank:
            literal = False
        found.append(line if literal or line.lstrip().startswith(">>>") else _escaped(line))
    lines[:] = found


def _in_section(lines: list[str]) -> bool:
    """Whether the last unindented line opens a section, as ``Args:`` does."""
    last = next((line for line in reversed(lines) if line.strip() and not line.startswith(" ")), "")
    return re.fullmatch(r"[A-Z][a-z]+:", last) is not None


def _escaped(line: str) -> str:
    parts = re.split(r"(``.+?``)", line)
    parts[::2] = [re.sub(r"(?<!\\)\||(?<=\w)_(?!\w)|\*(?!\*?\w+[,:])", r"\\\g<0>", part) for part in parts[::2]]
    return "".join(parts)


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("builder-inited", write_pages)
    app.connect("source-read", unlink_folders)
    app.connect("autodoc-process-docstring", mark_literal_blocks, priority=400)  # before napoleon reads the sections
    return {"parallel_read_safe": True, "parallel_write_safe": True}
