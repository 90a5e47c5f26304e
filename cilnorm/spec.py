"""registry.yaml and the command line -> a frozen Spec, written beside every result.

Precedence: default in the plugin's dataclass < registry.yaml < what the user sets. Every key is checked; a misspelt one
is an error that names the nearest, never a silent default.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from cilnorm.hookspecs import Record
from cilnorm.method import Method, Schedule
from cilnorm.registry import Registry, Shelf, UnknownName
from cilnorm.running import Statistics
from cilnorm.settings.alternatives import scaled_milestones, without_others
from cilnorm.settings.class_order import check_order, check_seed, given_order
from cilnorm.settings.options import Space, settable
from cilnorm.settings.registry_file import Options, Settings, check_known, names_with_values, read_settings
from cilnorm.settings.spec_key import fingerprint, renamed
from cilnorm.training.fast_engines import EngineName
from cilnorm.training.memory import per_class
from cilnorm.training.pixels import Augmentation
from cilnorm.training.precision import Precision
from cilnorm.training.protocol import BESIDES, PROTOCOLS, Protocol, task_sizes
from cilnorm.training.streamed_images import Residence
from cilnorm.values import SpecError, coerced

__all__ = [
    "Settings",
    "Spec",
    "SpecError",
    "from_mapping",
    "read_settings",
    "read_spec",
    "resolve",
    "to_mapping",
    "to_yaml",
]

SECTIONS = {"augmentation": Augmentation, "schedule": Schedule, "protocol": Protocol, "statistics": Statistics}
COMPONENTS = ("method", "norm", "backbone", "dataset")


@dataclass(frozen=True)
class Spec:
    """All that decides a run's numbers.

    Attributes:
        preset: where the values came from; names the run, decides nothing any more.
        method, norm, backbone, dataset: names that ``cilnorm list`` shows, each with its ``..._options``.
        tasks: into how many the classes are split, as evenly as can be; nothing where ``increment`` or ``task_classes``
            says it.
        first_classes: classes of the first task, so that half of them come first, say; null for as many as the others.
        increment: classes of each later task, and of the first but for ``first_classes``; the last brings what is left.
        task_classes: classes of every task, one number a task.
        stop_after: learn only the first so many of the tasks; None for all.
        classes: use only the first so many of the class order; None for all.
        memory: exemplars kept in all; 0 for none, which not every method can do without.
        memory_per_class: exemplars of each class from the first task on, in the place of ``memory``; null for that.
        rows: current and past rows of a mixed batch; the first task's batches have their sum.
        classifier: whose predictions fill the accuracy matrix: the method's own ``head``, or ``nme``, the nearest mean
            of exemplars. With ``nme`` the head is scored too, and log and summary have that under ``by_head``.
        train_per_class: use only so many training images of a class; None for all.
        precision, engine: see ``cilnorm.training.precision`` and ``cilnorm.training.fast_engines``; the engine
            decides the time alone.
        residence: where images lie: whole on the ``device``; or ``stream``, in memory or on the disk, from where the
            next batches are read; ``auto`` streams what would take more than half of the device's free memory. It
            changes no number.
        statistics: what becomes of the norm's running statistics from task to task, if it has any.
        seed: of everything random.
        class_order: None: ``seed`` draws it, as in the released code; a seed of its own (1993: the permutation that
            much of the field uses); a name (``podnet-1``); or the data set's labels in the order of learning.
            See ``cilnorm.settings.class_order``.
    """

    method: str
    norm: str
    backbone: str
    dataset: str
    preset: str = ""
    tasks: int = 10
    first_classes: int | None = None
    increment: int | None = None
    task_classes: tuple[int, ...] | None = None
    stop_after: int | None = None
    classes: int | None = None
    memory: int = 2000
    memory_per_class: int | None = None
    rows: tuple[int, int] = (48, 16)
    classifier: Literal["head", "nme"] = "head"
    train_per_class: int | None = None
    precision: Precision = "auto"
    engine: EngineName = "auto"
    residence: Residence = "auto"
    seed: int = 0
    class_order: int | tuple[int, ...] | None = None
    method_options: Options = field(default_factory=dict)
    norm_options: Options = field(default_factory=dict)
    backbone_options: Options = field(default_factory=dict)
    dataset_options: Options = field(default_factory=dict)
    augmentation: Augmentation = field(default_factory=Augmentation)
    schedule: Schedule = field(default_factory=Schedule)
    protocol: Protocol = field(default_factory=Protocol)
    statistics: Statistics = field(default_factory=Statistics)

    def __post_init__(self) -> None:
        current, past = self.rows
        if current < 1 or past < 1:
            raise SpecError(f"rows {current}:{past}: a mixed batch needs rows of both kinds, 48:16 say")
        if self.protocol.epoch == "cycle" and current % past:
            raise SpecError(
                f"rows {current}:{past}: the released protocol knows whole ratios only, and {past} does not divide "
                f"{current}; take rows such as 48:16, or leave protocol.epoch at passes"
            )
        self._check_tasks()
        self._check_memory()
        if self.train_per_class is not None and self.train_per_class < 1:
            raise SpecError(f"train_per_class must be at least 1, not {self.train_per_class}")
        check_seed(self.seed, "seed")
        check_order(self.class_order)

    def _check_tasks(self) -> None:
        if self.tasks < 1:
            raise SpecError(f"tasks must be at least 1, not {self.tasks}")
        for name in ("first_classes", "increment"):
            value = getattr(self, name)
            if value is not None and (value < 1 or self.task_classes is not None):
                both = f"{name} and task_classes both say how large tasks are; give one of them"
                raise SpecError(both if value >= 1 else f"{name} must be at least 1, not {value}")
        if self.task_classes is not None and (not self.task_classes or min(self.task_classes) < 1):
            raise SpecError("task_classes: one number of classes a task, each at least 1")
        tasks: int | None = len(self.task_classes or ()) or (self.tasks if self.increment is None else None)
        tasks = len(self.sizes(self.classes)) if self.classes else tasks  # else known once the data set is read
        if self.stop_after is not None and not 1 <= self.stop_after <= (tasks or self.stop_after):
            raise SpecError(f"stop_after must be in 1 .. {tasks or 'T'}, the number of tasks, not {self.stop_after}")

    def _check_memory(self) -> None:
        if self.memory < 0 or (self.memory_per_class or 0) < 0:
            raise SpecError("memory and memory_per_class can't be negative")
        if self.protocol.herding == "reservoir":
            if self.memory_per_class is not None:
                raise SpecError("herding: reservoir is one for all classes; give memory, not memory_per_class")
            if self.classifier == "nme" or self.statistics.precise != "never":
                what = "classifier: nme" if self.classifier == "nme" else "statistics.precise"
                raise SpecError(f"{what} needs exemplars of every class, which herding: reservoir does not promise")
        elif self.classes is not None:
            self.exemplars(self.classes)
        if not self.keeps_exemplars and (self.classifier == "nme" or self.statistics.precise != "never"):
            what = "classifier: nme" if self.classifier == "nme" else "statistics.precise"
            raise SpecError(f"{what} needs exemplars, and memory is 0")

    @property
    def keeps_exemplars(self) -> bool:
        """Whether there is a memory."""
        return bool(self.memory if self.memory_per_class is None else self.memory_per_class)

    def exemplars(self, seen: int) -> int:
        """Exemplars that each of ``seen`` classes may keep.

        Raises:
            SpecError: the memory holds none of some class.
        """
        if self.memory_per_class is not None:
            return self.memory_per_class
        try:
            return per_class(self.memory, seen, self.protocol.budget)
        except ValueError as error:
            raise SpecError(str(error)) from None

    def sizes(self, classes: int) -> tuple[int, ...]:
        """Classes of each task, in order, of a data set of which so many are learned.

        Raises:
            SpecError: it can't be split so, or has fewer tasks than ``stop_after``.
        """
        sizes = self.task_classes
        if sizes is None:
            try:
                sizes = task_sizes(classes, self.tasks, self.first_classes, self.increment)
            except ValueError as error:
                raise SpecError(str(error)) from None
        if sum(sizes) != classes:
            raise SpecError(f"task_classes are {sum(sizes)} in all, not {classes}; set classes={sum(sizes)} for fewer")
        if self.stop_after is not None and self.stop_after > len(sizes):
            raise SpecError(f"stop_after must be in 1 .. {len(sizes)}, the number of tasks, not {self.stop_after}")
        return sizes

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits that two specs share only if they ask for the same numbers."""
        unused = {} if self.increment is None and self.task_classes is None else {"tasks": 0}
        unused |= {} if self.memory_per_class is None else {"memory": 0}
        return fingerprint({**to_mapping(self), "preset": "", "engine": "", "residence": "auto", **unused})


