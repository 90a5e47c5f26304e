"""Numbers and names as people read them, and as each format of a table needs them written."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from decimal import ROUND_HALF_UP, Decimal

__all__ = ["csv_cell", "half_up", "markdown", "markdown_code", "nearest", "tex", "tex_label"]

NOISE = 9  # decimal places beyond which a float holds rounding errors; no ratio of image counts lies that near a tie
TEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "*": r"$^*$",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}  # fmt: skip


def half_up(value: float, digits: int = 1) -> str:
    """``value`` with so many decimal places, a half rounded away from zero: 0.25 is 0.3, not 0.2 as Python has it."""
    if not math.isfinite(value):
        return str(value)
    exact = Decimal(f"{value:.{NOISE}f}")
    rounded = exact.quantize(Decimal(1).scaleb(-digits), rounding=ROUND_HALF_UP)
    return str(rounded if rounded else abs(rounded))  # no -0.0


def tex(text: str) -> str:
    """Text for LaTeX, every character with a meaning of its own written so that it is printed."""
    return "".join(TEX.get(sign, sign) for sign in " ".join(text.split()))


def tex_label(text: str) -> str:
    r"""Text for ``\label``, which takes no escapes: other signs than letters, digits and . : - become a dash."""
    return re.sub(r"[^A-Za-z0-9.:-]+", "-", text)


def markdown(text: str) -> str:
    """Text for a line or a cell of Markdown, without emphasis, links, HTML or a new column in it."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", " ".join(text.split()))


def markdown_code(text: str) -> str:
    """A code span that holds ``text``, in a cell of a table too."""
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{room}{text}{room}{fence}".replace("|", r"\|")


def csv_cell(text: str) -> str:
    """Text for a cell of CSV that no spreadsheet takes for a formula: what begins like one gets a ' in front."""
    return f"'{text}" if text.lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else text


def nearest(kind: str, asked: str, known: Iterable[str]) -> str:
    """One line for a misspelt name: what was asked, what is nearest, what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(asked, names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"no {kind} called {asked!r}{hint} there are {', '.join(names) or 'none'}"
