"""What a user can set, and what each of it means.

An option is a field of a dataclass or a keyword of a ``build``. Its name, type and default are the code's own. What it
means stands in the docstring of the class or function, in the section ``Attributes:`` or ``Args:``, one entry an option
with the paper's symbol and the place in the paper in brackets, where there are such::

    Attributes:
        less_forget (λ_base, section 4.1): weight of the term that keeps embeddings where they were.
        imprint: whether the weights of new classes start at their mean embedding.

A class inherits the entries of its bases. Plugins of anybody are read in the same way.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cilnorm.hookspecs import Record
from cilnorm.registry import Registry, nearest
from cilnorm.values import SpecError

__all__ = ["REQUIRED", "Option", "Space", "option_defaults", "options_of", "settable", "spelled"]

REQUIRED = inspect.Parameter.empty
HANDED_IN = {  # by cilnorm itself
    "norm": {"num_features", "device", "dtype"},
    "backbone": {"norm", "signed_embedding"},
    "dataset": {"root"},
    "logger": {"folder"},
}
ENTRY = re.compile(r"([A-Za-z_]\w*(?:, [A-Za-z_]\w*)*)(?: \(([^()]*)\))?: (.*)")
OTHER_NAMES = {  # what other programs call the same
    "learning_rate": "lr", "init_lr": "lr", "wd": "weight_decay", "nepochs": "epochs", "num_epochs": "epochs",
    "batch_size": "rows", "num_tasks": "tasks", "ntasks": "tasks", "memory_size": "memory", "num_exemplars": "memory",
    "gradient_clip": "clip", "lr_decay": "gamma", "scheduler": "annealing", "temp": "temperature",
}  # fmt: skip


@dataclass(frozen=True)
class Option:
    """One thing to set.

    Attributes:
        hint: its type, as the code declares it.
        default: its value if nobody sets it; ``REQUIRED`` where there is none.
        meaning: in a sentence; empty where its author wrote none.
        symbol: the paper's; empty where it has none.
        place: where in the paper.
    """

    name: str
    hint: Any
    default: Any
    meaning: str = ""
    symbol: str = ""
    place: str = ""


def options_of(part: str, build: Any) -> dict[str, Option]:
    """The options of a record's ``build`` or of a dataclass, by name, without what cilnorm hands in by itself.

    Args:
        part: the kind of record; anything else for a dataclass of settings.
    """
    meanings = _meanings(build)
    return {
        name: Option(name, hint, default, *meanings.get(name, ("", "", "")))
        for name, (hint, default) in _declared(part, build).items()
    }


def settable(part: str, record: Record) -> dict[str, Any]:
    """The types of a record's options, by name."""
    return {name: hint for name, (hint, _) in _declared(part, record.build).items()}


def option_defaults(part: str, record: Record) -> dict[str, Any]:
    """The value of every option that has one unless it is set."""
    found = _declared(part, record.build).items()
    return {name: default for name, (_, default) in found if default is not REQUIRED}


