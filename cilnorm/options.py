"""What of a record's ``build`` is the user's to set."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any

from cilnorm.hookspecs import Record

__all__ = ["option_defaults", "options_of"]

HANDED_IN = {
    "norm": {"num_features", "device", "dtype"},
    "backbone": {"norm", "signed_embedding"},
    "dataset": {"root"},
}


def _parameters(part: str, record: Record) -> dict[str, inspect.Parameter]:
    try:
        signature = inspect.signature(record.build, eval_str=True)
    except NameError:  # annotations under TYPE_CHECKING; their values go through unchecked
        signature = inspect.signature(record.build)
    return {
        name: parameter
        for name, parameter in signature.parameters.items()
        if name not in HANDED_IN.get(part, ())
        and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }


def options_of(part: str, record: Record) -> dict[str, Any]:
    """Keyword options with their types.

    Args:
        part: ``method``, ``norm``, ``backbone`` or ``dataset``.
    """
    if dataclasses.is_dataclass(record.build):
        hints = typing.get_type_hints(record.build)
        return {field.name: hints[field.name] for field in dataclasses.fields(record.build)}
    return {name: parameter.annotation for name, parameter in _parameters(part, record).items()}


def option_defaults(part: str, record: Record) -> dict[str, Any]:
    """The value of every option that has one unless it is set."""
    found = _parameters(part, record).items()
    return {name: parameter.default for name, parameter in found if parameter.default is not parameter.empty}
