"""Results -> one HTML page that needs nothing but a browser: tables, charts, settings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from cilnorm.metrics import METRICS, as_matrix, average_per_task, forgetting_per_task, mean_text
from cilnorm.results import charts
from cilnorm.results.probe_section import (
    ABOUT,
    DISTANCES,
    NAMES,
    accuracies,
    layer_distances,
    read_probe,
    recovery_table,
    task_distances,
)
from cilnorm.results.reading import NO_SETTING, RunResult, by_label, differing, flat
from cilnorm.storage.figures import PERCENT, bars_figure, curves_figure, matrix_figure, save

__all__ = ["confused", "draw", "report"]

LONGEST = 400  # characters of a value; a list of a thousand classes is longer
Groups = Mapping[str, Sequence[RunResult]]
Chart = dict[str, Any]


def report(results: Sequence[RunResult], title: str = "") -> str:
    """The page of some runs; those that differ in their seed alone share a colour."""
    from jinja2 import Environment
    from markupsafe import Markup

    groups = by_label(results)
    content = {
        "title": title or (results[0].name if len(results) == 1 else f"{len(results)} runs"),
        "about": _about(results),
        "metrics_note": "In %, among all classes seen. A_f: mean accuracy after the last task. A_a: mean accuracy over "
        "the tasks learned so far, averaged over the times after each task. F: forgetting, mean over all tasks; "
        "forgetting: over the old ones. A_l: accuracy on each task right after learning it. BWT: backward transfer. "
        "A heading sorts its table.",
        "groups": _group_table(groups) if len(results) > len(groups) else None,
        "runs": _run_table(results),
        "differences": _difference_table(groups) if len(groups) > 1 else None,
        "sections": [section for section in _sections(groups, results) if section["charts"]],
        "details": [_details(result) for result in results],
    }
    page = (files("cilnorm.results") / "page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(page).render(content, mark=lambda number: Markup(charts.legend_mark(number)))


def confused(result: RunResult) -> dict[str, list[tuple[float, float]]]:
    """After each task from the second on, percent of the old tasks' test images given a class of the newest task
    (``old as new``), of another old task (``old as other old``), and of the newest task's given an old class
    (``new as old``); points (task, percent)."""
    curves: dict[str, list[tuple[float, float]]] = {"old as new": [], "old as other old": [], "new as old": []}
    for task, rows in enumerate(result.confusion[1:], 2):
        if not rows:
            continue
        counts = np.array(rows, dtype=float)
        old, new = counts[:-1], counts[-1]
        shares = (
            old[:, -1].sum() / old.sum(),
            (old[:, :-1].sum() - np.trace(old[:, :-1])) / old.sum(),
            new[:-1].sum() / new.sum(),
        )
        for curve, share in zip(curves.values(), shares, strict=True):
            curve.append((task, 100 * float(share)))
    return curves


def draw(results: Sequence[RunResult], folder: Path) -> list[Path]:
    """The charts that papers show, as PNG, SVG and PDF; returns their paths.

    Raises:
        OSError: they can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups = {label: [run for run in members if run.matrix] for label, members in by_label(results).items()}
    groups = {label: members for label, members in groups.items() if members}
    paths = []
    for name, (title, curves) in zip(("accuracy", "newest", "first"), _accuracies(groups).items(), strict=True):
        if curves:
            paths += save(curves_figure(curves, "tasks learned", "accuracy (%)", title, PERCENT), folder, name)
    if any((heights := _forgotten(groups)).values()):
        paths += save(bars_figure(heights, "task", "forgotten (points)"), folder, "forgetting")
    for label, members in groups.items():
        name = re.sub(r"[^\w.+-]+", "-", label)
        paths += save(matrix_figure(members[0].matrix, members[0].name), folder, f"matrix-{name}")
    curves = {label: [c for c in (confused(run)["old as new"] for run in of) if c] for label, of in groups.items()}
    curves = {label: found for label, found in curves.items() if found}
    if curves:
        figure = curves_figure(curves, "tasks learned", "old images called new (%)", limits=PERCENT)
        paths += save(figure, folder, "old-as-new")
    return paths


def _about(results: Sequence[RunResult]) -> str:
    data = sorted({str(result.spec.get("dataset")) for result in results})
    finished = sum(result.summary.get("state") == "finished" for result in results)
    if len(results) == 1:
        return f"A run on {data[0]}, {'finished' if finished else 'not finished'}."
    return f"{len(results)} runs on {', '.join(data)}, {finished} of them finished."


