"""What `cilnorm probe bn-bias` found, for the page of a report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cilnorm.files import read_text
from cilnorm.results.reading import RunResult

__all__ = [
    "ABOUT",
    "DISTANCES",
    "NAMES",
    "accuracies",
    "layer_distances",
    "read_probe",
    "recovery_table",
    "task_distances",
]

ABOUT = (
    "The network after the last task, frozen but for its norm layers, those re-tuned on the training images of all "
    "tasks: running averages measured anew (statistics), γ and β trained (affine), or both. Recovered: points gained "
    "on the old tasks, and their part of what both gain together. Distances: of each layer's running averages from "
    "those of the images of all tasks, of the old ones and of the newest, mean over channels, from the input on; "
    "and from those of each task alone, mean over layers as well."
)
NAMES = ("old tasks", "newest task", "all tasks")
DISTANCES = {  # what is measured -> title and axis of its chart
    "mean": ("Distance of running means", "|μ_run − μ| / σ"),
    "scale": ("Distance of running deviations", "|log(σ_run / σ)|"),
}


def read_probe(result: RunResult) -> Mapping[str, Any] | None:
    """A run's ``probes/bn-bias.json``; None where there is none that can be read."""
    try:
        found = json.loads(read_text(result.folder / "probes" / "bn-bias.json"))
        for row in found["accuracy"].values():
            _three(row)
        for layer in found["layers"]:
            float(layer["mean"]), float(layer["scale"]), str(layer["images"])
        task_distances(found)
        float(found["accuracy"]["before"][0])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return dict(found)


def accuracies(probe: Mapping[str, Any]) -> dict[str, list[float]]:
    """Percent on the old tasks, the newest and all, before and after each variant."""
    return {variant: _three(row) for variant, row in probe["accuracy"].items()}


def layer_distances(probe: Mapping[str, Any], measure: str) -> dict[str, list[tuple[float, float]]]:
    """Points (depth, distance) by kind of images."""
    kinds = dict.fromkeys(str(layer["images"]) for layer in probe["layers"])
    found = {}
    for kind in kinds:
        values = [float(layer[measure]) for layer in probe["layers"] if layer["images"] == kind]
        found[f"from {kind} images"] = [(float(depth), value) for depth, value in enumerate(values, 1)]
    return found


def task_distances(probe: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Points (task, distance) of running means and deviations, mean over layers; none in files of earlier versions."""
    rows = [(int(row["task"]), float(row["mean"]), float(row["scale"])) for row in probe.get("tasks", ())]
    found = {}
    for at, name in enumerate(("running means", "running deviations"), start=1) if rows else ():
        tasks = dict.fromkeys(sorted(row[0] for row in rows))
        of_task = {task: [row[at] for row in rows if row[0] == task] for task in tasks}
        found[name] = [(float(task), sum(values) / len(values)) for task, values in of_task.items()]
    return found


def recovery_table(probes: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """A row a run and variant: what it recovers on the old tasks, and which part of what both do."""
    rows = []
    for name, probe in probes:
        found = accuracies(probe)
        before, both = found["before"][0], found.get("both", found["before"])[0]
        for variant, (old, new, whole) in found.items():
            gain, most = old - before, both - before
            share = f"{100 * gain / most:.0f} %" if variant != "before" and most >= 0.05 else "–"
            recovered = "–" if variant == "before" else f"{gain:+.1f}"
            rows.append([name, variant, *(f"{value:.1f}" for value in (old, new, whole)), recovered, share])
    return {"columns": ["run", "re-tuned", *NAMES, "recovered", "of both"], "rows": rows}


def _three(row: Sequence[float]) -> list[float]:
    return [sum(row[:-1]) / max(len(row) - 1, 1), float(row[-1]), sum(row) / len(row)]
