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
from cilnorm.metrics import TABULATED
from cilnorm.registry import Registry
from cilnorm.settings.options import option_defaults
from cilnorm.spec import COMPONENTS, Spec, from_mapping, to_mapping
from cilnorm.training.protocol import Protocol

__all__ = ["Reference", "published"]

NO_CONDITION = {"preset", "seed", "precision", "engine", "residence", "method", "norm"}
LISTED = 8  # differences that a note names


@dataclass(frozen=True)
class Reference:
    """What a paper has to say about a run.

    Attributes:
        values: of each of ``TABULATED`` in percent; empty unless the run meets the paper's conditions.
        note: why there are none, by the fields that differ; with values, which of their conditions are not known.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


def published(spec: Spec, method: str, norm: str, registry: Registry | None = None) -> Reference:
    """The paper's values for a run; without a note if no paper has any for its data set, method and norm.

    Args:
        method, norm: what the table calls them: a variant under a label of its own is not the paper's.
    """
    if (method, norm) != (spec.method, spec.norm):
        return Reference()
    registry = registry or registries.load()
    for result in _results():
        values = result["values"].get(method, {}).get(norm)
        if values and result["conditions"]["dataset"] == spec.dataset:
            unknown = result.get("unknown", {}).get(method, {})
            differ = _differing(spec, _conditions(result, spec, registry), unknown, registry)
            if differ:
                return Reference(note="; ".join(differ))
            note = f"its {_listed(list(unknown))} can't be known" if unknown else ""
            return Reference(dict(zip(TABULATED, values, strict=True)), note)
    return Reference()


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
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def _differing(spec: Spec, paper: Spec, unknown: Mapping[str, Any], registry: Registry) -> list[str]:
    """``momentum 0.9, published with 0`` and the like.

    Args:
        unknown: by dotted key, the values that the published run may have had.
    """
    same = paper if paper.backbone == spec.backbone else replace(paper, backbone=spec.backbone, backbone_options={})
    ours, theirs = _facts(spec, registry), {**_facts(same, registry), "backbone": paper.backbone}
    differ = [key for key in theirs if ours[key] != theirs[key] and ours[key] not in unknown.get(key, ())]
    told = []
    corrected = _corrected(spec, registry)
    if any(key in corrected for key in differ) and all(ours[key] == corrected[key] for key in corrected):
        told.append("protocol corrected, published with released")
        differ = [key for key in differ if key not in corrected]
    told += [_told(key, ours[key], theirs[key]) for key in differ]
    return told if len(told) <= LISTED else [*told[:LISTED], f"and {len(told) - LISTED} more"]


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
def _results() -> list[dict[str, Any]]:
    content: dict[str, Any] = yaml.safe_load((files("cilnorm.results") / "published.yaml").read_text(encoding="utf-8"))
    return list(content["results"])
