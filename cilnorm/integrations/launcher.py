"""What the launchers of PyCIL and Mammoth share: their command line, the checkout they run, and what they look for.

Nothing in a checkout is edited. A few functions of its modules are wrapped in this process, and its ``main.py`` runs.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from cilnorm.integrations.telling_hook import TellingHook, adds_to_loss
from cilnorm.norms import convert_norms, norm_factory
from cilnorm.values import SpecError, parsed

__all__ = ["Framework", "Launch", "parse_command"]


@dataclass(frozen=True)
class Framework:
    """A framework that is run from its checkout.

    Attributes:
        name: as its authors write it.
        commit: of the repository, for which the integration was written.
        marks: files that its checkout has.
        switches: options of the launcher that only this framework has, without dashes, and what they do.
        lacking: modules that may be missing, and the switch that does without.
    """

    name: str
    commit: str
    marks: tuple[str, ...]
    switches: dict[str, str] = field(default_factory=dict)
    lacking: dict[str | None, str] = field(default_factory=dict)

    def find(self, module: str, *names: str) -> Any:
        """A module of the checkout, which has these names; ``Class.method`` is one as well.

        Raises:
            SystemExit: it has not; the message has the commit.
        """
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            hint = f"; try --{self.lacking[error.name]}" if error.name in self.lacking else ""
            raise SystemExit(
                f"{self.name}'s {module} can't be imported: {error}; {self._written_for()}{hint}"
            ) from error
        for name in names:
            part: Any = found
            for step in name.split("."):
                part = getattr(part, step, None)
            if part is None:
                raise SystemExit(f"{self.name}'s {module} has no {name}; {self._written_for()}")
        return found

    def _written_for(self) -> str:
        return f"this integration was written for its commit {self.commit}"


@dataclass(frozen=True)
class Launch:
    """What one command asks for.

    Attributes:
        framework: that runs.
        checkout: its folder.
        norm: a name that ``cilnorm list`` shows.
        options: of the norm.
        arguments: of the framework's own command line.
        switches: those that were given.
    """

    framework: Framework
    checkout: Path
    norm: str
    options: dict[str, Any]
    arguments: list[str]
    switches: frozenset[str] = frozenset()

    def convert(self, network: nn.Module, hook: TellingHook) -> None:
        """Gives a network the norm, and lets the hook watch it."""
        convert_norms(network, self.norm, **self.options)
        hook.attach(network)

    def enter(self) -> None:
        """From here on the checkout's modules can be imported."""
        sys.path.insert(0, str(self.checkout))

    def run(self) -> None:
        """Runs the checkout's ``main.py`` with its own arguments."""
        main = self.checkout / "main.py"
        sys.argv = [str(main), *self.arguments]
        runpy.run_path(str(main), run_name="__main__")


def parse_command(framework: Framework, argv: Sequence[str] | None = None) -> Launch:
    """The command line of a launcher: its own options, ``--``, the framework's.

    Raises:
        SystemExit: a mistake in it, a norm that can't be used in the framework, or a folder that is no checkout.
    """
    module = f"cilnorm.integrations.{framework.name.lower()}"
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=f"{framework.name} with another norm.")
    parser.add_argument("--norm", required=True, help="a name that `cilnorm list` shows")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="an option of the norm")
    parser.add_argument("--checkout", type=Path, default=Path(), help=f"{framework.name}'s folder; default: this one")
    parser.set_defaults(switches=None)
    for switch, meaning in framework.switches.items():
        parser.add_argument(f"--{switch}", action="append_const", const=switch, dest="switches", help=meaning)
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    asked = parser.parse_args(words[:cut])
    checkout = asked.checkout.resolve()
    if missing := [mark for mark in framework.marks if not (checkout / mark).exists()]:
        parser.error(f"{checkout} is no checkout of {framework.name}: it has no {missing[0]}")
    options = {}
    for pair in asked.set:
        key, equals, value = pair.partition("=")
        if not equals:
            parser.error(f"--set takes OPTION=VALUE, not {pair}")
        try:
            options[key] = parsed(value, f"--set {pair}")
        except SpecError as error:
            parser.error(str(error))
    try:
        # Batches have any numbers of past rows here, and "auto" finds a balance for each.
        if "splits" in inspect.signature(norm_factory(asked.norm)).parameters:
            options.setdefault("splits", "auto")
        terms = adds_to_loss(asked.norm, options)
    except (LookupError, TypeError, ValueError) as error:
        parser.error(str(error.args[0] if error.args else error))
    if terms:
        parser.error(f"{asked.norm} adds {terms[0]} to the loss, and {framework.name}'s methods have no place for it")
    shown = ", ".join(f"{key}={value}" for key, value in options.items())
    print(f"cilnorm: {asked.norm} ({shown or 'no options'}) in {framework.name}, written for {framework.commit}")
    return Launch(framework, checkout, asked.norm, options, words[cut + 1 :], frozenset(asked.switches or ()))
