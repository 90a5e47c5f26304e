"""Tables and figures of ``docs/results.md`` and the README from the runs under ``docs/runs``.

    python -m benchmarks.results                        writes every table and figure again
    python -m benchmarks.results --check                status 1 if a table of the page is not what the runs say
    python -m benchmarks.results --add GROUP RUN ...    keeps the small files of finished runs in docs/runs/GROUP

A group holds runs that differ in method, norm, their options, and seed. A page names a table by a comment,
``<!-- runs GROUP -->``, or another name of ``result_tables.MAKERS`` in the place of ``runs``; what stands between it
and the next ``<!-- end -->`` is made by the command. ``<!-- peers NAME -->`` is the table of ``benchmarks.peers`` from
``docs/runs/NAME.jsonl``. Of two groups, ``<!-- agreement GROUP..GROUP -->`` compares the order, and ``repeated`` the
runs of the same seeds.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import peers
from benchmarks.result_tables import MAKERS, OF_TWO, Groups
from cilnorm.metrics import as_matrix, average_per_task
from cilnorm.results.comparison import FEW
from cilnorm.results.reading import by_label, read_result
from cilnorm.storage.figures import curves_figure, save
from cilnorm.text import markdown

ROOT = Path(__file__).resolve().parent.parent
PAGES, RUNS, FIGURES = (ROOT / "docs/results.md", ROOT / "README.md"), ROOT / "docs/runs", ROOT / "docs/figures"
KEPT = ("spec.yaml", "environment.json", "summary.json", "accuracy.csv", "confusion.csv", "probes/bn-bias.json")
BLOCK = re.compile(r"(<!-- (\w+) ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def add(group: str, runs: Sequence[Path], into: Path = RUNS) -> list[Path]:
    """Copies what is quoted of finished runs, weights and events left out; returns the new folders.

    Raises:
        SystemExit: a run is not finished.
    """
    made = []
    for run in runs:
        if read_result(run).summary.get("state") != "finished":
            sys.exit(f"benchmarks.results: {run} is not finished")
        folder = into / group / run.name
        for name in KEPT:
            if (run / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(run / name, folder / name)
        made.append(folder)
    return made


def read_group(group: str, root: Path = RUNS) -> Groups:
    """The finished runs of a group by what they are, batch norm first, each in the order of its seeds."""
    found = by_label([read_result(path.parent) for path in sorted((root / group).glob("*/spec.yaml"))])
    first = sorted(
        found, key=lambda label: (label.split(" x ")[0] != "ft", label.split(" x ")[0], " x bn" not in label)
    )
    return {label: sorted(found[label], key=lambda run: run.seed) for label in first}


def draw(group: str, groups: Groups, folder: Path = FIGURES) -> list[Path]:
    """Mean accuracy over the seen tasks after each task: FT with each norm, mean within the range of the seeds."""
    series = {
        label.removeprefix("ft x "): [
            list(enumerate(average_per_task(as_matrix(run.matrix)).tolist(), start=1)) for run in runs
        ]
        for label, runs in groups.items()
        if label.startswith("ft ") and len(runs) >= FEW
    }
    if not series:
        return []
    figure = curves_figure(series, "tasks learned", "accuracy on all tasks seen (%)")
    folder.mkdir(exist_ok=True)
    return save(figure, folder, group, ("png",), dpi=120)


def rendered(page: str) -> str:
    """The page with every table as the runs give it."""

    def made(match: re.Match[str]) -> str:
        opening, kind, group, end = match.groups()
        if kind == "peers":
            rows = peers.table(RUNS / f"{group}.jsonl")
        elif kind in OF_TWO:
            rows = OF_TWO[kind](*map(read_group, group.split("..")))
        else:
            rows = MAKERS[kind](read_group(group))
        return f"{opening}{_markdown(rows)}{end}"

    return BLOCK.sub(made, page)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    title, *body = rows
    lines = [title, ["---"] * len(title), *body]
    return "".join(
        f"| {' | '.join(markdown(cell) if at > 1 else cell for cell in row)} |\n" for at, row in enumerate(lines)
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Adds runs, or writes the page and its figures, or checks the page."""
    parser = argparse.ArgumentParser(description="Tables and figures of docs/results.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a table is out of date")
    parser.add_argument("--add", nargs="+", metavar=("GROUP", "RUN"), help="keep the small files of finished runs")
    given = parser.parse_args(argv)
    if given.add:
        group, *runs = given.add
        print("\n".join(str(path.relative_to(ROOT)) for path in add(group, [Path(run) for run in runs])))
        return
    shown = ""
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        new = rendered(page)
        if given.check and new != page:
            sys.exit(f"benchmarks.results: a table of {path.relative_to(ROOT)} is out of date")
        if not given.check:
            path.write_text(new, encoding="utf-8")
        shown += new
    if given.check:
        return
    for group in sorted(set(re.findall(r"figures/([\w-]+)\.png", shown)) & {path.name for path in RUNS.iterdir()}):
        for path in draw(group, read_group(group)):
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