def _chart(title: str, svg: str, legend: Sequence[str] = ()) -> Chart:
    from markupsafe import Markup

    return {"title": title, "svg": Markup(svg), "legend": legend}


def _section(title: str, about: str, drawn: Sequence[Chart], legend: Sequence[str] = ()) -> dict[str, Any]:
    return {"title": title, "about": about, "charts": list(drawn), "legend": legend if len(legend) > 1 else ()}


def _sections(groups: Groups, results: Sequence[RunResult]) -> list[dict[str, Any]]:
    learned = {label: [run for run in members if run.matrix] for label, members in groups.items()}
    kept = {label: [run for run in members if len(run.confusion) > 1] for label, members in learned.items()}
    first = [members[0] for members in learned.values() if members]
    return [
        _section("Accuracy", "Thick: the mean over seeds; thin: each seed.", _accuracy(learned), list(learned)),
        _section("Forgetting", "What the last model lost of each task's best accuracy, in points; mean over seeds.",
                 _forgetting(learned), list(learned)),
        _section("Accuracy matrices", "Accuracy in % on each task after each task; the first seed of each.",
                 [_chart(run.name, charts.heat_map(run.matrix, "accuracy on task", "after task")) for run in first]),
        _section("Old and new", "Which part of the test images is taken for classes of the wrong tasks: bias shows as "
                 "old images that are called new.", _old_and_new(kept), list(kept)),
        _section("Confusion of tasks", "After the last task: of a task's test images, the % given a class of each "
                 "task; the first seed of each.", [_confusion(members[0]) for members in kept.values() if members]),
        _section("Loss terms", "Mean over each epoch, in the order of training; a rule where a task begins.",
                 [_terms(run) for run in results if run.epochs]),
        _probes(results),
        _section("Speed", "Steps a second while training, mean over the epochs of a task.", _speed(groups),
                 list(groups)),
    ]  # fmt: skip


def _accuracies(groups: Groups) -> dict[str, dict[str, list[list[tuple[float, float]]]]]:
    mean = {
        label: [_numbered(average_per_task(as_matrix(run.matrix), run.summary.get("sizes", ()))) for run in members]
        for label, members in groups.items()
    }
    newest = {label: [_numbered([row[-1] for row in run.matrix]) for run in of] for label, of in groups.items()}
    first = {label: [_numbered([row[0] for row in run.matrix]) for run in of] for label, of in groups.items()}
    return {"Mean of all seen tasks": mean, "The newest task": newest, "The first task": first}


def _accuracy(groups: Groups) -> list[Chart]:
    asked = _accuracies(groups).items()
    return [
        _chart(title, charts.lines(curves, "tasks learned", "accuracy (%)", 100))
        for title, curves in asked
        if any(curves.values())
    ]


def _numbered(values: Any) -> list[tuple[float, float]]:
    return [(float(task), float(value)) for task, value in enumerate(values, 1)]


def _forgotten(groups: Groups) -> dict[str, list[float]]:
    """Points lost of each old task, mean over seeds."""
    heights: dict[str, list[float]] = {}
    for label, members in groups.items():
        lost = [forgetting_per_task(as_matrix(run.matrix)) for run in members if len(run.matrix) > 1]
        tasks = min(map(len, lost), default=1)
        heights[label] = np.mean([each[: tasks - 1] for each in lost], 0).tolist() if lost else []
    return heights


def _forgetting(groups: Groups) -> list[Chart]:
    heights = _forgotten(groups)
    if not any(heights.values()):
        return []
    names = [str(task + 1) for task in range(max(map(len, heights.values())))]
    return [_chart("Forgetting of each task", charts.bars(heights, names, "task", "forgotten (points)"))]


def _old_and_new(groups: Groups) -> list[Chart]:
    curves = {label: [confused(run) for run in members] for label, members in groups.items()}
    titles = {
        "old as new": "Old images called new",
        "old as other old": "Old images called another old task's",
        "new as old": "New images called old",
    }
    return [
        _chart(title, charts.lines({label: [c[kind] for c in of] for label, of in curves.items()},
                                   "tasks learned", "images (%)", 100))
        for kind, title in titles.items() if any(curves.values())
    ]  # fmt: skip


def _confusion(run: RunResult) -> Chart:
    shares = [[100 * count / max(sum(row), 1) for count in row] for row in run.confusion[-1]]
    return _chart(run.name, charts.heat_map(shares, "given a class of task", "images of task"))


