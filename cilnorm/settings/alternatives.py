"""Settings that say one thing in several ways, and those that move along with others."""

from __future__ import annotations

from typing import Any

from cilnorm.settings.registry_file import Options
from cilnorm.values import SpecError

__all__ = ["scaled_milestones", "without_others"]

# Ways to say one thing: whoever asks for one of them does not want what the preset says by another.
INSTEAD = {
    "tasks": ("increment", "task_classes"),
    "increment": ("task_classes",),
    "first_classes": ("task_classes",),
    "task_classes": ("first_classes", "increment"),
    "memory": ("memory_per_class",),
}
WHAT = {**dict.fromkeys(INSTEAD, "how classes are split"), "memory": "how many exemplars are kept"}


def without_others(wanted: Options) -> dict[str, Any]:
    """None for each field that says what another, asked for, says.

    Raises:
        SpecError: both are asked for.
    """
    for key in INSTEAD:
        for other in INSTEAD[key]:
            if wanted.get(key) is not None and wanted.get(other) is not None:
                raise SpecError(f"{key} and {other} both say {WHAT[key]}; give one of them")
    return {other: None for key, value in wanted.items() if value is not None for other in INSTEAD.get(key, ())}


def scaled_milestones(flat: Options, wanted: Options) -> dict[str, Any]:
    """What moves along when only the number of epochs is changed: milestones, and the first task's own schedule."""
    before, epochs = flat.get("schedule.epochs"), wanted.get("schedule.epochs")
    if not isinstance(epochs, int) or not isinstance(before, int):
        return {}
    moved: dict[str, Any] = {}
    for key in ("schedule.milestones", "schedule.first_milestones"):
        if flat.get(key) and key not in wanted:
            moved[key] = [max(1, round(milestone * epochs / before)) for milestone in flat[key]]
    if flat.get("schedule.first_epochs") and "schedule.first_epochs" not in wanted:
        moved["schedule.first_epochs"] = max(1, round(flat["schedule.first_epochs"] * epochs / before))
    return moved
