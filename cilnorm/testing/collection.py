"""The checks of a record, of a distribution, and the one line that makes pytest run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cilnorm import registry as registries
from cilnorm.hookspecs import Backbone, Dataset, Logger, Method, Norm, Record, SettingsFile
from cilnorm.registry import PluginError, Registry
from cilnorm.testing.backbone_checks import backbone_checks
from cilnorm.testing.checks import Check, NotChecked, run_all
from cilnorm.testing.dataset_checks import dataset_checks
from cilnorm.testing.logger_checks import logger_checks
from cilnorm.testing.method_checks import method_checks
from cilnorm.testing.norm_checks import norm_checks
from cilnorm.testing.settings_checks import added, settings_checks

__all__ = [
    "check_backbone",
    "check_dataset",
    "check_logger",
    "check_method",
    "check_norm",
    "check_settings",
    "checks_of",
    "plugin_checks",
    "records_of",
]


def check_norm(record: Norm) -> None:
    """Holds a norm to all that ``cilnorm.hookspecs.Norm`` promises.

    Raises:
        Broken: a line for each promise that is broken: what happened, what was expected, where it is written.
    """
    run_all(list(norm_checks(record)))


def check_method(record: Method) -> None:
    """The same for a method; errors as of ``check_norm``."""
    run_all(list(method_checks(record)))


def check_backbone(record: Backbone) -> None:
    """The same for a backbone; errors as of ``check_norm``."""
    run_all(list(backbone_checks(record)))


def check_dataset(record: Dataset, root: Path | None = None) -> None:
    """The same for a data set whose images are in ``root``; errors as of ``check_norm``.

    What can't be known without images is left out where there are none.
    """
    run_all(list(dataset_checks(record, root)))


def check_logger(record: Logger) -> None:
    """The same for a logger; errors as of ``check_norm``. One whose needs aren't installed is left out."""
    run_all(list(logger_checks(record)))


def check_settings(record: SettingsFile) -> None:
    """The same for a file of presets and grids; errors as of ``check_norm``."""
    run_all(list(settings_checks(*added(record))))


def records_of(distribution: str, registry: Registry | None = None) -> list[tuple[str, Record]]:
    """(kind, record) of all that an installed distribution offers, presets and grids left out.

    Raises:
        PluginError: it offers nothing, is not installed, or has a plugin that can't be loaded; the message says why.
    """
    registry = registry or registries.load()
    wanted = _plain(distribution)
    mine = [plugin for plugin in registry.plugins if _plain(plugin.distribution.split()[0]) == wanted]
    for plugin in mine:
        if plugin.error:
            raise PluginError(f"plugin {plugin.name!r} of {plugin.distribution}: {plugin.error}")
    if not mine:
        known = sorted({plugin.distribution.split()[0] for plugin in registry.plugins})
        raise PluginError(registries.nearest("distribution with plugins", distribution, known))
    shelves = {shelf.kind: shelf for shelf in registry.shelves}
    return [(kind, shelves[kind][name]) for plugin in mine for kind, name in plugin.offers if kind in shelves]


def _plain(name: str) -> str:
    return name.casefold().replace("_", "-").replace(".", "-")


def checks_of(
    distribution: str, *, root: Path | None = None, slow: bool = True, registry: Registry | None = None
) -> Iterator[Check]:
    """Every check of everything that a distribution offers.

    Args:
        root: the folder of its data sets' images.
        slow: whether those that compile or start processes are among them.

    Raises:
        PluginError: as of ``records_of``.
    """
    registry = registry or registries.load()
    for kind, record in records_of(distribution, registry):
        made: dict[str, Callable[[Any], Iterator[Check]]] = {
            "norm": norm_checks,
            "method": method_checks,
            "backbone": backbone_checks,
            "dataset": lambda record: dataset_checks(record, root),
            "logger": logger_checks,
        }
        yield from (check for check in made[kind](record) if slow or not check.slow)
    for sections in registry.settings:
        if _plain(sections.owner.split()[0]) == _plain(distribution):
            yield from settings_checks(sections, registry)


def plugin_checks(distribution: str, *, root: Path | None = None, slow: bool = True) -> Callable[..., None]:
    """A test for pytest that is every check of a distribution, one line in a test file::

        from cilnorm.testing import plugin_checks

        test_plugin = plugin_checks("cilnorm-mine")

    Arguments and errors are those of ``checks_of``.
    """
    import pytest

    found = list(checks_of(distribution, root=root, slow=slow))

    @pytest.mark.parametrize("check", found, ids=[check.label for check in found])
    def test_plugin(check: Check) -> None:
        try:
            check()
        except NotChecked as error:
            pytest.skip(str(error))

    return test_plugin
