"""What papers printed, and for which runs it is the value to compare with: ``published.yaml`` beside this file."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from cilnorm.spec import Spec, to_mapping

__all__ = ["METRICS", "published"]

METRICS = ("A_f", "A_a", "F", "A_l")


def published(spec: Spec, method: str, norm: str) -> dict[str, float]:
    """The paper's value of each of ``METRICS`` in percent, for a run of its data set and its protocol; empty otherwise.

    Args:
        method, norm: what the table calls them: a variant under a label of its own is not the paper's.
    """
    if (method, norm) != (spec.method, spec.norm):
        return {}
    mapping = to_mapping(spec)
    for result in _results():
        values = result["values"].get(method, {}).get(norm)
        if values and all(_value(mapping, key) == wanted for key, wanted in result["where"].items()):
            return dict(zip(METRICS, values, strict=True))
    return {}


def _value(mapping: dict[str, Any], key: str) -> Any:
    section, _, name = key.rpartition(".")
    return (mapping[section] if section else mapping)[name]


@cache
def _results() -> list[dict[str, Any]]:
    content: dict[str, Any] = yaml.safe_load((files("cilnorm") / "published.yaml").read_text(encoding="utf-8"))
    return list(content["results"])
