"""Plugins -> records by kind and name.

``load`` looks through the entry points of the group ``cilnorm``, checks each plugin on its own and returns a value;
there is no global registry. A plugin that can't be used is reported and left out; it never takes the others down.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain
from typing import Any, Generic, TypeVar

import pluggy

from cilnorm import hookspecs
from cilnorm.hookspecs import API_VERSION, GROUP, Backbone, Dataset, Logger, Method, Norm, Record, SettingsFile
from cilnorm.presets import EVERY, Sections, check_added, read_sections, shipped
from cilnorm.text import nearest
from cilnorm.values import SpecError

__all__ = [
    "Plugin",
    "PluginError",
    "Registry",
    "Shelf",
    "UnknownName",
    "contain_exit",
    "last_line",
    "load",
    "nearest",
    "text_of",
]

R = TypeVar("R", bound=Record)
HOME = "cilnorm"
SLOW = 10.0  # seconds after which a plugin that is still being imported is named
NAME = re.compile(r"[a-z0-9][a-z0-9_.+*-]*")
HOOKS: dict[str, tuple[str, type[Record]]] = {
    "cilnorm_norms": ("norm", Norm),
    "cilnorm_methods": ("method", Method),
    "cilnorm_backbones": ("backbone", Backbone),
    "cilnorm_datasets": ("dataset", Dataset),
    "cilnorm_loggers": ("logger", Logger),
}
OF_SETTINGS = "cilnorm_settings"


class UnknownName(KeyError):
    """A name that is not there; the message lists what is."""

    def __str__(self) -> str:
        return str(self.args[0])


class PluginError(RuntimeError):
    """A plugin can't be used; raised only by ``load(strict=True)``."""


@dataclass(frozen=True)
class Plugin:
    """What one entry point brought.

    Attributes:
        name: the entry point's name.
        distribution: the pip-installable package that declares it, with its version.
        offers: (kind, name) of each record, preset and grid.
        error: why it, or what it has of presets and grids, was left out, in one line; empty for a healthy one.
    """

    name: str
    distribution: str
    offers: tuple[tuple[str, str], ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Shelf(Mapping[str, R], Generic[R]):
    """Records of one kind by name; aliases and capitals find them too, iteration shows each once.

    Raises:
        UnknownName: from ``shelf[name]``, naming the nearest and what there is.
    """

    kind: str
    records: Mapping[str, R] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> R:
        asked = name.casefold()  # names are lower case, and people write TBBN
        for record in self.records.values():
            if asked == record.name or asked in record.aliases:
                return record
        raise UnknownName(nearest(self.kind, name, self.records))

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True)
class Registry:
    """The shelves, and the plugins they came from, healthy or not.

    Attributes:
        settings: files of presets and grids, registry.yaml first; ``cilnorm.spec.read_settings`` makes one of them.
    """

    norms: Shelf[Norm]
    methods: Shelf[Method]
    backbones: Shelf[Backbone]
    datasets: Shelf[Dataset]
    loggers: Shelf[Logger]
    plugins: tuple[Plugin, ...]
    settings: tuple[Sections, ...] = field(default=(), repr=False)

    @property
    def shelves(self) -> tuple[Shelf[Any], ...]:
        """All shelves, in the order in which people list them."""
        return (self.norms, self.methods, self.backbones, self.datasets, self.loggers)

    @property
    def logger_files(self) -> tuple[str, ...]:
        """Patterns of the names that loggers write in a run's folder."""
        return tuple(pattern for logger in self.loggers.values() for pattern in logger.files)

    @property
    def failed(self) -> tuple[Plugin, ...]:
        """Plugins that were left out, or part of which was."""
        return tuple(plugin for plugin in self.plugins if plugin.error)