def resolve(
    preset: str = "quick", registry: Registry | None = None, settings: Settings | None = None, **asked: Any
) -> Spec:
    """The spec of a preset with values of one's own.

    Args:
        preset: a name in registry.yaml, or one that a plugin brings.
        asked: fields of ``Spec``, or hyperparameters by dotted or bare name: ``norm="tbbn"``, ``epochs=2``,
            ``**{"schedule.momentum": 0.9}``, ``less_forget=8``. ``protocol="released"`` takes the whole set.

    Raises:
        SpecError: an unknown or ambiguous name, or a value that does not fit.
    """
    from cilnorm import registry as registries

    registry = registry or registries.load()
    settings = settings or read_settings(registry=registry)
    preset = preset if preset in settings.presets else preset.casefold()
    check_known("preset", [preset], settings.presets)
    values = {key: value for key, value in settings.presets[preset].items() if key != "about"}
    return from_mapping({**values, "preset": preset}, registry, settings, asked)


def read_spec(path: Path, registry: Registry, **asked: Any) -> Spec:
    """A spec from a file that ``to_yaml`` wrote, with values of one's own over it.

    Raises:
        SpecError: as ``resolve``; also if the file is missing or is no YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: {getattr(error, 'strerror', None) or 'no text'}") from error
    return from_mapping(names_with_values(text, str(path)), registry, None, asked)


def from_mapping(values: Options, registry: Registry, settings: Settings | None, asked: Options) -> Spec:
    """Builds a checked spec: ``values`` of a preset or file, then registry.yaml's for method and norm, then ``asked``.

    Options of a part are dropped where another part is asked for in its place.

    Raises:
        SpecError: as ``resolve``.
    """
    values, asked = renamed(values), renamed(asked)
    check_known("field of a spec", values, [f.name for f in fields(Spec)])
    names = {part: asked.get(part, values.get(part)) for part in COMPONENTS}
    records = {part: _record(registry, part, name) for part, name in names.items()}
    others = [part for part in COMPONENTS if part in values and _record(registry, part, values[part]) != records[part]]
    values = {key: value for key, value in values.items() if key.removesuffix("_options") not in others}
    space = _space(records, registry)
    flat = _flatten(values, space, records["method"])
    if settings:
        for part, by_name in settings.own.items():
            own = by_name.get(records[part].name, {}).get(str(values.get("preset")), {})
            flat |= {space.address(key, f"{part}."): value for key, value in own.items()}
    wanted = {key: value for key, value in asked.items() if key not in COMPONENTS}
    if isinstance(wanted.get("protocol"), str):
        flat |= _protocol(wanted.pop("protocol"), records["method"])
    wanted = {space.address(key): value for key, value in wanted.items()}
    flat |= without_others(wanted)
    flat |= scaled_milestones(flat, wanted) | wanted
    flat["class_order"] = given_order(flat.get("class_order"))
    return _build({key: coerced(value, space.types[key], key) for key, value in flat.items()}, records)


def _record(registry: Registry, part: str, name: object) -> Record:
    shelf: Shelf[Record] = {shelf.kind: shelf for shelf in registry.shelves}[part]
    if not isinstance(name, str):
        raise SpecError(f"{part}: expected a name, found {name!r}")
    try:
        return shelf[name]
    except UnknownName as error:
        raise SpecError(str(error)) from None


def _space(records: Mapping[str, Record], registry: Registry) -> Space:
    """Every key that these records admit, dotted, with its type."""
    hints = typing.get_type_hints(Spec)
    nested = {*SECTIONS, *COMPONENTS, *(f"{part}_options" for part in COMPONENTS)}
    types = {key: hint for key, hint in hints.items() if key not in nested}
    for section, made in SECTIONS.items():
        types |= {f"{section}.{key}": hint for key, hint in typing.get_type_hints(made).items()}
    for part, record in records.items():
        types |= {f"{part}.{key}": hint for key, hint in settable(part, record).items()}
    return Space(types, records, registry)


def _flatten(values: Options, space: Space, method: Record) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        section = key.removesuffix("_options")
        if key in COMPONENTS:
            continue
        if key == "protocol" and isinstance(value, str):
            flat |= _protocol(value, method)
        elif key in SECTIONS or section in COMPONENTS:
            if not isinstance(value, Mapping):
                raise SpecError(f"{key}: expected names with values, found {value!r:.80}")
            flat |= {space.address(f"{section}.{inner}"): given for inner, given in value.items()}
        else:
            flat[key] = value
    return flat


def _protocol(name: str, method: Record) -> dict[str, Any]:
    """All fields of a named protocol, what belongs to it besides, and what its code of the method does differently."""
    name = name.casefold()
    check_known("protocol", [name], PROTOCOLS)
    flat = {f"protocol.{key}": value for key, value in {**dataclasses.asdict(Protocol()), **PROTOCOLS[name]}.items()}
    flat |= BESIDES.get(name, {})
    own = getattr(method.build, name, {}) if name in ("released", "pycil") else {}
    flat |= {key if key.startswith("protocol.") else f"method.{key}": value for key, value in own.items()}
    return flat


def _build(flat: Options, records: Mapping[str, Record]) -> Spec:
    within = {
        section: {key.partition(".")[2]: value for key, value in flat.items() if key.startswith(f"{section}.")}
        for section in (*SECTIONS, *COMPONENTS)
    }
    try:
        method: Method = records["method"].build(**within["method"])
        values: dict[str, Any] = {key: value for key, value in flat.items() if "." not in key}
        values |= {part: record.name for part, record in records.items()}
        values |= {f"{part}_options": within[part] for part in COMPONENTS}
        values |= {section: made(**within[section]) for section, made in SECTIONS.items()}
        return Spec(**{**values, "method_options": dataclasses.asdict(method)})
    except (TypeError, ValueError) as error:
        raise SpecError(str(error)) from error


def to_mapping(spec: Spec) -> dict[str, Any]:
    """The spec as plain values, which ``from_mapping`` reads back."""
    mapping: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(spec)))
    return mapping


def to_yaml(spec: Spec) -> str:
    """The spec as a file that ``cilnorm run --spec`` repeats."""
    return yaml.safe_dump(to_mapping(spec), sort_keys=False)
