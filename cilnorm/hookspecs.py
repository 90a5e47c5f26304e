"""What a plugin may offer, as records, and the hooks that return them.

A plugin is a module named by an entry point of the group ``cilnorm``. It offers things by returning records from the
hooks below; nothing is registered by importing it. A module may declare ``api_version = 1`` (the value of
``API_VERSION`` it was written for); one that declares another is refused with a message that names both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from typing import Any

import pluggy

__all__ = [
    "API_VERSION",
    "GROUP",
    "Backbone",
    "Dataset",
    "Logger",
    "Method",
    "Norm",
    "Record",
    "SettingsFile",
    "hookimpl",
]

API_VERSION = 1
GROUP = "cilnorm"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@dataclass(frozen=True)
class Record:
    """One thing that can be chosen by name.

    Attributes:
        name: what users type; lower case, as the field writes it.
        build: makes the thing; what it takes depends on the kind, see below. Options that users may set are its
            keywords or fields; what they mean is read from its docstring (``cilnorm.settings.options`` says how).
        paper: address of the paper that defines it; empty where there is none.
        aliases: other names that users may type.
    """

    name: str
    build: Callable[..., Any]
    paper: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Norm(Record):
    """A normalisation layer: ``build(num_features, *, eps, momentum, affine, track_running_stats, device, dtype)``.

    ``build`` is a class, function or partial, as timm demands of its ``norm_layer``.

    Attributes:
        composition_aware: whether the layer's modules are ``CompositionAware``.
        needs_rows: whether they must know the task or label of every row, see ``cilnorm.rows``.
        tune: options of ``build`` that are to be chosen on validation data, with the values to try in order of size.
            A value that ``build`` refuses for a layer's width (ValueError) is no candidate for that network.
        finish: changes the rest of a network that the norm's layers stand in, in place (its convolutions, say); called
            with the network once they do. Calling it twice is calling it once.
        undo: takes that back, before other layers come in their place.
        one_process: whether its layers can't share a batch among processes, so that a run on several is refused. Layers
            that can have ``synchronise(group=None)``: from then on, while their attribute ``synchronised`` is true,
            training looks at the rows of all processes together.
        check: compares the layer with a slow reference, in a second or so, and raises if they differ; for
            ``cilnorm doctor``.
    """

    composition_aware: bool = False
    needs_rows: bool = False
    tune: Mapping[str, tuple[Any, ...]] = field(default_factory=dict, hash=False)
    check: Callable[[], None] | None = None
    finish: Callable[[Any], None] | None = None
    undo: Callable[[Any], None] | None = None
    one_process: bool = False


@dataclass(frozen=True)
class Method(Record):
    """A learning method: ``build`` is a frozen dataclass of hyperparameters deriving from ``cilnorm.method.Method``."""


@dataclass(frozen=True)
class Backbone(Record):
    """A feature extractor: ``build(norm, signed_embedding=False, **options)`` returns a module.

    ``norm`` is called with a number of channels. The module has an integer ``dim`` and maps images (N, 3, H, W) to
    ``(embedding (N, dim), maps)``, ``maps`` being the stage outputs before their last ReLU, shallow to deep.
    ``signed_embedding`` leaves out the last ReLU before pooling.

    Attributes:
        side: of the square images that it was made for, in pixels; None if that is not known. Others are not refused.
        timm: the name of the model of timm that it holds, if it holds one: its weights lie behind ``net.``.
    """

    side: int | None = None
    timm: str = ""


@dataclass(frozen=True)
class Dataset(Record):
    """A source of images: ``build(root, **options)`` returns an ``ImageSet`` or ``ImageFiles`` of ``cilnorm.images``.

    ``root`` is the folder (pathlib.Path) to look in, or None for the user's cache folder.

    Attributes:
        found: called with ``root``, whether the images are there, so that ``build`` neither fetches nor makes them.
        side: of its square images, in pixels, unless an option ``size`` says otherwise; None if that is not known.
    """

    found: Callable[[Any], bool] | None = None
    side: int | None = None


@dataclass(frozen=True)
class Logger(Record):
    """Somewhere for a run's events to go: ``build(folder)``, the run's folder (pathlib.Path), returns a callable.

    It is called with every event (a dict) of events.jsonl, in order, the first being ``run``; a method ``close()``,
    if there is one, is called at the end. If it raises, whatever that is, it is left out from then on and the run goes
    on.

    Attributes:
        needs: modules that must be installed for it, beside those that cilnorm itself needs.
        files: what it writes in the run's folder, ``tensorboard/events.*`` say: ``--overwrite`` removes that, too, and
            refuses a folder in which anything else lies.
    """

    needs: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class SettingsFile:
    """A YAML file with presets, what methods and norms change with them, and grids: the sections of registry.yaml.

    It can only add: what takes the name of a preset or grid that is there is refused, naming both owners. A preset may
    extend one of cilnorm's. Values for a method or norm stand beside a preset, and either must be of the same
    distribution.

    Attributes:
        path: of the file in the installed package: ``Path(__file__).with_name("settings.yaml")``, say.
    """

    path: Traversable


@hookspec
def cilnorm_norms() -> Sequence[Norm]:  # type: ignore[empty-body]
    """Normalisation layers."""


@hookspec
def cilnorm_methods() -> Sequence[Method]:  # type: ignore[empty-body]
    """Class-incremental methods."""


@hookspec
def cilnorm_backbones() -> Sequence[Backbone]:  # type: ignore[empty-body]
    """Feature extractors."""


@hookspec
def cilnorm_datasets() -> Sequence[Dataset]:  # type: ignore[empty-body]
    """Sources of images."""


@hookspec
def cilnorm_loggers() -> Sequence[Logger]:  # type: ignore[empty-body]
    """Places for a run's events."""


@hookspec
def cilnorm_settings() -> Sequence[SettingsFile]:  # type: ignore[empty-body]
    """Presets and grids."""
