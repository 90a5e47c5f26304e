"""Rounding as people do it, and names that no format takes for something else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cilnorm.text import csv_cell, half_up, markdown, markdown_code, tex, tex_label


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (0.25, 1, "0.3"),  # Python's own format says 0.2
        (0.35, 1, "0.4"),
        (100 * 9 / 400, 1, "2.3"),  # 2.25
        (1.15, 1, "1.2"),  # as a float a little less than that
        (0.24999, 1, "0.2"),
        (0.125, 2, "0.13"),
        (-0.25, 1, "-0.3"),
        (-0.04, 1, "0.0"),
        (100.0, 1, "100.0"),
        (35.5, 0, "36"),
        (float("nan"), 1, "nan"),
    ],
)
def test_a_half_is_rounded_away_from_zero(value: float, digits: int, shown: str) -> None:
    assert half_up(value, digits) == shown


@given(st.integers(1, 20_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_percents_of_images_are_rounded_as_the_exact_ratio_is(counts: tuple[int, int]) -> None:
    right, images = counts
    tenths = (2 * 1000 * right + images) // (2 * images)  # of a percent, half up, in whole numbers
    assert half_up(100 * right / images) == f"{tenths // 10}.{tenths % 10}"


def test_latex_prints_every_sign() -> None:
    assert tex("a_b & 5% {x}\\ ~^ <$#>") == (
        r"a\_b \& 5\% \{x\}\textbackslash{} \textasciitilde{}\textasciicircum{} \textless{}\$\#\textgreater{}"
    )
    assert tex("two\n\nparagraphs") == "two paragraphs"
    assert tex_label("my table}%_1") == "my-table-1"


def test_markdown_stays_in_its_cell() -> None:
    assert markdown("a|b <b> *x* [y](z)\n# `q`") == r"a\|b \<b\> \*x\* \[y\](z) \# \`q\`"
    assert markdown_code("a|b") == r"`a\|b`"
    assert markdown_code("a`b``") == "``` a`b`` ```"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", " ="])
def test_a_spreadsheet_finds_no_formula(start: str) -> None:
    assert csv_cell(f"{start}1+1") == f"'{start}1+1"
    assert csv_cell(f"tbbn{start}1") == f"tbbn{start}1"