def _declared(part: str, build: Any) -> dict[str, tuple[Any, Any]]:
    if dataclasses.is_dataclass(build):
        hints = typing.get_type_hints(build)
        return {f.name: (hints[f.name], _default(f)) for f in dataclasses.fields(build)}
    try:
        signature = inspect.signature(build, eval_str=True)
    except NameError:  # annotations under TYPE_CHECKING; their values go through unchecked
        signature = inspect.signature(build)
    return {
        name: (parameter.annotation, parameter.default)
        for name, parameter in signature.parameters.items()
        if name not in HANDED_IN.get(part, ())
        and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return REQUIRED if field.default_factory is dataclasses.MISSING else field.default_factory()


def _meanings(build: Any) -> dict[str, tuple[str, str, str]]:
    """(meaning, symbol, place) by name; what a class says goes before what its bases say."""
    while isinstance(build, functools.partial):
        build = build.func
    sources = build.__mro__ if isinstance(build, type) else (build,)
    found: dict[str, tuple[str, str, str]] = {}
    for source in reversed(sources):
        for names, brackets, meaning in _entries(getattr(source, "__doc__", None) or ""):
            first, _, rest = brackets.partition(", ")
            symbol, place = ("", brackets) if " " in first else (first, rest)
            found |= dict.fromkeys(names.split(", "), (meaning, symbol, place))
    return found


def _entries(docstring: str) -> Iterator[tuple[str, str, str]]:
    """(names, brackets, meaning) of each entry below ``Attributes:`` or ``Args:``."""
    for section in re.finditer(
        r"^(?:Attributes|Args):\n((?:[ \t]+.*\n|\n)*)", f"{inspect.cleandoc(docstring)}\n", re.M
    ):
        entries = re.split(r"^ {4}(?=\S)", section[1], flags=re.M)
        for entry in (ENTRY.fullmatch(" ".join(entry.split())) for entry in entries):
            if entry:
                yield entry[1], entry[2] or "", entry[3]


def spelled(symbol: str) -> str:
    """A symbol as people type it: ``λ_c`` as ``lambda_c``."""
    names = {sign: unicodedata.name(sign, "") for sign in symbol}
    letters = [
        name.rpartition(" ")[2].replace("LAMDA", "LAMBDA") if name.startswith("GREEK") else sign
        for sign, name in ((sign, names[sign]) for sign in symbol)
    ]
    return "".join(letters).casefold()


def _means(asked: str, symbol: str) -> bool:
    """Whether ``asked`` is this symbol, or this symbol without its index."""
    asked, symbol = spelled(asked), spelled(symbol)
    return bool(symbol) and (asked == symbol or (len(asked) > 1 and asked == symbol.partition("_")[0]))


@dataclass(frozen=True)
class Space:
    """All that can be set with some method, norm, backbone and data set.

    Attributes:
        types: of each key, dotted where it belongs to a part or a section.
        records: the four parts.
        registry: of what else there is, for messages.
    """

    types: Mapping[str, Any]
    records: Mapping[str, Record]
    registry: Registry

    def address(self, key: str, within: str = "") -> str:
        """The dotted key that ``key`` means: one ``within``, itself, or the only one that ends in it.

        Raises:
            SpecError: there is none, or more than one; the message says what may have been meant.
        """
        for whole in (within + key, key):
            if whole in self.types:
                return whole
        found = [known for known in self.types if known.rpartition(".")[2] == key]
        if len(found) > 1:
            raise SpecError(f"{key!r} could be {' or '.join(found)}; say which")
        if not found:
            raise SpecError(self._explained(key))
        return found[0]

    def _explained(self, key: str) -> str:
        """Why there is no such key: another record's, a paper's symbol, another program's name, or a misspelling."""
        section, _, name = key.rpartition(".")
        parts = {part: record for part, record in self.records.items() if section in ("", part)}
        names = {known.rpartition(".")[2] for known in self.types}
        if name not in names:
            return self._foreign(name, parts) or self._symbolic(name, parts) or _misspelt(key, name, names)
        return _misspelt(key, key, set(self.types))

    def _foreign(self, name: str, parts: Mapping[str, Record]) -> str:
        for part, record in parts.items():
            owners = [other.name for other in self._shelf(part) if name in settable(part, other)]
            if owners:
                has = f"{', '.join(owners[:4])} {'has' if len(owners) == 1 else 'have'} one"
                return f"{record.name} has no option {name!r}, though {has}; {_hint(record)}"
        return ""

    def _symbolic(self, name: str, parts: Mapping[str, Record]) -> str:
        for part, record in parts.items():
            if found := _called(name, part, record):
                return f"{record.name} calls {found}; {_hint(record)}"
        for part, record in parts.items():
            others = {other.name: _called(name, part, other) for other in self._shelf(part)}
            known = [f"{other} calls {found}" for other, found in others.items() if found]
            if known:
                return f"{record.name} has no {name}, though {', '.join(known[:4])}; {_hint(record)}"
        return ""

    def _shelf(self, part: str) -> list[Record]:
        [shelf] = [shelf for shelf in self.registry.shelves if shelf.kind == part]
        return list(shelf.values())


def _hint(record: Record) -> str:
    return f"`cilnorm show {record.name}` lists its options"


def _called(name: str, part: str, record: Record) -> str:
    """``λ `less_forget``` for each option whose symbol ``name`` is."""
    found = [option for option in options_of(part, record.build).values() if _means(name, option.symbol)]
    return " and ".join(f"{option.symbol} `{option.name}`" for option in found)


def _misspelt(key: str, name: str, known: set[str]) -> str:
    other = OTHER_NAMES.get(name.casefold().replace("-", "_"), "")
    if other in known:
        return f"no key called {key!r}; did you mean {other!r}? there are {', '.join(sorted(known))}"
    return nearest("key", key, known)
