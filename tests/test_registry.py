"""The door: healthy plugins on their shelves, sick ones reported, none taking others down."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from cilnorm import registry
from cilnorm.hookspecs import API_VERSION, Norm, hookimpl
from cilnorm.registry import HOOKS, PluginError, Registry, Shelf, UnknownName, load, nearest
from tests.strangers import distribute, norm, offers

pytestmark = pytest.mark.slow

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts distributions on the path; forgets their modules afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda name, modules, entries=None: distribute(tmp_path, name, modules, entries)
    for module in set(sys.modules) - before:
        if str(getattr(sys.modules[module], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[module]


def state_of(registry: Registry, entry: str, distribution: str) -> str:
    [found] = [plugin for plugin in registry.plugins if (plugin.name, plugin.distribution) == (entry, distribution)]
    return found.error


def offering(*records: object, hook: str = "cilnorm_norms") -> SimpleNamespace:
    """A plugin object that returns these records."""

    def answer() -> list[object]:
        return list(records)

    answer.__name__ = hook
    return SimpleNamespace(__name__="of-test", **{hook: hookimpl(answer)})


# What is installed

FIRST = ("bn", "ft", "resnet32", "cifar100", "csv")


def test_every_installed_plugin_is_healthy() -> None:
    found = load(strict=True)
    assert not found.failed
    assert all(shelf.sources[name].startswith("cilnorm ") for shelf, name in zip(found.shelves, FIRST, strict=True))
    for shelf in found.shelves:
        assert shelf, f"no {shelf.kind}s"
        assert set(shelf.sources) == set(shelf)


def test_metadata_is_not_parsed_for_every_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    parse, parsed = Distribution.metadata.fget, []

    def counted(distribution: Distribution) -> object:
        parsed.append(parse(distribution))
        return parsed[-1]

    monkeypatch.setattr(Distribution, "metadata", property(counted))
    load()
    assert [each["Name"] for each in parsed].count("cilnorm") < 5  # of more than forty


def test_every_hook_has_a_shelf() -> None:
    from cilnorm import hookspecs

    specified = {name for name in vars(hookspecs) if name.startswith("cilnorm_")}
    assert specified == {*HOOKS, registry.OF_SETTINGS}
    assert [shelf.kind for shelf in load().shelves] == [kind for kind, _ in HOOKS.values()]


def test_aliases_find_a_record_and_iteration_shows_it_once() -> None:
    norms = load().norms
    assert norms["batchnorm"] is norms["bn"]
    assert "batchnorm" in norms
    assert "batchnorm" not in list(norms)
    assert len(norms) == len(list(norms))


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(UnknownName) as caught:
        load().norms["tbn"]
    assert str(caught.value).startswith("no norm called 'tbn'; did you mean 'tbbn'? there are ")
    assert str(caught.value).endswith(", ".join(sorted(load().norms)))


def test_nearest_without_anything_near() -> None:
    assert nearest("norm", "xyz", ["bn", "cn"]) == "no norm called 'xyz'; there are bn, cn"
    assert nearest("norm", "xyz", []) == "no norm called 'xyz'; there are none"
    with pytest.raises(UnknownName, match="there are none"):
        Shelf[Norm]("norm")["bn"]


def test_without_leaves_an_entry_point_out() -> None:
    found = load(without=["norms.task_balanced"])
    assert "tbbn" not in found.norms
    assert "norms.task_balanced" not in {plugin.name for plugin in found.plugins}
    assert "tbbn" in load().norms


def test_an_extra_plugin_stands_beside_the_installed_ones() -> None:
    found = load(extra=[offering(Norm("mine", nn.BatchNorm2d))], strict=True)
    assert found.norms.sources["mine"] == "(extra)"
    assert "bn" in found.norms


# Strangers, through the metadata that an installer writes


def test_a_strangers_norm_is_on_the_shelf(install: Install) -> None:
    install("stranger", {"stranger_norm": norm("theirs")})
    found = load(strict=True)
    assert found.norms["theirs"].build is nn.BatchNorm2d
    assert found.norms.sources["theirs"] == "stranger 1.0"


HEALTHY = norm("x")
SICK = {
    "raises": ("raise RuntimeError('first line\\nno licence found')", "no licence found"),
    "exits": ("raise SystemExit('bye')", "SystemExit: bye"),
    "ends": ("class End(BaseException): ...\nraise End('no more')", "End: no more"),
    "exits_generators": ("raise GeneratorExit", "GeneratorExit"),
    "hook_exits": (offers("exit(0)"), "SystemExit: 0"),
    "says_nothing": ("class E(Exception):\n def __str__(me): raise E\nraise E", "E: its message can't be printed"),
    "lacks_a_module": ("import no_such_module_anywhere", "No module named 'no_such_module_anywhere'"),
    "does_not_parse": ("def (:", "SyntaxError"),
    "wrong_hook": (HEALTHY.replace("cilnorm_norms", "cilnorm_nroms"), "unknown hook 'cilnorm_nroms'"),
    "wrong_signature": (HEALTHY.replace("norms()", "norms(size)"), "{'size'}"),
    "old_api": ("api_version = 0\n" + HEALTHY, f"api_version 0; this cilnorm has {API_VERSION}"),
    "no_hook": ("answer = 42", "offers nothing; it needs one of the hooks cilnorm_norms"),
    "hook_raises": (offers("1 / 0"), "division by zero"),
    "nothing": (offers("None"), "offers nothing"),
    "no_list": (offers("Norm('x', nn.BatchNorm2d)"), "not iterable"),
    "no_record": (offers("['bn']"), "'bn', which is no Norm record"),
    "two_lines": (offers("[nn.Sequential(nn.ReLU())]"), "which is no Norm record"),
    "taken_name": (norm("bn"), "the norm 'bn' is already there, from cilnorm "),
    "taken_alias": (norm("batchnorm"), "the norm 'batchnorm' is already there, from cilnorm "),
    "path": (norm("../../etc/passwd"), "'../../etc/passwd' is no name for a norm"),
    "upper_case": (norm("BN"), "'BN' is no name for a norm"),
    "no_name": (norm(""), "'' is no name for a norm"),
    "twice": (offers("2 * [Norm('x', nn.BatchNorm2d)]"), "the norm 'x' is offered twice"),
    "bare_alias": (offers("[Norm('x', nn.BatchNorm2d, '', 'xyz')]"), "a tuple of aliases"),
    "unbuildable": (offers("[Norm('x', None)]"), "a build that can be called"),
}


@pytest.mark.parametrize("case", SICK)
def test_a_sick_plugin_is_reported_and_takes_nobody_down(case: str, install: Install) -> None:
    source, reason = SICK[case]
    install("sick", {f"sick_{case}": source})
    install("healthy", {f"healthy_{case}": norm("theirs")})
    found = load()
    error = state_of(found, f"sick_{case}", "sick 1.0")
    assert reason in error
    assert "\n" not in error
    assert [plugin.distribution for plugin in found.failed] == ["sick 1.0"]
    assert found.norms.sources["theirs"] == "healthy 1.0"
    assert found.norms.sources["bn"].startswith("cilnorm ")
    with pytest.raises(PluginError, match=rf"^plugin 'sick_{case}' of sick 1\.0: "):
        load(strict=True)


def test_a_plugin_that_hangs_is_named_and_ctrl_c_still_stops(
    install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "SLOW", 0.05)
    install("slow", {"slow_one": "import time\ntime.sleep(0.5)\nraise KeyboardInterrupt"})
    with pytest.raises(KeyboardInterrupt):
        load()
    assert capsys.readouterr().err == "cilnorm: still importing the plugin 'slow_one' of slow 1.0 after 0.05 s\n"


def test_an_entry_point_that_names_nothing(install: Install) -> None:
    install("sick", {}, {"gone": "nowhere_to_be_found", "odd": "not a module !"})
    found = load()
    assert "nowhere_to_be_found" in state_of(found, "gone", "sick 1.0")
    assert state_of(found, "odd", "sick 1.0")


def test_two_distributions_with_one_entry_point_name_are_both_refused(install: Install) -> None:
    install("one", {"one_norm": norm("first")}, {"same": "one_norm"})
    install("two", {"two_norm": norm("second")}, {"same": "two_norm"})
    found = load()
    for owner in ("one 1.0", "two 1.0"):
        assert state_of(found, "same", owner) == "entry point 'same' is declared by one 1.0 and by two 1.0; rename one"
    assert not {"first", "second"} & set(found.norms)


def test_our_own_entry_points_can_not_be_pushed_out(install: Install) -> None:
    install("aaa", {"pushy": norm("pushy")}, {"norms.batch": "pushy"})
    found = load()
    assert "declared by aaa 1.0 and by cilnorm" in state_of(found, "norms.batch", "aaa 1.0")
    assert found.norms.sources["bn"].startswith("cilnorm ")


def test_of_two_strangers_with_one_name_the_second_is_refused(install: Install) -> None:
    install("one", {"one_norm": norm("same")})
    install("two", {"two_norm": norm("same")})
    found = load()
    assert found.norms.sources["same"] == "one 1.0"
    assert state_of(found, "two_norm", "two 1.0") == "the norm 'same' is already there, from one 1.0"


def test_one_name_on_two_shelves_is_fine(install: Install) -> None:
    from cilnorm.hookspecs import Backbone

    plugin = offering(Backbone("bn", nn.Identity), hook="cilnorm_backbones")
    assert load(extra=[plugin], strict=True).backbones["bn"].build is nn.Identity
