"""What papers printed, and which runs it may be compared with: ``published.yaml`` beside this file.

A value is compared with runs under its conditions alone, and every field of a spec that decides numbers is a condition;
the seed is none, since a mean over seeds is what is printed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from cilnorm import registry as registries
from cilnorm.registry import Registry
from cilnorm.settings.class_order import given_order
from cilnorm.settings.options import option_defaults
from cilnorm.spec import COMPONENTS, Spec, from_mapping, to_mapping
from cilnorm.training.protocol import Protocol
from cilnorm.values import SpecError

__all__ = ["Reference", "printed", "published"]

NO_CONDITION = {"preset", "seed", "precision", "engine", "residence", "method", "norm"}
LISTED = 8  # differences that a note names
SPLIT = ("tasks", "first_classes", "increment", "task_classes")


@dataclass(frozen=True)
class Reference:
    """What a paper has to say about a run.

    Attributes:
        values: by metric, in percent; empty unless the run meets the paper's conditions.
        note: why there are none, by the fields that differ; with values, which of their conditions are not known.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


def published(spec: Spec, method: str, norm: str, registry: Registry | None = None) -> Reference:
    """The paper's values for a run; without a note if no paper has any for its data set, method and norm.

    Args:
        method, norm: what the table calls them: a variant under a label of its own is not the paper's.
    """
    if (method.partition(" ")[0], norm) != (spec.method, spec.norm):
        return Reference()
    registry = registry or registries.load()
    nearest: list[str] | None = None
    for result in printed():
        values = result["values"].get(spec.method, {}).get(norm)
        if not values or result["conditions"]["dataset"] != spec.dataset:
            continue
        differ = _differing(spec, result, registry)
        if not differ:
            return Reference(dict(zip(result["metrics"], values, strict=True)), _note(result, spec.method))
        if nearest is None or len(differ) < len(nearest):
            nearest = differ
    told = nearest or []
    return Reference(
        note="; ".join(told if len(told) <= LISTED else [*told[:LISTED], f"and {len(told) - LISTED} more"])
    )


def _note(result: Mapping[str, Any], method: str) -> str:
    """What else there is to know of values that a run may be compared with."""
    unknown, parts = result.get("unknown", {}).get(method, {}), []
    if "paper" in result:
        parts.append(f"it is from {result['paper']}")
    if result.get("several"):
        parts.append(f"it is a mean over several values of {_listed(list(result['several']))}")
    if unknown:
        parts.append(f"its {_listed(list(unknown))} can't be known")
    return " and ".join(parts)


def _conditions(result: Mapping[str, Any], spec: Spec, registry: Registry) -> Spec:
    """The spec of the published run, with the seed of this one."""
    own = {**result.get("methods", {}).get(spec.method, {}), **result.get("norms", {}).get(spec.norm, {})}
    named = {**result["conditions"], "method": spec.method, "norm": spec.norm, "seed": spec.seed}
    return from_mapping(named, registry, None, own)


def _facts(spec: Spec, registry: Registry) -> dict[str, Any]:
    """Every condition of a spec by its dotted key, options that were left at their defaults included."""
    shelves = {shelf.kind: shelf for shelf in registry.shelves}
    found: dict[str, Any] = {}
    for key, value in to_mapping(spec).items():
        part = key.removesuffix("_options")
        if part != key and part in COMPONENTS:
            value = {**option_defaults(part, shelves[part][getattr(spec, part)]), **value}
        if isinstance(value, dict):
            found |= {f"{part}.{inner}": given for inner, given in value.items()}
        elif key not in NO_CONDITION:
            found[key] = value
    if found["class_order"] == spec.seed:  # what the seed draws if nothing is given
        found["class_order"] = None
    if spec.protocol.batches == "shuffled":  # how many of a batch's rows are current comes as it may
        found["rows"] = sum(spec.rows)
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def _differing(spec: Spec, result: Mapping[str, Any], registry: Registry) -> list[str]:
    """``momentum 0.9, published with 0`` and the like: every condition of a published result that a run doesn't meet.

    What can't be known of the result (``unknown``) may be any of the values that it may have been, or whatever it is
    where that is ``any``; what it is a mean over (``several``) may be any of those.
    """
    paper = _conditions(result, spec, registry)
    free = {**result.get("unknown", {}).get(spec.method, {}), **result.get("several", {})}
    same = paper if paper.backbone == spec.backbone else replace(paper, backbone=spec.backbone, backbone_options={})
    ours, theirs = _facts(spec, registry), {**_facts(same, registry), "backbone": paper.backbone}
    differ = [key for key in theirs if ours[key] != theirs[key] and not _may_be(key, ours[key], free.get(key, ()))]
    if _sizes(spec, result) == _sizes(paper, result):
        differ = [key for key in differ if key not in SPLIT]
    told, name = [], result["conditions"].get("protocol")
    corrected = _corrected(spec, registry)
    is_corrected = all(ours[key] == corrected[key] for key in corrected)
    if isinstance(name, str) and is_corrected and any(key in corrected for key in differ):
        told.append(f"protocol corrected, published with {name}")
        differ = [key for key in differ if key not in corrected]
    return told + [_told(key, ours[key], theirs[key]) for key in differ]


def _may_be(key: str, value: Any, free: Any) -> bool:
    if key == "class_order" and isinstance(free, list):
        free = [given_order(each) for each in free]
    return free == "any" or value in free


def _sizes(spec: Spec, result: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Classes of each task, where they can be: with ``tasks`` or ``increment``, they are the same."""
    try:
        return spec.sizes(spec.classes or result["classes"])
    except SpecError:
        return None


def _corrected(spec: Spec, registry: Registry) -> dict[str, Any]:
    """What ``protocol: corrected`` means for a method: every field in which ``released`` could differ from it."""
    record = registry.methods[spec.method]
    defaults = option_defaults("method", record)
    own = [key for key in getattr(record.build, "released", {}) if not key.startswith("protocol.")]
    fields = {f"protocol.{key}": value for key, value in asdict(Protocol()).items()}
    return fields | {f"method.{key}": defaults[key] for key in own}


def _short(key: str) -> str:
    section, _, name = key.rpartition(".")
    return name if section in ("schedule", "augmentation") else key


def _told(key: str, ours: Any, theirs: Any) -> str:
    return f"{_short(key)} {_shown(key, ours)}, published with {_shown(key, theirs)}"


def _shown(key: str, value: Any) -> str:
    if isinstance(value, list):
        return (":" if key == "rows" else " ").join(map(str, value)) if len(value) < 9 else f"a list of {len(value)}"
    if key == "class_order" and value is None:
        return "the seed's"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _listed(keys: list[str]) -> str:
    *most, last = map(_short, keys)
    return f"{', '.join(most)} and {last}" if most else last


@cache
def printed() -> list[dict[str, Any]]:
    """Every result with conditions of its own; a table of several columns is as many results."""
    content: dict[str, Any] = yaml.safe_load((files("cilnorm.results") / "published.yaml").read_text(encoding="utf-8"))
    found = []
    for result in content["results"]:
        common = {"metrics": content["metrics"], "classes": 100, **result}
        for at, column in enumerate(result.get("columns", [None])):
            if column is None:
                found.append(common)
                continue
            values = {m: {n: cells[at] for n, cells in norms.items()} for m, norms in result["values"].items()}
            found.append({**common, "conditions": {**result["conditions"], **column}, "values": values})
    return found
