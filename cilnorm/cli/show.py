"""``cilnorm show NAME``: a method, norm, backbone, data set, logger, preset or grid, and all that can be set."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cilnorm.cli.terminal import guarded, loaded, print_table

if TYPE_CHECKING:
    from cilnorm.hookspecs import Record
    from cilnorm.registry import Registry
    from cilnorm.settings.options import Option
    from cilnorm.spec import Settings

__all__ = ["COLUMNS", "commands", "facts_of", "option_row"]

commands = typer.Typer()
COLUMNS = ("option", "default", "values", "symbol", "in the paper", "meaning")


@commands.command("show")
def show_command(
    name: Annotated[str, typer.Argument(help="What `cilnorm list` shows, or schedule, augmentation, protocol, spec.")],
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Show one method, norm, backbone, data set, preset or grid: its paper, and every option with its meaning."""

    def work() -> None:
        from cilnorm.registry import nearest
        from cilnorm.spec import read_settings
        from cilnorm.values import SpecError

        registry = loaded(False)
        settings = read_settings(registry=registry)
        found = [*_records(registry, name), *_presets(registry, settings, name), *_sections(name)]
        for show in found:
            show()
        if not found:
            known = [known for shelf in registry.shelves for known in shelf]
            known += [*settings.presets, *settings.grids]
            raise SpecError(nearest("method, norm, backbone, data set, preset or grid", name, set(known)))

    guarded(work, debug)


def _records(registry: Registry, name: str) -> Iterator[Any]:
    for shelf in registry.shelves:
        if name in shelf:
            record = shelf[name]
            yield partial(_show_record, shelf.kind, record, shelf.sources[record.name])


def _presets(registry: Registry, settings: Settings, name: str) -> Iterator[Any]:
    if name.casefold() in settings.presets:
        yield partial(_show_preset, registry, settings, name.casefold())
    if name in settings.grids:
        yield partial(_show_grid, settings, name)


def _sections(name: str) -> Iterator[Any]:
    from cilnorm.spec import SECTIONS, Spec

    sections = {**SECTIONS, "spec": Spec}
    if name in sections:
        yield partial(_show_section, name, sections[name])


def _show_record(kind: str, record: Record, distribution: str) -> None:
    from cilnorm.settings.options import options_of

    build = record.build
    while isinstance(build, partial):
        build = build.func
    facts = {
        "paper": record.paper or "none",
        "aliases": ", ".join(record.aliases) or "none",
        "distribution": distribution,
        **facts_of(kind, record),
    }
    about = inspect.getdoc(inspect.getmodule(build)) or ""
    summary = _first_line(build) if isinstance(build, type) else about.partition("\n")[0]
    print(f"{kind} {record.name}: {summary}")
    for fact, text in facts.items():
        print(f"  {fact}: {text}")
    options = options_of(kind, record.build)
    if options:
        example = next(iter(options))
        print_table(
            f"options, as --set {kind}.{example}=VALUE", COLUMNS, [option_row(option) for option in options.values()]
        )
    else:
        print("  options: none")
    if about:
        print(f"\n{about.replace('``', '`')}\n")


def facts_of(kind: str, record: Record) -> dict[str, str]:
    """What is particular to a kind of record, by what it is about."""
    facts = {}
    if kind == "backbone" and getattr(record, "side", None):
        facts["made for images of"] = _in_pixels(record.side) + _map_sides(record)  # type: ignore[attr-defined]
    if kind == "dataset" and (side := _side(record, {})):
        facts["its images"] = _in_pixels(side) + (", or as `size` says" if _sizes(record) else "")
    if kind == "norm":
        aware = getattr(record, "composition_aware", False)
        facts["must know the composition of a batch"] = (
            "yes; `cilnorm run` sees to it, elsewhere call cilnorm.set_composition before each batch" if aware else "no"
        )
        if getattr(record, "needs_rows", False):
            facts["must know the task or label of every row"] = (
                "yes; `cilnorm run` sees to it, elsewhere see cilnorm.rows"
            )
        tune = getattr(record, "tune", {})
        if tune:
            facts["chosen on held-out images unless set"] = "; ".join(
                f"{option} among {', '.join(map(str, values))}" for option, values in tune.items()
            )
    for protocol in ("released", "pycil") if kind == "method" else ():
        own: Mapping[str, Any] = getattr(record.build, protocol, {})
        if own:
            facts[f"with --protocol {protocol}"] = ", ".join(f"{key} {_plain(value)}" for key, value in own.items())
    if kind == "method" and getattr(record.build, "exemplar_free", False):
        facts["without exemplars (memory 0)"] = "possible"
    return facts


def _sizes(record: Record) -> Any:
    """The option ``size`` of a data set, if it has one."""
    from cilnorm.settings.options import options_of

    return options_of("dataset", record.build).get("size")


def _side(record: Record, options: Mapping[str, Any]) -> int | None:
    """Side of a data set's images with these options, in pixels, if it is known."""
    known = getattr(_sizes(record), "default", None)
    side = options.get("size", known if isinstance(known, int) else getattr(record, "side", None))
    return side if isinstance(side, int) else None


