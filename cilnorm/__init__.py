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
    from cilnorm.api import Launch, compare, report, run_seeds, table, tune
    from cilnorm.batch import Composition, CompositionWarning, set_composition
    from cilnorm.cli.progress import Display
    from cilnorm.experiment.runner import resume, run
    from cilnorm.norms import convert_norms, finish_norms, norm_act_factory, norm_factory
    from cilnorm.running import freeze_statistics, measure_statistics
    from cilnorm.spec import Spec, resolve
    from cilnorm.telling import forget, rows, tell_rows

__all__ = [
    "Composition",
    "CompositionWarning",
    "Display",
    "Launch",
    "Spec",
    "compare",
    "convert_norms",
    "finish_norms",
    "forget",
    "freeze_statistics",
    "measure_statistics",
    "norm_act_factory",
    "norm_factory",
    "registry",
    "report",
    "resolve",
    "resume",
    "rows",
    "run",
    "run_seeds",
    "set_composition",
    "table",
    "tell_rows",
    "tune",
]

_HOMES = {
    "Composition": "batch",
    "CompositionWarning": "batch",
    "set_composition": "batch",
    "forget": "telling",
    "rows": "telling",
    "tell_rows": "telling",
    "convert_norms": "norms",
    "finish_norms": "norms",
    "freeze_statistics": "running",
    "measure_statistics": "running",
    "norm_act_factory": "norms",
    "norm_factory": "norms",
    "Spec": "spec",
    "resolve": "spec",
    "Display": "cli.progress",
    "run": "experiment.runner",
    "resume": "experiment.runner",
    "Launch": "api",
    "compare": "api",
    "report": "api",
    "run_seeds": "api",
    "table": "api",
    "tune": "api",
}


def __getattr__(name: str) -> Any:
    if name == "registry":
        return importlib.import_module("cilnorm.registry")
    if name not in _HOMES:
        raise AttributeError(f"module 'cilnorm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"cilnorm.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
