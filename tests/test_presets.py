"""Presets and grids that strangers bring: they only add, their owners are named, and a run outlives them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cilnorm import registry as registries
from cilnorm.api import plan_table
from cilnorm.cli.app import app
from cilnorm.experiment import runner
from cilnorm.experiment.runner import resume, run
from cilnorm.hookspecs import Method as MethodRecord
from cilnorm.hookspecs import SettingsFile, hookimpl
from cilnorm.presets import read_sections, shipped
from cilnorm.registry import OF_SETTINGS, PluginError, Registry, load
from cilnorm.spec import SpecError, read_settings, resolve
from cilnorm.sweep.grid import read_grid
from cilnorm.testing import Broken, check_settings
from cilnorm.testing.settings_checks import settings_checks
from tests import fake
from tests.conftest import TINY
from tests.strangers import distribute, norm, settings

pytestmark = pytest.mark.slow

Bring = Callable[..., Registry]
THEIRS: dict[str, Any] = {
    "presets": {
        "theirs": {"about": "tiny", **TINY},
        "theirs-long": {"about": "tiny, for long", "extends": "theirs", "schedule": {"epochs": 3}},
        "theirs-quick": {"about": "fewer tasks", "extends": "quick", "tasks": 4},
    },
    "methods": {"lucir": {"theirs": {"less_forget": 7}}},
    "norms": {"gn": {"theirs": {"channels_per_group": 4, "schedule.lr": 0.05}}},
    "grids": {"theirs": {"about": "two norms", "methods": ["ft"], "norms": ["bn", "tbbn"]}},
}


class Brings:
    """A stranger's plugin with a file of settings, and methods if any."""

    def __init__(self, path: Path, *methods: str) -> None:
        self.__name__, self.path, self.methods = path.stem, path, methods

    @hookimpl
    def cilnorm_settings(self) -> list[SettingsFile]:
        return [SettingsFile(self.path)]

    @hookimpl
    def cilnorm_methods(self) -> list[MethodRecord]:
        return [MethodRecord(name, fake.TwoPhases) for name in self.methods]


@pytest.fixture
def brings(tmp_path: Path) -> Callable[..., Brings]:
    def make(content: Any, *methods: str, name: str = "theirs") -> Brings:
        path = tmp_path / f"{name}.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return Brings(path, *methods)

    return make


@pytest.fixture
def bring(brings: Callable[..., Brings]) -> Bring:
    return lambda content, *methods, strict=True: load(extra=[fake, brings(content, *methods)], strict=strict)


def test_theirs_stand_beside_ours(bring: Bring) -> None:
    registry = bring(THEIRS)
    found, ours = read_settings(registry=registry), read_settings()
    assert list(found.presets) == [*ours.presets, "theirs", "theirs-long", "theirs-quick"]
    assert list(found.grids) == [*ours.grids, "theirs"]
    assert {key: found.presets[key] for key in ours.presets} == ours.presets
    assert found.owners["preset", "theirs"] == found.owners["grid", "theirs"] == "(extra)"
    assert found.owners["preset", "quick"].startswith("cilnorm ")
    [plugin] = [plugin for plugin in registry.plugins if plugin.name == "theirs"]
    assert plugin.offers[-1] == ("grid", "theirs")
    assert ("preset", "theirs-long") in plugin.offers


def test_they_resolve_with_what_methods_change(bring: Bring) -> None:
    registry = bring(THEIRS)
    assert resolve("theirs-long", registry).schedule.epochs == 3
    for preset, forget in (("theirs", 7), ("theirs-long", 7), ("theirs-quick", 5)):
        assert resolve(preset, registry, method="lucir").method_options["less_forget"] == forget
        assert resolve(preset, registry, norm="gn").schedule.lr == (0.2 if preset == "theirs-quick" else 0.05)
    assert resolve("theirs", registry, norm="gn").norm_options == {"channels_per_group": 4}
    assert resolve("theirs", registry).norm_options == {}
    assert resolve("theirs", registry, method="icarl").classifier == "nme"  # as ours sets it in every preset
    cells = read_grid("theirs", read_settings(registry=registry)).cells(
        "theirs", (0,), {}, registry, read_settings(registry=registry)
    )
    assert [cell.spec.norm for cell in cells] == ["bn", "tbbn"]


