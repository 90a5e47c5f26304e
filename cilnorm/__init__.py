"""Any normalisation layer with any class-incremental method on any backbone.

>>> import cilnorm
>>> spec = cilnorm.resolve("quick", method="ft", norm="tbbn")
>>> result = cilnorm.run(spec)  # doctest: +SKIP

The names below are imported when they are first used, so that ``cilnorm --help`` need not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cilnorm import registry
    from cilnorm.batch import Composition, CompositionWarning, set_composition
    from cilnorm.norms import convert_norms, finish_norms, norm_act_factory, norm_factory
    from cilnorm.progress import Display
    from cilnorm.runner import resume, run
    from cilnorm.running import freeze_statistics, measure_statistics
    from cilnorm.spec import Spec, resolve

__all__ = [
    "Composition",
    "CompositionWarning",
    "Display",
    "Spec",
    "convert_norms",
    "finish_norms",
    "freeze_statistics",
    "measure_statistics",
    "norm_act_factory",
    "norm_factory",
    "registry",
    "resolve",
    "resume",
    "run",
    "set_composition",
]

_HOMES = {
    "Composition": "batch",
    "CompositionWarning": "batch",
    "set_composition": "batch",
    "convert_norms": "norms",
    "finish_norms": "norms",
    "freeze_statistics": "running",
    "measure_statistics": "running",
    "norm_act_factory": "norms",
    "norm_factory": "norms",
    "Spec": "spec",
    "resolve": "spec",
    "Display": "progress",
    "run": "runner",
    "resume": "runner",
}


def __getattr__(name: str) -> Any:
    if name == "registry":
        return importlib.import_module("cilnorm.registry")
    if name not in _HOMES:
        raise AttributeError(f"module 'cilnorm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"cilnorm.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
