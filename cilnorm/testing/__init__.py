"""Checks that hold a plugin to what ``cilnorm.hookspecs`` promises, for its author's tests.

>>> from cilnorm.testing import plugin_checks
>>> test_plugin = plugin_checks("cilnorm-mine")  # doctest: +SKIP

``cilnorm check DISTRIBUTION`` runs the same from the command line. cilnorm's own parts pass them, too.
"""

from __future__ import annotations

from cilnorm.testing.checks import Broken, Check, NotChecked
from cilnorm.testing.collection import (
    check_backbone,
    check_dataset,
    check_logger,
    check_method,
    check_norm,
    check_settings,
    checks_of,
    plugin_checks,
)

__all__ = [
    "Broken",
    "Check",
    "NotChecked",
    "check_backbone",
    "check_dataset",
    "check_logger",
    "check_method",
    "check_norm",
    "check_settings",
    "checks_of",
    "plugin_checks",
]
