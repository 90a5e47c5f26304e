"""cilnorm's own parts keep what is asked of a stranger's: every norm, method, backbone, data set and logger.

Beside the records stand variants of them: with options that make another layer or method of it. Runs are left to one
backbone of each kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import make_dataclass, replace
from functools import partial
from typing import Any

import pytest

from cilnorm.hookspecs import Method
from cilnorm.registry import load
from cilnorm.testing import Check, NotChecked, checks_of
from cilnorm.testing.method_checks import method_checks
from cilnorm.testing.norm_checks import norm_checks
from tests import fake

pytestmark = pytest.mark.slow

OWN = load(extra=[fake])
RUNS = {"two_tasks": {"resnet8", "resnet32-rebuffi", "timm-resnet18"}, "every_norm": {"resnet8"}}
# Of backbones that are others with more blocks: what depth could change.
DEEPER = {"resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet34", "timm-resnet34", "timm-resnet50"}
OF_DEPTH = {"embedding_and_maps", "maps_are_its_own", "only_the_given_norm"}
EXPLAINS = {"imagenet100"}  # a name that only says which two it may mean
RESUMED = "resumed_to_the_bit"
# Runs of methods with four norms stand in test_methods_battery.py; ten tasks in fewer graphs in plugins/test_norms.py.
ELSEWHERE = {("method", "two_tasks"), ("norm", "compiled_for_ten_tasks")}
NORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "frn act": ("frn", {"act": True}),
    "evonorm-s0 bare": ("evonorm-s0", {"act": False}),
}


def of_longer_tail(record: Method) -> Method:
    """The method with a second phase as long as the task, and with noise in its gradients, where it can have them."""
    defaults = {"balanced_epochs": 1.0, "gradient_noise": 0.01}
    changed = [(name, float, value) for name, value in defaults.items() if hasattr(record.build, name)]
    if not changed:
        return record
    return replace(record, build=make_dataclass(f"Longer{record.name}", changed, bases=(record.build,), frozen=True))


def own_checks() -> Iterator[Check]:
    """Those of the distribution, and of variants that no name on the shelf stands for."""
    for check in checks_of("cilnorm"):
        of_many = check.kind == "backbone" and (
            check.name not in RUNS.get(check.promise, {check.name})
            or (check.name in DEEPER and check.promise not in OF_DEPTH)
        )
        elsewhere = (check.kind, check.promise) in ELSEWHERE
        if not of_many and not elsewhere and check.name not in EXPLAINS:
            yield replace(check, record=of_longer_tail(check.record)) if check.promise == RESUMED else check
    for name, (of, options) in NORMS.items():
        record = OWN.norms[of]
        for check in norm_checks(replace(record, name=name, build=partial(record.build, **options))):
            if check.promise not in ("timm", "trains"):
                yield check
    yield from (check for check in method_checks(OWN.methods["two-phases"]) if check.promise == RESUMED)


CHECKS = [
    pytest.param(check, id=check.label, marks=[pytest.mark.gpu] if check.promise == "on_a_gpu" else [])
    for check in own_checks()
]


@pytest.mark.parametrize("check", CHECKS)
def test_it_is_kept(check: Check) -> None:
    try:
        check()
    except NotChecked as error:
        pytest.skip(str(error))