def load(extra: Iterable[Any] = (), without: Iterable[str] = (), strict: bool = False) -> Registry:
    """Loads every plugin that is installed, cilnorm's own first.

    Args:
        extra: modules or objects with hooks, beside the installed ones; their distribution reads ``(extra)``.
        without: names of entry points to leave out.
        strict: raise for the first plugin that can't be used, instead of reporting it.

    Raises:
        PluginError: with ``strict``, naming the plugin, its distribution and the reason.
    """
    shelves: dict[str, dict[str, Record]] = {kind: {} for kind, _ in HOOKS.values()}
    sources: dict[str, dict[str, str]] = {kind: {} for kind in shelves}
    plugins, settings, brought = [], [shipped()], {}
    for candidate in _candidates(extra, frozenset(without)):
        name, distribution = candidate.name, candidate.distribution
        with _reported(candidate, strict) as problem, _patience(candidate):
            records, found = _records(candidate)
            _check_names(records, shelves, sources)
        if problem:
            plugins.append(Plugin(name, distribution, error=problem[0]))
            continue
        for kind, record in records:
            shelves[kind][record.name] = record
            sources[kind][record.name] = distribution
        brought[len(plugins)] = (candidate, found)
        plugins.append(Plugin(name, distribution, tuple((kind, record.name) for kind, record in records)))
    for number, (candidate, found) in brought.items():  # once all methods and norms are known
        for sections in found:
            with _reported(candidate, strict) as problem:
                _check_settings(sections, settings, sources)
            if problem:
                plugins[number] = replace(plugins[number], error=problem[0])
                break
            settings.append(sections)
            plugins[number] = replace(plugins[number], offers=(*plugins[number].offers, *sections.names))
    made: dict[str, Shelf[Any]] = {f"{kind}s": Shelf(kind, shelves[kind], sources[kind]) for kind in shelves}
    return Registry(**made, plugins=tuple(plugins), settings=tuple(settings))


@contextmanager
def _reported(candidate: _Candidate, strict: bool) -> Iterator[list[str]]:
    """Puts what a plugin raises, whatever that is, into the list; Ctrl-C stays."""
    problem: list[str] = []
    try:
        yield problem
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a stranger's module does while it is imported, SystemExit as well
        problem.append(last_line(error))
        if strict:
            raise PluginError(f"plugin {candidate.name!r} of {candidate.distribution}: {problem[0]}") from error


@dataclass(frozen=True)
class _Candidate:
    name: str
    distribution: str
    module: Callable[[], Any]


def _candidates(extra: Iterable[Any], without: frozenset[str]) -> list[_Candidate]:
    """Entry points and extras; pluggy would skip a second entry point of one name in silence, so names come first."""
    found = [entry for entry in importlib.metadata.entry_points(group=GROUP) if entry.name not in without]
    named = cache(_named)  # name and version are properties that parse the whole metadata, README included
    owners: dict[str, list[str]] = {}
    for entry in found:
        owners.setdefault(entry.name, []).append(named(entry.dist))
    candidates = []
    for entry in found:
        distribution, module = named(entry.dist), entry.load
        if len(owners[entry.name]) > 1 and distribution.split()[0] != HOME:
            module = partial(_refuse_twice, entry.name, owners[entry.name])
        candidates.append(_Candidate(entry.name, distribution, module))
    candidates.sort(key=lambda c: (c.distribution.split()[0] != HOME, c.distribution, c.name))
    for plugin in extra:
        name = getattr(plugin, "__name__", type(plugin).__name__)
        candidates.append(_Candidate(name, "(extra)", partial(_itself, plugin)))
    return candidates


def _itself(plugin: Any) -> Any:
    return plugin


def _refuse_twice(name: str, owners: list[str]) -> None:
    raise PluginError(f"entry point {name!r} is declared by {' and by '.join(sorted(owners))}; rename one")


def _named(distribution: importlib.metadata.Distribution | None) -> str:
    return f"{distribution.name} {distribution.version}" if distribution else "(unknown)"


