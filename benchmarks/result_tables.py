"""The tables of ``docs/results.md``, each from groups of runs: rows of cells, the first of them the titles.

``MAKERS`` has those of one group, by the name that the page calls them, and ``OF_TWO`` those of two.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks import peers
from cilnorm.metrics import TABULATED, mean_text
from cilnorm.results.comparison import FEW, Comparison, compare, tested
from cilnorm.results.probe_section import accuracies, read_probe
from cilnorm.results.published import printed
from cilnorm.results.reading import RunResult
from cilnorm.results.report import confused

Groups = Mapping[str, Sequence[RunResult]]  # runs of several seeds by what they are
BySeed = dict[str, dict[int, float]]  # a metric by method and seed


def table(groups: Groups) -> list[list[str]]:
    """A row of mean ± standard deviation a kind of run."""
    rows = [["run", "seeds", *TABULATED]]
    for label, runs in groups.items():
        values = [mean_text([float(run.summary[metric]) for run in runs]) for metric in TABULATED]
        rows.append([label, _seeds(runs), *values])
    return rows


def _seeds(runs: Sequence[RunResult]) -> str:
    return ", ".join(str(run.seed) for run in runs)


def tests(groups: Groups) -> list[list[str]]:
    """Each kind of run against the same method's batch norm, where enough seeds are in both; in points."""
    rows = [["run", "against", "metric", "difference", "95 % interval", "p", "of the pairs"]]
    for label, base, found in _against_bn(groups):
        for each in found:
            if each.metric in TABULATED and each.p is not None:
                row = [label, base, each.metric, f"{each.difference:+.2f}", _interval(each), _chance(each.p)]
                rows.append([*row, f"{_higher(each)} of {len(each.seeds)} higher"])
    return rows


def _against_bn(groups: Groups) -> Iterator[tuple[str, str, list[Comparison]]]:
    """Each kind of run, the same method's with batch norm, and every metric of the seeds that both have, if they do."""
    for label, runs in groups.items():
        base = f"{runs[0].spec['method']} x bn"
        common = {run.seed for run in runs} & {run.seed for run in groups.get(base, ())}
        if label != base and len(common) >= FEW:
            pairs = [[run for run in group if run.seed in common] for group in (groups[base], runs)]
            yield label, base, compare(*pairs)


