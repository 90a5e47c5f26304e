"""What stands on a page of Markdown: blocks of code, with the reason if they are not run, links, and headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Block", "blocks", "commands", "headings", "links"]

FENCE = re.compile(r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\S*)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A block of code; ``reason`` says why no test runs it, from the comment ``<!-- not run: ... -->`` before it."""

    language: str
    text: str
    reason: str


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of a language, in their order."""
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [
        Block(each["language"], each["text"], each["reason"] or "") for each in found if each["language"] == language
    ]


def commands(page: Path) -> list[list[str]]:
    """The shell commands that are to be run, split into words."""
    lines = [line for block in blocks(page, "sh") if not block.reason for line in block.text.splitlines()]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def _prose(page: Path) -> str:
    """The text without its code."""
    return re.sub(r"`[^`\n]*`", "``", FENCE.sub("", page.read_text(encoding="utf-8")))


def links(page: Path) -> Iterator[str]:
    """Where the links and images of a page point, as far as that is not the web."""
    prose = _prose(page)
    for found in re.finditer(r"\]\(([^()\s]+)\)", prose):
        if not re.match(r"[a-z]+:", found[1]):
            yield found[1]


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    found: dict[str, int] = {}
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for title in re.findall(r"^#{1,6} (.+)$", text, re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found[anchor] = found.get(anchor, -1) + 1
    return {f"{anchor}-{number}" if number else anchor for anchor, last in found.items() for number in range(last + 1)}
