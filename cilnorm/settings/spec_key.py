"""When two specs ask for the same numbers, whichever release wrote them.

A field that is added keeps, at one of its values, what every run did before; a spec in which it has that value must go
on having the key that it had, or its checkpoints would be refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["completed", "fingerprint", "renamed"]

# Added since 0.1.0, by dotted key, each with the value at which a run is what it was.
ADDED: dict[str, Any] = {
    "first_classes": None,
    "increment": None,
    "task_classes": None,
    "memory_per_class": None,
    "method_options.measure_in_place": False,
    "schedule.first_epochs": None,
    "schedule.first_milestones": None,
    "schedule.first_lr": None,
    "schedule.first_weight_decay": None,
    "protocol.batches": "stratified",
    "protocol.mirrored_means": True,
    "protocol.head_start": "torch",
    "augmentation.crop_size": None,
    "augmentation.test_size": None,
    "residence": "auto",
    "statistics.freeze": "never",
    "statistics.freeze_affine": False,
    "statistics.precise": "never",
}
SECTIONS = ("statistics",)  # that 0.1.0 didn't have at all
RENAMED = {"class_order_seed": "class_order"}  # since 0.1.0


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with fields under the names that they have now."""
    return {RENAMED.get(key, key): value for key, value in values.items()}


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a spec of whichever release, under the names and with the fields that specs have now.

    Options of plugins stay as they are, for a default may be left out of them anyway.
    """
    found = renamed(values)
    for key, before in ADDED.items():
        section, _, name = key.rpartition(".")
        if not section:
            found.setdefault(name, before)
        elif not section.endswith("_options"):
            found[section] = {name: before, **(found.get(section) or {})}
    return found


def fingerprint(spec: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of a spec's plain values; those that 0.1.0 gave where it could have run the same."""
    mapping = dict(spec)
    for key, before in ADDED.items():
        section, _, name = key.rpartition(".")
        if not section:
            if mapping.get(name, before) == before:
                mapping.pop(name, None)
        elif mapping.get(section, {}).get(name, before) == before:
            mapping[section] = {inner: value for inner, value in mapping.get(section, {}).items() if inner != name}
    for section in SECTIONS:
        if not mapping.get(section):
            mapping.pop(section, None)
    order = mapping.pop("class_order")
    if not isinstance(order, list):
        mapping["class_order_seed"] = mapping["seed"] if order is None else order
    else:
        mapping["class_order"] = order
    return hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()[:12]
