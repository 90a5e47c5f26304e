"""A grid's results: mean and standard deviation over seeds beside the published values, for people and for papers."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cilnorm.metrics import TABULATED, mean_and_deviation, mean_text
from cilnorm.text import csv_cell, markdown, markdown_code, tex, tex_label

__all__ = ["Entry", "best", "cell_text", "to_csv", "to_latex", "to_markdown", "verdicts"]

CLOSE = 1.0  # points of accuracy within which a value counts as reproduced
LOWER_IS_BETTER = ("F",)
RULE = (
    "Bold: the best norm of a method, where its mean differs from the next one's by more than the larger of their two "
    "standard deviations over seeds; with one seed there is none, and nothing is bold."
)


@dataclass(frozen=True)
class Entry:
    """One cell of a table over its seeds.

    Attributes:
        values: of each metric in percent, one a finished seed.
        published: of each metric in percent; empty where none applies.
        missing: seeds that have no result, and why.
        note: why the paper's values don't stand beside it, or what of their conditions is not known.
    """

    method: str
    norm: str
    values: Mapping[str, Sequence[float]]
    published: Mapping[str, float] = field(default_factory=dict)
    missing: Mapping[int, str] = field(default_factory=dict)
    note: str = ""

    @property
    def seeds(self) -> int:
        """How many seeds there are results of."""
        return len(self.values[TABULATED[0]])

    def difference(self, metric: str) -> float | None:
        """Ours less the published one, in points."""
        if metric not in self.published or not self.seeds:
            return None
        return mean_and_deviation(self.values[metric])[0] - self.published[metric]

    def reproduced(self, metric: str) -> bool | None:
        """Whether ours is within one point of the published value, or within two standard deviations over seeds."""
        apart = self.difference(metric)
        if apart is None:
            return None
        return abs(apart) <= max(CLOSE, 2 * (mean_and_deviation(self.values[metric])[1] or 0.0))


def best(entries: Sequence[Entry]) -> set[tuple[str, str, str]]:
    """(method, norm, metric) of each method's best norm where it is clearly the best, see ``RULE``."""
    found = set()
    for metric in TABULATED:
        for method in dict.fromkeys(entry.method for entry in entries):
            group = [(*mean_and_deviation(e.values[metric]), e.norm) for e in entries if e.method == method and e.seeds]
            ranked = sorted(group, key=lambda each: each[0], reverse=metric not in LOWER_IS_BETTER)
            if len(ranked) < 2:
                continue
            (top, of_top, norm), (second, of_second, _) = ranked[:2]
            if of_top is not None and of_second is not None and abs(top - second) > max(of_top, of_second):
                found.add((method, norm, metric))
    return found


def cell_text(entry: Entry, metric: str, plus_minus: str = " ± ") -> str:
    """``38.21 ± 0.40``; without a spread where there is one seed, a dash where there is none."""
    return mean_text(entry.values[metric], plus_minus) if entry.seeds else "–"


def verdicts(entries: Iterable[Entry]) -> list[str]:
    """Sentences below a table: what is missing, and what the comparison with the paper says."""
    entries = list(entries)
    lines = [
        f"{entry.method} x {entry.norm}, seed {seed}: {reason}"
        for entry in entries for seed, reason in entry.missing.items()
    ]  # fmt: skip
    compared = [(entry, metric, entry.reproduced(metric)) for entry in entries for metric in TABULATED]
    known = [(entry, metric, held) for entry, metric, held in compared if held is not None]
    if known:
        held = sum(held for _, _, held in known)
        lines.append(
            f"{held} of {len(known)} published values are reproduced: ours is within {CLOSE} point or two standard "
            "deviations over seeds of it"
        )
    lines += _notes(entries)
    silent = not any(entry.published or entry.note for entry in entries)
    if silent and any(entry.seeds for entry in entries):
        lines.append("nothing is compared with the paper: its values are for other data or another protocol")
    return lines


def _notes(entries: Sequence[Entry]) -> list[str]:
    """A sentence for each thing that is said of the published values, with the cells of which it is said."""
    groups: dict[tuple[bool, str], list[str]] = {}
    for entry in entries:
        if entry.note:
            groups.setdefault((bool(entry.published), entry.note), []).append(f"{entry.method} x {entry.norm}")
    lines = []
    for (compared, note), cells in groups.items():
        which = "" if len(cells) == len(entries) else f" ({', '.join(cells)})"
        lines.append(
            f"the published value is compared, though {note}{which}" if compared else f"not compared: {note}{which}"
        )
    return lines


def _compared(entries: Sequence[Entry]) -> bool:
    return any(entry.published for entry in entries)


def _beside(entry: Entry, metric: str) -> str:
    """``35.41, +0.32 yes``: the published value, the difference and whether it is reproduced."""
    apart = entry.difference(metric)
    if apart is None:
        return f"{entry.published[metric]:.2f}" if metric in entry.published else ""
    return f"{entry.published[metric]:.2f}, {apart:+.2f} {'✓' if entry.reproduced(metric) else '✗'}"