def _terms(run: RunResult) -> Chart:
    curves: dict[str, list[tuple[float, float]]] = {}
    begins: list[float] = []
    for number, epoch in enumerate(run.epochs, 1):
        if number == 1 or epoch["task"] != run.epochs[number - 2]["task"]:
            begins.append(float(number))
        for name, value in epoch["terms"].items():
            curves.setdefault(name, []).append((float(number), float(value)))
    drawn = charts.lines({name: [curve] for name, curve in curves.items()}, "epochs", "loss", None, 0.0, begins[1:],
                         marks=len(run.epochs) <= 60)  # fmt: skip
    return _chart(run.name, drawn, list(curves))


def _speed(groups: Groups) -> list[Chart]:
    curves = {}
    for label, members in groups.items():
        found = []
        for run in members:
            speeds: dict[int, list[float]] = {}
            for epoch in run.epochs:
                if epoch["speed"]:
                    speeds.setdefault(epoch["task"], []).append(epoch["speed"])
            found.append([(float(task), float(np.mean(values))) for task, values in speeds.items()])
        curves[label] = [curve for curve in found if curve]
    return [_chart("Training speed", charts.lines(curves, "task", "steps a second"))] if any(curves.values()) else []


def _probes(results: Sequence[RunResult]) -> dict[str, Any]:
    found = [(run.name, probe) for run in results if (probe := read_probe(run))]
    drawn = []
    for name, probe in found:
        before = accuracies(probe)
        drawn.append(_chart(f"Accuracy, {name}", charts.bars(before, NAMES, "", "accuracy (%)"), list(before)))
        for measure, (title, label) in DISTANCES.items():
            curves = layer_distances(probe, measure)
            if curves:
                drawn_lines = charts.lines({kind: [curve] for kind, curve in curves.items()}, "norm layer", label)
                drawn.append(_chart(f"{title}, {name}", drawn_lines, list(curves)))
        by_task = task_distances(probe)
        if by_task:
            drawn_lines = charts.lines({kind: [curve] for kind, curve in by_task.items()}, "task", "mean over layers")
            drawn.append(_chart(f"Distance from each task, {name}", drawn_lines, list(by_task)))
    return {**_section("Probe of the norm layers", ABOUT, drawn), "table": recovery_table(found) if found else None}


def _run_table(results: Sequence[RunResult]) -> dict[str, Any]:
    columns = ["run", "seed", *METRICS, "steps", "seconds", "steps/s", "state"]
    rows = []
    for run in results:
        metrics = [_text(run.summary.get(metric)) for metric in METRICS]
        facts = [run.summary.get("steps", "–"), _text(run.summary.get("seconds"), 0), _text(run.speed, 1)]
        rows.append([run.label, run.seed, *metrics, *facts, run.summary.get("state", "unknown")])
    return {"columns": columns, "rows": rows}


def _group_table(groups: Groups) -> dict[str, Any]:
    rows = []
    for label, members in groups.items():
        done = [run.summary for run in members if run.summary.get("state") == "finished"]
        cells = []
        for metric in METRICS:
            cells.append(mean_text([summary[metric] for summary in done]) if done else _text(None))
        rows.append([label, len(done), *cells])
    return {"columns": ["mean ± sd", "seeds", *METRICS], "rows": rows}


def _difference_table(groups: Groups) -> dict[str, Any] | None:
    specs = [members[0].spec for members in groups.values()]
    keys = differing(specs, ("seed", *NO_SETTING))[:12]
    rows = [[label, *(_plain(flat(spec).get(key)) for key in keys)] for label, spec in zip(groups, specs, strict=True)]
    return {"columns": ["runs", *keys], "rows": rows} if keys else None


def _plain(value: Any) -> str:
    return "–" if value is None else json.dumps(value) if isinstance(value, (list, dict, bool)) else str(value)


def _text(value: Any, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) else "–"


def _details(result: RunResult) -> dict[str, Any]:
    blocks = _blocks("run", result.spec)
    return {
        "name": result.name,
        "folder": str(result.folder),
        "blocks": blocks + _blocks("environment", result.environment),
    }


def _blocks(title: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What stands at the top, then each mapping in it: (name, value) rows."""
    top = {key: value for key, value in values.items() if not isinstance(value, dict)}
    inner = {key: value for key, value in values.items() if isinstance(value, dict) and value}
    named = {title: top, **{key.replace("_", " "): flat(value) for key, value in inner.items()}}
    return [
        {"title": name, "rows": [(key, _shortened(_plain(value))) for key, value in rows.items()]}
        for name, rows in named.items() if rows
    ]  # fmt: skip


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