def _records(candidate: _Candidate) -> tuple[list[tuple[str, Record]], list[Sections]]:
    """Imports the plugin, checks it against the hook specifications and asks it for its records and settings."""
    module = candidate.module()
    version = getattr(module, "api_version", API_VERSION)
    if version != API_VERSION:
        raise PluginError(f"written for api_version {version}; this cilnorm has {API_VERSION}")
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(module, candidate.name)
    manager.check_pending()
    records = []
    for hook, (kind, record_type) in HOOKS.items():
        for record in chain.from_iterable(getattr(manager.hook, hook)()):
            if not isinstance(record, record_type):
                raise PluginError(f"{hook} returned {record!r:.80}, which is no {record_type.__name__} record")
            records.append((kind, record))
    found = [_read_settings(each, candidate) for each in chain.from_iterable(getattr(manager.hook, OF_SETTINGS)())]
    if not records and not found:
        raise PluginError(f"offers nothing; it needs one of the hooks {', '.join([*HOOKS, OF_SETTINGS])}")
    return records, found


def _read_settings(each: Any, candidate: _Candidate) -> Sections:
    if not isinstance(each, SettingsFile) or not hasattr(each.path, "read_text"):
        raise PluginError(f"{OF_SETTINGS} returned {each!r:.80}, which is no SettingsFile with a path")
    try:
        return read_sections(each.path, each.path.name, candidate.distribution)
    except SpecError as error:
        raise PluginError(str(error)) from error


def _check_settings(sections: Sections, present: list[Sections], sources: Mapping[str, Mapping[str, str]]) -> None:
    for kind, name in sections.names:
        if not NAME.fullmatch(name) or name == EVERY:
            raise PluginError(f"{name!r} is no name for a {kind}: lower case, digits and _ . + * - only")
    try:
        check_added(sections, present, sources)
    except SpecError as error:
        raise PluginError(str(error)) from error


def _check_names(
    records: list[tuple[str, Record]], shelves: dict[str, dict[str, Record]], sources: dict[str, dict[str, str]]
) -> None:
    own: set[tuple[str, str]] = set()
    for kind, record in records:
        if not callable(record.build) or not isinstance(record.aliases, tuple):
            raise PluginError(f"the {kind} {record.name!r} needs a build that can be called and a tuple of aliases")
        patterns = getattr(record, "files", ())
        if not isinstance(patterns, tuple) or not all(isinstance(p, str) and p[:1].isalnum() for p in patterns):
            raise PluginError(f"the {kind} {record.name!r} needs a tuple of files that begin with a letter or digit")
        for name in (record.name, *record.aliases):
            if (kind, name) in own:
                raise PluginError(f"the {kind} {name!r} is offered twice")
            own.add((kind, name))
            if not NAME.fullmatch(name):
                raise PluginError(f"{name!r} is no name for a {kind}: lower case, digits and _ . + * - only")
            for other in shelves[kind].values():
                if name == other.name or name in other.aliases:
                    raise PluginError(f"the {kind} {name!r} is already there, from {sources[kind][other.name]}")


@contextmanager
def _patience(candidate: _Candidate) -> Iterator[None]:
    """Says on standard error which plugin keeps everybody waiting; cilnorm's own come first and import torch."""

    def say() -> None:
        print(
            f"cilnorm: still importing the plugin {candidate.name!r} of {candidate.distribution} after {SLOW:g} s",
            file=sys.stderr,
            flush=True,
        )

    timer = threading.Timer(SLOW, say)
    timer.daemon = True
    if candidate.distribution.split()[0] != HOME:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def contain_exit(what: str) -> Iterator[None]:
    """Turns what a plugin raises to end the process, SystemExit say, into an error like any other; Ctrl-C stays.

    Raises:
        RuntimeError: it names ``what`` and what was raised.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise RuntimeError(f"{what}: {last_line(error)}") from error


def last_line(error: BaseException) -> str:
    """The last line of an error."""
    if isinstance(error, PluginError):
        return " ".join(str(error).split())
    return text_of(error).splitlines()[-1]


def text_of(error: BaseException) -> str:
    """An error's kind and message, whatever a stranger's error is like."""
    try:
        text = str(error)
    except Exception:
        text = "its message can't be printed"
    return f"{type(error).__name__}: {text}".rstrip(": \n")