def test_a_method_of_their_own_may_have_values_with_our_presets(bring: Bring) -> None:
    content = {"methods": {"mine": {"quick": {"strength": 2.0}, "every": {"schedule.lr": 0.3}}}}
    registry = bring(content, "mine")
    assert resolve("quick", registry, method="mine").method_options["strength"] == 2.0
    assert resolve("quick", registry, method="mine").schedule.lr == 0.3
    assert resolve("numerals", registry, method="mine").schedule.lr == 0.3


HOME = shipped().owner
DOUBLINGS = "".join(f"b{n + 1}: &b{n + 1} [*b{n}, *b{n}]\n" for n in range(40))
REFUSED: dict[str, tuple[Any, str]] = {
    "our preset": (
        {"presets": {"quick": {"extends": "numerals"}}},
        f"the preset 'quick' of (extra) is already there, from {HOME}",
    ),
    "our grid": ({"grids": {"norms": {}}}, f"the grid 'norms' of (extra) is already there, from {HOME}"),
    "our pair": (
        {"methods": {"lucir": {"quick": {"rank": 2}}}},
        f"methods.lucir.quick: the method is from {HOME}, the preset not from (extra); add a preset that extends it",
    ),
    "our method": ({"methods": {"lucir": {"every": {"rank": 2}}}}, "methods.lucir.every: the method is from"),
    "our norm": (
        {"norms": {"adab2n": {"numerals": {"strength": 2}}}},
        f"norms.adab2n.numerals: the norm is from {HOME}, the preset not from (extra)",
    ),
    "no norm": ({"norms": {"tbn": {"quick": {}}}}, "no norm called 'tbn'; did you mean 'tbbn'?"),
    "no method": ({"methods": {"lucri": {"quick": {}}}}, "no method called 'lucri'; did you mean 'lucir'?"),
    "no preset": ({"methods": {"lucir": {"quik": {}}}}, "no preset of its own or of cilnorm called 'quik'"),
    "no base": ({"presets": {"a": {"extends": "quik"}}}, "preset a extends 'quik': no earlier preset called 'quik'"),
    "a later base": (
        {"presets": {"a": {"extends": "b"}, "b": {"extends": "quick"}}},
        "no earlier preset called 'b'",
    ),
    "no parts": ({"presets": {"a": {"method": "ft", "norm": "bn", "backbone": "tiny"}}}, "preset a has no dataset"),
    "a path": ({"presets": {"../a": {"extends": "quick"}}}, "'../a' is no name for a preset"),
    "a reserved name": ({"presets": {"every": {"extends": "quick"}}}, "'every' is no name for a preset"),
    "other sections": ({"preset": {}}, "no section of registry.yaml called 'preset'; did you mean 'presets'?"),
    "no names": ("[1, 2]", "theirs.yaml: expected names with values, found list"),
    "no YAML": ("presets: [", "theirs.yaml: no YAML that can be read"),
    "a bomb": ("b0: &b0 [1, 1]\n" + DOUBLINGS, "its aliases make too much of it"),
    "brackets": ("presets: " + "[" * 300, "more than 200 brackets open"),
    "too long": ("presets: {}\n#" + "x" * (1 << 18), "longer than 256 KiB"),
    "an object": ("presets: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_only_add_is_refused_and_the_rest_goes_on(case: str, bring: Bring) -> None:
    content, said = REFUSED[case]
    registry = bring(content, strict=False)
    [failed] = registry.failed
    assert said in failed.error
    assert "\n" not in failed.error
    assert registry.settings == (shipped(),)
    assert read_settings(registry=registry) == read_settings()
    assert "tiny" in registry.backbones
    with pytest.raises(PluginError, match=r"^plugin 'theirs' of \(extra\): "):
        bring(content)


def test_of_two_strangers_the_second_is_refused_whole(brings: Callable[..., Brings]) -> None:
    second = {"presets": {"free": {"extends": "quick"}, "theirs": {"extends": "quick", "tasks": 2}}}
    registry = load(extra=[brings(THEIRS), brings(second, "mine", name="second")])
    [failed] = registry.failed
    assert (failed.name, failed.error) == ("second", "the preset 'theirs' of (extra) is already there, from (extra)")
    assert "free" not in read_settings(registry=registry).presets
    assert "mine" in registry.methods  # what is refused is the file
    assert failed.offers == (("method", "mine"),)


def test_a_file_that_is_not_there_or_no_file(tmp_path: Path) -> None:
    registry = load(extra=[Brings(tmp_path / "gone.yaml")])
    assert [plugin.error for plugin in registry.failed] == ["gone.yaml: No such file or directory"]

    def answer() -> list[object]:
        return ["settings.yaml"]

    answer.__name__ = OF_SETTINGS
    registry = load(extra=[SimpleNamespace(__name__="odd", **{OF_SETTINGS: hookimpl(answer)})])
    assert [plugin.error for plugin in registry.failed] == [
        "cilnorm_settings returned 'settings.yaml', which is no SettingsFile with a path"
    ]


# From the command line, as an installer would have put it there


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    place = tmp_path / "site"
    modules = {"bringing_settings": settings("theirs.yaml"), "bringing_norm": norm("their-norm")}
    distribute(place, "stranger", modules)
    content = {
        **THEIRS,
        "presets": {key: THEIRS["presets"][key] for key in ("theirs-quick",)},
        "methods": {},
        "norms": {},
    }
    (place / "theirs.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.syspath_prepend(str(place))
    yield place
    for module in modules:
        sys.modules.pop(module, None)


def cilnorm(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))


def test_list_names_the_owner_and_check_holds_it(site: Path) -> None:
    listed = cilnorm("list", "--strict")
    assert listed.exit_code == 0, listed.stderr
    lines = [line.split() for line in listed.stdout.splitlines()]
    assert ["theirs-quick", "fewer", "tasks", "stranger", "1.0"] in lines
    assert ["theirs", "two", "norms", "stranger", "1.0"] in lines
    checked = cilnorm("check", "stranger", "--quick", "--name", "theirs-quick", "--name", "theirs")
    assert checked.exit_code == 0, checked.stdout
    assert "ok      preset theirs-quick, resolves with every method" in checked.stdout
    assert "ok      grid theirs, every cell resolves" in checked.stdout


def test_strict_makes_a_taken_name_an_error(site: Path) -> None:
    (site / "theirs.yaml").write_text("presets: {quick: {extends: numerals}}")
    told = f"the preset 'quick' of stranger 1.0 is already there, from {HOME}"
    strict = cilnorm("list", "--strict")
    assert (strict.exit_code, strict.stderr) == (2, f"cilnorm: plugin 'bringing_settings' of stranger 1.0: {told}\n")
    lenient = cilnorm("list")
    assert lenient.exit_code == 0
    assert lenient.stderr == f"cilnorm: plugin 'bringing_settings' of stranger 1.0 left out: {told}\n"
    assert "their-norm" in lenient.stdout


@pytest.fixture
def shown(bring: Bring, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    registry = bring(THEIRS)
    monkeypatch.setattr(registries, "load", lambda strict=False: registry)
    return lambda *arguments: CliRunner(env={"COLUMNS": "200"}).invoke(app, list(map(str, arguments)))


def test_show_names_the_owner(shown: Callable[..., Any]) -> None:
    result = shown("show", "theirs")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("  distribution: (extra)\n") == 2  # of the preset, and of the grid of that name
    assert "preset theirs: tiny\n" in result.stdout
    assert "grid theirs: two norms\n" in result.stdout
    assert "less_forget 7" in result.stdout
    assert f"  distribution: {HOME}\n" in shown("show", "quick").stdout


def test_a_run_and_a_table_of_theirs(shown: Callable[..., Any], bring: Bring, tmp_path: Path) -> None:
    planned = shown("run", "--preset", "theirs", "--dry-run", "--device", "cpu")
    assert planned.exit_code == 0, planned.stderr
    assert yaml.safe_load(planned.stdout)["preset"] == "theirs"
    sweep = plan_table("theirs", "theirs", out=tmp_path / "table", registry=bring(THEIRS))
    assert [(job.spec.norm, job.spec.preset) for job in sweep.jobs] == [("bn", "theirs"), ("tbbn", "theirs")]
    with pytest.raises(SpecError, match="no grid called 'their'; did you mean 'theirs'"):
        plan_table("their", "theirs", registry=bring(THEIRS))


def test_a_run_goes_on_when_its_preset_is_gone(
    bring: Bring, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "draw_figures", lambda *_: None)

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "accuracy":
            raise RuntimeError("stop")

    theirs = bring(THEIRS)
    spec = resolve("theirs-long", theirs, method="two-phases", epochs=1)
    whole = run(spec, tmp_path / "whole", device="cpu", registry=theirs)
    with pytest.raises(RuntimeError, match="stop"):
        run(spec, tmp_path / "run", device="cpu", registry=theirs, watch=[stop])
    with pytest.raises(SpecError, match="no preset called 'theirs-long'"):
        resolve("theirs-long", registry)
    assert resume(tmp_path / "run", device="cpu", registry=registry).matrix == whole.matrix


# The kit


def test_the_kit_takes_what_is_whole(brings: Callable[..., Brings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registries, "load", lambda: load(extra=[fake], strict=True))
    check_settings(SettingsFile(brings(THEIRS).path))


def one_preset(**values: Any) -> dict[str, Any]:
    return {"presets": {"a": {"about": "x", "extends": "quick", **values}}}


def one_grid(**values: Any) -> dict[str, Any]:
    return {"grids": {"g": {"about": "x", "methods": ["ft"], "norms": ["bn"], **values}}}


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"presets": {"quick": {"extends": "numerals"}}}, "is already there, from cilnorm"),
    (one_preset(about=" "), "preset a, says what it is: it does not say what it is; give it a line"),
    (one_preset(epoch=3), "no run can be made of --preset a: no field of a spec called 'epoch'"),
    (one_preset(norm_options={"momentums": 1}), "preset a, resolves: no run can be made"),
    (
        {**one_preset(), "methods": {"lucir": {"a": {"less_forgot": 1}}}},
        "preset a, resolves with every method: no run can be made of --preset a --method lucir",
    ),
    (one_grid(norms=["tbn"]), "grid g, every cell resolves: its runs can't be made"),
    (one_grid(about=""), "grid g, says what it is"),
    (one_grid(methods=None), "methods: expected a list of names"),
]


@pytest.mark.parametrize(("content", "said"), BROKEN)
def test_the_kit_catches_what_is_not(content: dict[str, Any], said: str, brings: Callable[..., Brings]) -> None:
    with pytest.raises(Broken) as caught:
        check_settings(SettingsFile(brings(content).path))
    assert said in str(caught.value)
    assert "See docs/plugins.md" in str(caught.value)


def test_ours_pass_the_kit(registry: Registry) -> None:
    ours = read_sections(SettingsFile(Path(fake.__file__).parents[1] / "registry.yaml").path, "registry.yaml", HOME)
    checks = list(settings_checks(ours, load()))
    assert len(checks) > 3 * len(ours.presets)
    for check in checks:
        if check.promise != "resolves_with_every_method":  # test_registry_yaml.py does it
            check()
