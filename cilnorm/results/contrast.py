"""Two runs, or two groups of seeds, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cilnorm.results import comparison, reading

__all__ = ["Contrast", "compare"]

LONG = 60  # characters; a longer name hides the sentence that it stands in


@dataclass(frozen=True)
class Contrast:
    """Two runs, or two groups of seeds, side by side.

    Attributes:
        names: what each is called, by method and norm, or else by the options that tell them apart, or else A and B.
        settings: fields in which their specs differ, seed and preset left out.
        difference: where two single runs first differ; empty if they are equal to the bit, None for groups.
        metrics: each metric of both, with a test where there are enough seeds; empty for equal runs.
        verdict: the first of them in a sentence.
    """

    names: Sequence[str]
    settings: Sequence[str]
    difference: str | None
    metrics: Sequence[comparison.Comparison] = ()
    verdict: str = ""


def compare(one: Path | str, other: Path | str) -> Contrast:
    """Compares two runs, or two groups of seeds, ``cilnorm compare``.

    Args:
        one, other: a run, a folder of runs, or a pattern like ``cells/ft-bn-*``.

    Raises:
        FolderError: there is no run, or one can't be read or is not finished.
    """
    mine, theirs = comparison.gather(str(one)), comparison.gather(str(other))
    apart = reading.differing([mine[0].spec, theirs[0].spec], ("seed", *reading.NO_SETTING))
    difference = comparison.first_difference(mine[0], theirs[0]) if len(mine) == len(theirs) == 1 else None
    if difference == "":
        return Contrast((mine[0].label, theirs[0].label), apart, difference)
    names = tuple(reading.by_label([mine[0], theirs[0]]))
    if len(names) < 2 or max(map(len, names)) > LONG:
        names = ("A", "B")
    found = comparison.compare(mine, theirs)
    return Contrast(names, apart, difference, found, comparison.sentence(found[0], *names))