def to_markdown(entries: Sequence[Entry], title: str) -> str:
    """The table for a page of documentation; the clearly best of each method in bold, the published value below."""
    bold = best(entries)
    lines = [f"# {markdown(title)}", "", "| method | norm | seeds | " + " | ".join(TABULATED) + " |"]
    lines.append("|---|---|--:|" + "--:|" * len(TABULATED))
    for entry in entries:
        cells = []
        for metric in TABULATED:
            text = cell_text(entry, metric)
            text = f"**{text}**" if (entry.method, entry.norm, metric) in bold else text
            beside = _beside(entry, metric)
            cells.append(f"{text}<br>({beside})" if beside else text)
        label = f"{markdown_code(entry.method)} | {markdown_code(entry.norm)}"
        lines.append(f"| {label} | {entry.seeds} | " + " | ".join(cells) + " |")
    lines += ["", f"Accuracies in %; ± is the standard deviation over seeds. {RULE}"]
    if _compared(entries):
        lines[-1] += " In brackets: the published value, ours less it, and whether it is reproduced."
    return "\n".join([*lines, *(f"\n{markdown(line)}." for line in verdicts(entries))]) + "\n"


def to_csv(entries: Sequence[Entry]) -> str:
    """One line a cell and metric: method, norm, metric, seeds, mean, sd, published, difference, reproduced, values."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["method", "norm", "metric", "seeds", "mean", "sd", "published", "difference", "reproduced", "values"]
    writer.writerow(columns)
    for entry in entries:
        for metric in TABULATED:
            mean, deviation = mean_and_deviation(entry.values[metric]) if entry.seeds else (None, None)
            facts = [mean, deviation, entry.published.get(metric), entry.difference(metric)]
            held = {None: "", True: "yes", False: "no"}[entry.reproduced(metric)]
            numbers = ["" if fact is None else f"{fact:.4f}" for fact in facts]
            every = " ".join(f"{value:.4f}" for value in entry.values[metric])
            writer.writerow([*map(csv_cell, (entry.method, entry.norm)), metric, entry.seeds, *numbers, held, every])
    return text.getvalue()


def to_latex(entries: Sequence[Entry], caption: str, label: str) -> str:
    """A table for a paper: booktabs, the clearly best norm in bold, published values in columns of their own."""
    bold, compared = best(entries), _compared(entries)
    width = 3 if compared else 1
    heads = [rf"\multicolumn{{{width}}}{{c}}{{{_tex_metric(metric)}}}" for metric in TABULATED]
    first = 3
    rules = [rf"\cmidrule(lr){{{first + width * at}-{first + width * at + width - 1}}}" for at in range(len(TABULATED))]
    lines = [
        r"% \usepackage{booktabs, graphicx, amssymb}",
        *(f"% {note}" for note in _notes(entries)),
        r"\begin{table*}[t]",
        r"  \centering",
        r"  \setlength{\belowcaptionskip}{0.5em}",  # article leaves no room below a caption that stands on top
        rf"  \caption{{{tex(caption)}}}",
        rf"  \label{{tab:{tex_label(label)}}}",
        r"  \resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"  \begin{{tabular}}{{ll{'r' * width * len(TABULATED)}}}",
        r"    \toprule",
        "    Method & Norm & " + " & ".join(heads) + r" \\",
    ]
    if compared:
        lines += [
            "    " + " ".join(rules),
            "    & & " + " & ".join([r"ours & paper & $\Delta$"] * len(TABULATED)) + r" \\",
        ]
    method = None
    for entry in entries:
        if entry.method != method:
            lines.append(r"    \midrule")
        cells = [cell for metric in TABULATED for cell in _tex_cells(entry, metric, bold, compared)]
        name = tex(entry.method) if entry.method != method else ""
        lines.append(f"    {name} & {tex(entry.norm)} & " + " & ".join(cells) + r" \\")
        method = entry.method
    rule = rf"  \par\smallskip {{\footnotesize {tex(RULE)}}}"
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}}", rule, r"\end{table*}", ""])


def _tex_cells(entry: Entry, metric: str, bold: set[tuple[str, str, str]], compared: bool) -> list[str]:
    ours = "--"
    if entry.seeds:
        mean, deviation = mean_and_deviation(entry.values[metric])
        strong = (entry.method, entry.norm, metric) in bold
        ours = rf"\textbf{{{mean:.2f}}}" if strong else f"{mean:.2f}"
        ours += "" if deviation is None else rf" {{\scriptsize$\pm${deviation:.2f}}}"
    if not compared:
        return [ours]
    apart = entry.difference(metric)
    beside = f"{entry.published[metric]:.2f}" if metric in entry.published else "--"
    mark = r"\,\checkmark" if entry.reproduced(metric) else ""
    return [ours, beside, "--" if apart is None else f"${apart:+.2f}{mark}$"]


def _tex_metric(metric: str) -> str:
    name, _, index = metric.partition("_")
    arrow = r"\downarrow" if metric in LOWER_IS_BETTER else r"\uparrow"
    return f"${name}{f'_{index}' if index else ''}\\,{arrow}$"