def _in_pixels(side: int) -> str:
    return f"{side} x {side} pixels"


def _map_sides(record: Any) -> str:
    """Sides of the stages' maps, which tell stems apart; empty where the network can't be built without more."""
    import torch

    try:
        with torch.device("meta"), torch.no_grad():
            maps = record.build(torch.nn.BatchNorm2d).eval()(torch.zeros(1, 3, record.side, record.side))[1]
        return f"; sides of the stages' maps: {', '.join(str(each.shape[-1]) for each in maps)}"
    except Exception:  # whatever a plugin raises, or what it needs and is not installed
        return ""


def _show_preset(registry: Registry, settings: Settings, name: str) -> None:
    from cilnorm.settings.options import options_of
    from cilnorm.spec import SECTIONS, Spec, resolve
    from cilnorm.training.pixels import Augmentation

    resolve(name, registry, settings)  # says what is wrong with a stranger's
    values = settings.presets[name]
    print(f"preset {name}: {values.get('about', '')}")
    print(f"  distribution: {settings.owners['preset', name]}")
    side = _side(registry.datasets[values["dataset"]], values.get("dataset_options", {}))
    if side:
        given = Augmentation(**values.get("augmentation", {})).given((side, side))[0]
        print(f"  images: {_in_pixels(side)}; the network is given {_in_pixels(given)}")
    rows = []
    for key, value in values.items():
        part = key.removesuffix("_options")
        shelf = next((shelf for shelf in registry.shelves if shelf.kind == part != key), None)
        known = options_of(part, shelf[values[part]].build if shelf else SECTIONS.get(key, Spec))
        inner = value if isinstance(value, dict) else {key: value}
        for field, given in inner.items() if key != "about" else ():
            option = known.get(field)
            default = _default(option) if option else ""
            dotted = f"{part}.{field}" if isinstance(value, dict) else field
            rows.append((dotted, _plain(given), default, _meaning(option)))
    print_table("what it sets", ("key", "value", "default", "meaning"), rows)
    others = [
        (part, its_name, ", ".join(f"{key} {_plain(value)}" for key, value in by_preset[name].items()))
        for part, by_name in settings.own.items()
        for its_name, by_preset in by_name.items()
        if by_preset.get(name)
    ]
    if others:
        print_table("what it sets otherwise for a method or norm", ("part", "name", "values"), others)


def _show_grid(settings: Settings, name: str) -> None:
    from cilnorm.sweep.grid import read_grid

    grid = read_grid(name, settings)
    print(f"grid {name}: {grid.about}\n  distribution: {settings.owners['grid', name]}")
    rows = [
        (kind, label, ", ".join(f"{key} {_plain(value)}" for key, value in values.items() if value != label))
        for kind, axis in (("method", grid.methods), ("norm", grid.norms), ("both", {"all": grid.common}))
        for label, values in axis.items()
        if values
    ]
    print_table("its methods and norms", ("axis", "label", "values"), rows)


def _show_section(name: str, made: type) -> None:
    from cilnorm.settings.options import options_of
    from cilnorm.spec import SECTIONS

    print(f"{name}: {_first_line(made)}")
    example = "" if name == "spec" else f"{name}."
    own = [option for key, option in options_of("", made).items() if key not in SECTIONS and "_options" not in key]
    rows = [option_row(option) for option in own]
    print_table(f"options, as --set {example}NAME=VALUE", COLUMNS, rows)
    if name == "protocol":
        _show_protocols()


def _show_protocols() -> None:
    """The named sets of values."""
    from cilnorm.training.protocol import BESIDES, PROTOCOLS

    rows = []
    for name, values in PROTOCOLS.items():
        whole = {**values, **BESIDES.get(name, {})}
        rows.append((name, ", ".join(f"{key} {_plain(value)}" for key, value in whole.items()) or "the defaults"))
    print_table("named sets, as --protocol NAME", ("name", "what it sets"), rows)


def option_row(option: Option) -> tuple[str, ...]:
    """An option as a row below ``COLUMNS``."""
    return option.name, _default(option), _kind(option.hint), option.symbol, option.place, _meaning(option)


def _meaning(option: Option | None) -> str:
    return (option.meaning if option else "").replace("``", "`") or "(not described)"


def _default(option: Option) -> str:
    from cilnorm.settings.options import REQUIRED

    return "(must be given)" if option.default is REQUIRED else _plain(option.default)


def _plain(value: Any) -> str:
    """A value as ``--set`` takes it."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value)
    except TypeError:
        return type(value).__name__.lower()


def _kind(hint: Any) -> str:
    """What a type admits, for people."""
    names = {float: "number", int: "whole number", bool: "true, false", str: "text", types.NoneType: "null"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return ", ".join(map(_kind, arguments))
    if origin is tuple:
        several = arguments[-1] is Ellipsis
        return f"list of {_kind(arguments[0])}s" if several else f"{len(arguments)} {_kind(arguments[0])}s"
    return names.get(hint, "")


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]
