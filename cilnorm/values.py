"""Values as people type them -> values as the code declares them."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import yaml

__all__ = ["SpecError", "coerced", "mappings", "parsed", "seconds"]


class SpecError(ValueError):
    """A run was asked for that can't be; the message is one line for the user."""


class _Loader(yaml.SafeLoader):
    """YAML without the numbers to base 60 of version 1.1, which take ``48:16`` for 2896."""


TEXT_LIMIT, NODES_LIMIT, BRACKETS_LIMIT = 1 << 18, 100_000, 200  # what people write has a hundredth of either
INTEGER = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != INTEGER]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(INTEGER, re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))


def _look_over(text: str) -> None:
    """Refuses what would take PyYAML longer than anybody waits: its time grows with the square of open brackets."""
    if len(text) > TEXT_LIMIT:
        raise ValueError(f"longer than {TEXT_LIMIT >> 10} KiB")
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth = max(0, depth + (1 if bracket in "[{" else -1))
        if depth > BRACKETS_LIMIT:
            raise ValueError(f"more than {BRACKETS_LIMIT} brackets open")


def _size(node: Any, known: dict[int, float]) -> float:
    """Nodes of a YAML document with every alias written out; infinite where one names itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")  # until it is known; whoever asks meanwhile is inside of it
        inner = node.value if isinstance(node.value, list) else []
        flat = [child for entry in inner for child in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_size(child, known) for child in flat)
    return known[id(node)]


def parsed(text: str, where: str) -> Any:
    """What a YAML text says.

    Raises:
        SpecError: it can't be read; the message begins with ``where``.
    """
    try:
        _look_over(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _size(node, {}) > NODES_LIMIT:
                raise ValueError("its aliases make too much of it, or name themselves")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except Exception as error:  # PyYAML meets values that it can't make (``!!int ''``) with many kinds of error
        raise SpecError(f"{where}: no YAML that can be read: {(str(error).splitlines() or ['?'])[0]}") from error


def mappings(value: Any, where: str) -> dict[str, Mapping[str, Any]]:
    """Names with mappings of names, copied.

    Raises:
        SpecError: it is something else; the message begins with ``where``.
    """
    for outer in (value, *(value.values() if isinstance(value, dict) else ())):
        if not isinstance(outer, dict) or not all(isinstance(key, str) for key in outer):
            raise SpecError(f"{where}: expected names with values, found {type(outer).__name__}")
    return {name: dict(inner) for name, inner in value.items()}


def coerced(value: Any, hint: Any, key: str) -> Any:
    """``value`` as ``hint`` wants it; YAML reads 1e-3 as text and a pair as a list.

    Raises:
        SpecError: it does not fit.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if not any(value == option and type(value) is type(option) for option in arguments):
            raise SpecError(f"{key}: {value!r} is none of {', '.join(map(str, arguments))}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _to_any(value, arguments, key)
    if origin is tuple:
        return _to_tuple(value, arguments, key)
    if hint is float and not isinstance(value, bool):
        with_text = value if isinstance(value, (int, float, str)) else None
        try:
            number = float(with_text)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if number - number == 0:
            return number
    elif hint in (int, float, str, bool):
        if type(value) is hint:
            return value
    else:
        return value
    raise SpecError(f"{key}: expected {hint.__name__}, found {value!r:.80}")


def _to_any(value: Any, hints: tuple[Any, ...], key: str) -> Any:
    if value is None and types.NoneType in hints:
        return None
    problems = []
    for hint in (hint for hint in hints if hint is not types.NoneType):
        try:
            return coerced(value, hint, key)
        except SpecError as error:
            problems.append(str(error))
    raise SpecError(problems[0])


def _to_tuple(value: Any, hints: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    items = value.replace(":", ",").split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        items = [items]
    items = [
        int(item.strip()) if isinstance(item, str) and re.fullmatch(r"-?\d{1,18}", item.strip()) else item
        for item in items
    ]
    repeated = len(hints) == 2 and hints[1] is Ellipsis
    if not repeated and len(items) != len(hints):
        raise SpecError(f"{key}: expected {len(hints)} values, found {value!r:.80}")
    return tuple(coerced(item, hints[0] if repeated else hints[at], key) for at, item in enumerate(items))


def seconds(text: str, key: str) -> float:
    """A duration such as ``60s``, ``5m``, ``1.5h`` or a bare number of seconds.

    Raises:
        SpecError: it is none, or not above 0.
    """
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smh]?)", text.strip())
    if not found or not float(found[1]):
        raise SpecError(f"{key}: expected a duration such as 60s, 5m or 1h, found {text!r:.80}")
    return float(found[1]) * {"h": 3600, "m": 60}.get(found[2], 1)
