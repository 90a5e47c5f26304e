"""The pages of the reference that are read from the code: modules, commands, options, events. Needs no Sphinx."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

import cilnorm
from cilnorm.cli.show import COLUMNS, facts_of, option_row
from cilnorm.hookspecs import GROUP, Record
from cilnorm.registry import Shelf, load
from cilnorm.settings.options import options_of
from cilnorm.spec import SECTIONS, Spec, read_settings
from cilnorm.storage import events
from cilnorm.training.protocol import BESIDES, PROTOCOLS

__all__ = ["PUBLIC", "pages"]

DESIGN = Path(__file__).resolve().parent.parent / "design.md"
PROMISED = re.search(r"never each other: (.*?)\. Their paths are promised", DESIGN.read_text(encoding="utf-8"), re.S)
PUBLIC = tuple(re.findall(r"`(\w+)`", PROMISED[1] if PROMISED else ""))  # what plugins may import
BESIDE = ("testing", "integrations.avalanche")  # promised as well, but not for plugins
KINDS = {"norm": "Norms", "method": "Methods", "backbone": "Backbones", "dataset": "Data sets", "logger": "Loggers"}
OURS = "cilnorm "  # how the sources of our own records begin; what else is installed where the site is built stays out


def pages() -> dict[str, str]:
    """The text of each page, by its path below ``docs/reference``; Markdown, and reStructuredText for modules."""
    registry = load()
    return {
        **{f"modules/{name}.rst": _module(f"cilnorm.{name}") for name in PUBLIC},
        **{f"modules/{name}.rst": _automodule(f"cilnorm.{name}") for name in BESIDE},
        "modules/cilnorm.rst": _face(),
        **{f"options/{shelf.kind}s.md": _shelf(shelf) for shelf in registry.shelves},
        "options/presets.md": _presets(),
        "options/settings.md": _settings(),
        "commands.md": _commands(),
        "events.md": _events(),
        "changelog.md": "```{include} ../../CHANGELOG.md\n:relative-docs: docs/\n```\n",
    }


def _module(name: str) -> str:
    module, others = importlib.import_module(name), {f"cilnorm.{other}" for other in PUBLIC} - {name}
    elsewhere = [known for known in getattr(module, "__all__", ()) if _home(getattr(module, known)) in others]
    left_out = f"   :exclude-members: {', '.join(elsewhere)}\n" if elsewhere else ""  # described where they are at home
    hooks = [known for known, thing in vars(module).items() if hasattr(thing, f"{GROUP}_spec")]
    return _automodule(name) + left_out + "".join(f"\n.. autofunction:: {name}.{hook}\n" for hook in hooks)


def _automodule(name: str) -> str:
    return f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n   :members:\n"


def _home(thing: Any) -> str:
    """The module that defines a class or function; empty for a value."""
    return str(thing.__module__) if inspect.isclass(thing) or inspect.isroutine(thing) else ""


def _face() -> str:
    """What ``import cilnorm`` has: names of public modules by reference, others with their documentation."""
    parts = ["cilnorm\n=======\n\n.. automodule:: cilnorm\n   :no-members:\n"]
    for name in cilnorm.__all__:
        thing = getattr(cilnorm, name)
        home = thing.__name__ if inspect.ismodule(thing) else thing.__module__
        if home.removeprefix("cilnorm.") in PUBLIC:
            role = "mod" if inspect.ismodule(thing) else "class" if inspect.isclass(thing) else "func"
            target = home if inspect.ismodule(thing) else f"{home}.{thing.__name__}"
            parts.append(f"``cilnorm.{name}``\n   is :py:{role}:`{target}`.\n")
        else:
            directive = "autoclass" if inspect.isclass(thing) else "autofunction"
            parts.append(f".. {directive}:: cilnorm.{name}\n")
    return "\n".join(parts)


def _shelf(shelf: Shelf[Any]) -> str:
    example = "" if shelf.kind == "logger" else f" An option is set by `--set {shelf.kind}.OPTION=VALUE`."
    parts = [f"# {KINDS[shelf.kind]}\n\n`cilnorm show NAME` says the same.{example}\n"]
    for name, record in shelf.items():
        if shelf.sources[name].startswith(OURS):
            parts.append(_record(shelf.kind, record))
    return "\n".join(parts)


def _record(kind: str, record: Record) -> str:
    build = record.build
    while hasattr(build, "func"):
        build = build.func
    about = inspect.getdoc(inspect.getmodule(build)) or ""
    facts = {"paper": record.paper, "other names": ", ".join(f"`{name}`" for name in record.aliases)}
    facts |= facts_of(kind, record)
    rows = [option_row(option) for option in options_of(kind, record.build).values()]
    listed = "".join(f"- {fact}: {_prose(text)}\n" for fact, text in facts.items() if text)
    return f"## {_code(record.name)}\n\n{_prose(about)}\n\n{listed}\n{_table(COLUMNS, rows)}"


def _presets() -> str:
    parts = ["# Presets\n\nWhere all values come from that nobody sets: `--preset NAME`.\n"]
    settings = read_settings()
    for name, values in settings.presets.items():
        text = _yaml({key: value for key, value in values.items() if key != "about"})
        parts.append(f"## {_code(name)}\n\n{_prose(str(values.get('about', '')))}\n\n{text}")
        for part, by_name in settings.own.items():
            others = {its_name: by_preset[name] for its_name, by_preset in by_name.items() if by_preset.get(name)}
            if others:
                parts.append(f"Otherwise with a {part}:\n\n{_yaml(others)}")
    return "\n".join(parts)


def _yaml(values: dict[str, Any]) -> str:
    apart = json.loads(json.dumps(values))  # what two entries share is written twice, not marked and referred to
    text = yaml.safe_dump(apart, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    return f"```yaml\n{text}```\n"


def _settings() -> str:
    parts = ["# Settings of a run\n\nWhat belongs to no plugin. `cilnorm show spec` and the like say the same.\n"]
    for name, made in {"spec": Spec, **SECTIONS}.items():
        own = [option for key, option in options_of("", made).items() if key not in SECTIONS and "_options" not in key]
        set_by = "NAME=VALUE" if name == "spec" else f"{name}.NAME=VALUE"
        about = _prose((inspect.getdoc(made) or "").partition("\n")[0])
        parts.append(f"## {name}\n\n{about} Set by `--set {set_by}`.\n\n{_table(COLUMNS, map(option_row, own))}")
    rows = []
    for name, values in PROTOCOLS.items():
        whole = {**values, **BESIDES.get(name, {})}
        rows.append((f"`{name}`", ", ".join(f"`{key}: {value}`" for key, value in whole.items()) or "the defaults"))
    return "\n".join([*parts, f"## Named protocols\n\n{_table(('--protocol', 'what it sets'), rows, code=False)}"])


def _commands() -> str:
    import typer

    from cilnorm.cli.app import app

    group: Any = typer.main.get_command(app)
    parts = [f"# Command line\n\n{_prose(group.help)} `cilnorm COMMAND --help` says the same.\n"]
    for name, command in sorted(group.commands.items()):
        arguments = [each for each in command.params if each.param_type_name == "argument"]
        options = [each for each in command.params if each.param_type_name == "option" and each.name != "help"]
        usage = " ".join(["cilnorm", name, *map(_usage, arguments)])
        parts.append(f"## {_code(f'cilnorm {name}')}\n\n```text\n{usage} [OPTIONS]\n```\n\n{_prose(command.help)}\n")
        rows = [(_usage(each), "", each.help or "") for each in arguments]
        rows += [(" ".join(each.opts), _default_of(each), _meaning_of(each)) for each in options]
        parts.append(_table(("argument or option", "default", "meaning"), rows))
    return "\n".join(parts)


def _usage(argument: Any) -> str:
    shown = str(argument.metavar or argument.name.upper())
    return shown if argument.required else f"[{shown}]"


def _default_of(option: Any) -> str:
    if option.is_flag:
        return "off"
    return "" if option.default is None or callable(option.default) else str(option.default)


def _meaning_of(option: Any) -> str:
    text = str(option.help or "")
    return f"{text} May be repeated.".strip() if option.multiple and "repeated" not in text else text


def _events() -> str:
    parts = [f"# Events\n\n{_prose(inspect.getdoc(events) or '')}\n"]
    for name in events.__all__:
        made = getattr(events, name)
        if made is events.Event:
            continue
        meanings = options_of("", made)
        rows = [(each.name, str(each.type), meanings[each.name].meaning) for each in fields(made)]
        where = "" if made.logged else " It is told to watchers alone and stands in no file."
        about = _prose((inspect.getdoc(made) or "").partition("\n")[0])
        parts.append(f"## {_code(made.kind)}\n\n{about}{where}\n\n{_table(('field', 'type', 'meaning'), rows)}")
    return "\n".join(parts)


def _table(columns: Sequence[str], rows: Any, code: bool = True) -> str:
    """A table without the columns in which nothing stands; a single word is code but in the last column."""
    rows = list(rows)
    if not rows:
        return "No options.\n"
    kept = [place for place in range(len(columns)) if any(row[place] for row in rows)]
    lines = [" | ".join(columns[place] for place in kept), " | ".join("---" for _ in kept)]
    lines += [" | ".join(_cells(row, kept, code)) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def _cells(row: Sequence[str], kept: Sequence[int], code: bool) -> Iterator[str]:
    for place in kept:
        text = " ".join(row[place].split()).replace("|", "\\|")
        is_code = code and place < len(row) - 1 and " " not in text
        yield _code(text) if text and is_code else _prose(text)


def _code(text: str) -> str:
    return f"`{text}`"


def _prose(text: str) -> str:
    """Text of a docstring as Markdown: indented lines are code there, too; signs that mean something are escaped."""
    lines = text.replace("``", "`").splitlines()
    return "\n".join(line if line.startswith("    ") else _escaped(line) for line in lines)


def _escaped(line: str) -> str:
    parts = re.split(r"(`[^`]*`)", line)
    parts[::2] = [re.sub(r"(?<![<(\w])(https?://[^\s,;)>]*[^\s,;)>.:])", r"<\1>", part) for part in parts[::2]]
    parts[::2] = [re.sub(r"(?<!\\)([*_\[\]])(?![^<]*>)", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)