def _chance(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _interval(found: Comparison) -> str:
    assert found.low is not None
    assert found.high is not None
    return f"{found.low:+.2f} to {found.high:+.2f}"


def _higher(found: Comparison) -> int:
    return sum(b > a for a, b in zip(found.one, found.other, strict=True))


def gains(groups: Groups) -> list[list[str]]:
    """A_f and F less those of the same method's batch norm, where enough seeds are in both; in points."""
    found = {label: {each.metric: each for each in all_metrics} for label, _, all_metrics in _against_bn(groups)}
    return _tested_at_once(found, ("A_f", "F"))


def _tested_at_once(found: Mapping[str, Mapping[str, Comparison]], measures: Sequence[str]) -> list[list[str]]:
    """A row of differences to batch norm a kind of run.

    ``q`` stands beside each in the place of p, for many are tested at once: of the differences whose q is below 0.05,
    at most one in twenty is expected to be chance (Benjamini and Hochberg 1995, over the rows of a column).
    """
    from scipy import stats

    titles = ["run", "seeds"]
    told = {label: [label, str(len(of[measures[0]].seeds))] for label, of in found.items()}
    for measure in measures:
        titles += [f"{measure} less BN's", "of the pairs", "q"]
        q = stats.false_discovery_control([1.0 if of[measure].p is None else of[measure].p for of in found.values()])
        for (label, of), value in zip(found.items(), q, strict=True):
            higher = f"{_higher(of[measure])} of {len(of[measure].seeds)} higher"
            told[label] += [peers.apart(of[measure]), higher, _chance(value)]
    return [titles, *told.values()]


MISTAKEN = ("old taken for the newest", "right task of the others", "newest kept")


def mistaken(groups: Groups) -> list[list[str]]:
    """After the last task: how many old images are taken for the newest task, and what becomes of all others.

    ``right task`` counts, of the old images that are not taken for the newest task, those that are taken for their own;
    ``newest kept`` the images of the newest task that are taken for it. Paired against the same method's batch norm.
    """
    rows = [["run", *(title for name in MISTAKEN for title in (name, "less BN's"))]]
    against = _mistaken_against_bn(groups)
    for label, runs in groups.items():
        told = [peers.apart(pair) for pair in against[label].values()] if label in against else [""] * len(MISTAKEN)
        means = [mean_text(values) for values in zip(*map(_shares, runs), strict=True)]
        rows.append([label, *(cell for cells in zip(means, told, strict=True) for cell in cells)])
    return rows


def shifts(groups: Groups) -> list[list[str]]:
    """The first two measures of ``mistaken`` less those of the same method's batch norm, with ``q`` as in ``gains``."""
    return _tested_at_once(_mistaken_against_bn(groups), MISTAKEN[:2])


def _mistaken_against_bn(groups: Groups) -> dict[str, dict[str, Comparison]]:
    """The measures of ``mistaken`` of each kind of run beside those of the same method's batch norm, by their names."""
    found = {}
    for label, runs in groups.items():
        with_bn = groups.get(f"{runs[0].spec['method']} x bn", ())
        base, here = ({run.seed: _shares(run) for run in side} for side in (with_bn, runs))
        seeds = tuple(sorted(base.keys() & here.keys()))
        if len(seeds) >= FEW and base != here:
            found[label] = {
                name: tested(name, *(tuple(side[seed][at] for seed in seeds) for side in (base, here)), seeds, True)
                for at, name in enumerate(MISTAKEN)
            }
    return found


def _shares(run: RunResult) -> tuple[float, float, float]:
    """The three measures of ``mistaken``, in percent."""
    taken, elsewhere, lost = (curve[-1][1] for curve in confused(run).values())
    return taken, 100 * (100 - taken - elsewhere) / (100 - taken), 100 - lost


def probes(groups: Groups) -> list[list[str]]:
    """What re-tuning the norm layers of finished runs gives: accuracy before and after, and what averages lie nearest.

    ``difference`` is to the same runs before, over all tasks, in points. ``nearer`` counts the norm layers whose
    running means lie nearer to the newest task's images than to those of all.
    """
    titles = ["run", "variant", "all tasks", "old tasks", "newest task", "difference", "95 % interval", "of the runs"]
    rows = [[*titles, "nearer to the newest"]]
    for label, runs in groups.items():
        probed = [(run.seed, probe) for run in runs if (probe := read_probe(run))]
        seeds, found = tuple(seed for seed, _ in probed), [accuracies(probe) for _, probe in probed]
        for variant in dict.fromkeys(name for each in found for name in each):
            old, newest, after = (tuple(each[variant][at] for each in found) for at in range(3))
            row = [label, variant, *map(mean_text, (after, old, newest))]
            if variant == "before":
                before = after
                rows.append([*row, "", "", "", _nearer([probe for _, probe in probed])])
                continue
            apart, told = tested("all tasks", before, after, seeds, paired=True), ["", "", ""]
            if len(seeds) >= FEW and apart.p is not None:
                told = [f"{apart.difference:+.2f}", _interval(apart), f"{_higher(apart)} of {len(seeds)} higher"]
            rows.append([*row, *told, ""])
    return rows


def _nearer(found: Sequence[Mapping[str, Any]]) -> str:
    counts = []
    for each in found:
        means: dict[str, dict[str, float]] = {}
        for row in each["layers"]:
            means.setdefault(row["layer"], {})[row["images"]] = row["mean"]
        counts.append((sum(row["new"] < row["all"] for row in means.values()), len(means)))
    if not counts or not counts[0][1]:
        return ""
    return f"{sum(near for near, _ in counts) / len(counts):.1f} of {counts[0][1]} layers"


def beside_published(groups: Groups) -> list[list[str]]:
    """A_f and F beside what the paper printed, whatever the conditions; the page must say how they differ."""
    rows = [["run", "A_f", "F", "A_f published", "F published"]]
    for label, runs in groups.items():
        spec = runs[0].spec
        if label != f"{spec['method']} x {spec['norm']}":
            continue  # with options of its own, nobody has printed it
        tables = (each for each in printed() if each["conditions"]["dataset"] == spec["dataset"])
        found = next(each for each in tables if spec["norm"] in each["values"].get(spec["method"], {}))
        theirs = dict(zip(found["metrics"], found["values"][spec["method"]][spec["norm"]], strict=True))
        ours = [mean_text([float(run.summary[metric]) for run in runs]) for metric in ("A_f", "F")]
        rows.append([label, *ours, *(f"{theirs[metric]:.2f}" for metric in ("A_f", "F"))])
    return rows


def agreement(one: Groups, other: Groups) -> list[list[str]]:
    """A_f of the kinds of run that both groups have, highest first in ``one``, and how well their orders agree."""
    from scipy import stats

    means = [
        (label, *(statistics.mean(float(run.summary["A_f"]) for run in groups[label]) for groups in (one, other)))
        for label in one
        if label in other
    ]
    means.sort(key=lambda row: -row[1])
    found = stats.spearmanr([row[1] for row in means], [row[2] for row in means]).statistic
    return [
        ["run", "A_f", "A_f there"],
        *([label, f"{here:.2f}", f"{there:.2f}"] for label, here, there in means),
        ["Spearman's ρ", f"{found:.2f}", ""],
    ]


def repeated(one: Groups, other: Groups) -> list[list[str]]:
    """What both groups have, seed by seed: values of each, and by how many points they are apart on average."""
    rows = [["run", "seeds", *(title for name in TABULATED for title in (name, f"{name} there", "apart by"))]]
    for label in (label for label in one if label in other):
        pairs = [(here, there) for here in one[label] for there in other[label] if here.seed == there.seed]
        row = [label, ", ".join(str(here.seed) for here, _ in pairs)]
        for metric in TABULATED:
            values = [[float(run.summary[metric]) for run in side] for side in zip(*pairs, strict=True)]
            apart = statistics.mean(abs(a - b) for a, b in zip(*values, strict=True))
            row += [*map(mean_text, values), f"{apart:.2f}"]
        rows.append(row)
    return rows


def grid(groups: Groups) -> list[list[str]]:
    """A_f of every method with every norm, F in brackets."""
    scores = {metric: _by_norm(groups, metric) for metric in ("A_f", "F")}
    norms = list(scores["A_f"])
    rows = [["method", *norms]]
    for method in dict.fromkeys(method for found in scores["A_f"].values() for method in found):
        row = [method]
        for norm in norms:
            final, forgetting = (list(scores[metric][norm].get(method, {}).values()) for metric in ("A_f", "F"))
            row.append(f"{mean_text(final)} (F {statistics.mean(forgetting):.1f})" if final else "–")
        rows.append(row)
    return rows


def order(groups: Groups) -> list[list[str]]:
    """How each norm orders the methods by A_f, and how far that is the order under batch norm.

    Of every method the seeds are taken that have both norms. Two methods change places where one is higher under batch
    norm and the other with the norm, by their means. Of such pairs, those with several seeds are counted, and those are
    named for which it holds of each seed alone.
    """
    from scipy import stats

    scores = _by_norm(groups, "A_f")
    rows = [["norm", "methods, highest A_f first", "Spearman's ρ to BN's", "pairs", "change places", "in every seed"]]
    for norm, found in scores.items():
        here, there = _of_common_seeds(scores["bn"], found)
        under_bn, with_norm = ({method: statistics.mean(of[method].values()) for method in of} for of in (here, there))
        listed = ", ".join(sorted(with_norm, key=lambda method: -with_norm[method]))
        if norm == "bn":
            rows.append([norm, listed, "", "", "", ""])
            continue
        rho = stats.spearmanr(list(under_bn.values()), list(with_norm.values())).statistic
        pairs = [(f"{a} and {b}", _leads(here, a, b), _leads(there, a, b)) for a, b in itertools.combinations(here, 2)]
        pairs = [pair for pair in pairs if pair[1]]  # both are over the same seeds, or none
        moved = [pair for pair in pairs if statistics.mean(pair[1]) * statistics.mean(pair[2]) < 0]
        several = [pair for pair in moved if len(pair[1]) > 1]
        sure = [name for name, one, other in several if _one_sign(one) and _one_sign(other)]
        told = f"{len(sure)} of {len(several)}" if several else ""
        told += f": {'; '.join(sure)}" if sure else ""
        rows.append([norm, listed, f"{rho:.2f}", str(len(pairs)), str(len(moved)), told])
    return rows


def _of_common_seeds(one: BySeed, other: BySeed) -> tuple[BySeed, BySeed]:
    """Both, of the methods and seeds that both have."""
    shared = {method: sorted(one[method].keys() & other.get(method, {}).keys()) for method in one}
    here, there = (
        {method: {seed: of[method][seed] for seed in seeds} for method, seeds in shared.items() if seeds}
        for of in (one, other)
    )
    return here, there


def _by_norm(groups: Groups, metric: str) -> dict[str, BySeed]:
    """The metric in percent by norm with its options, method and seed."""
    found: dict[str, BySeed] = {}
    for label, runs in groups.items():
        method, norm = label.split(" x ", 1)
        found.setdefault(norm, {})[method] = {run.seed: float(run.summary[metric]) for run in runs}
    return found


def _leads(scores: BySeed, one: str, other: str) -> list[float]:
    """By how many points one method is above another, for each seed of both."""
    return [value - scores[other][seed] for seed, value in scores[one].items() if seed in scores[other]]


def _one_sign(values: Sequence[float]) -> bool:
    return min(values) > 0 or max(values) < 0


MAKERS: dict[str, Callable[[Groups], list[list[str]]]] = {
    "runs": table,
    "tests": tests,
    "gains": gains,
    "mistaken": mistaken,
    "shifts": shifts,
    "probes": probes,
    "published": beside_published,
    "grid": grid,
    "order": order,
}
OF_TWO: dict[str, Callable[[Groups, Groups], list[list[str]]]] = {"agreement": agreement, "repeated": repeated}
