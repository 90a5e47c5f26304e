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


def scaled_milestones(flat: Options, epochs: object) -> dict[str, Any]:
    """Milestones keep their place in the schedule when only the number of epochs is changed."""
    before, milestones = flat.get("schedule.epochs"), flat.get("schedule.milestones")
    if not milestones or not isinstance(epochs, int) or not isinstance(before, int):
        return {}
    return {"schedule.milestones": [max(1, round(milestone * epochs / before)) for milestone in milestones]}
