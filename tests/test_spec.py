"""From names and values, as people give them, to a frozen spec; and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from cilnorm.hookspecs import Norm, hookimpl
from cilnorm.method import Schedule
from cilnorm.registry import Registry, load
from cilnorm.spec import Settings, Spec, SpecError, from_mapping, read_settings, read_spec, resolve, to_mapping, to_yaml
from cilnorm.training.protocol import PROTOCOLS, RELEASED, Protocol
from cilnorm.values import coerced, parsed
from tests import fake
from tests.conftest import ROOT, TINY

Tiny = Callable[..., Spec]


def test_a_preset_is_resolved(tiny: Tiny) -> None:
    spec = tiny()
    assert (spec.method, spec.norm, spec.backbone, spec.dataset, spec.preset) == ("ft", "bn", "tiny", "blobs", "tiny")
    assert spec.rows == (12, 4)
    assert spec.schedule == Schedule(epochs=2, lr=0.05, momentum=0.9, milestones=(1,))
    assert spec.protocol == Protocol()


def test_aliases_are_resolved_to_names(tiny: Tiny) -> None:
    assert tiny(norm="batchnorm") == tiny()
    assert tiny(norm="batchnorm").norm == "bn"


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"seed": 3}, lambda spec: spec.seed == 3),
        ({"lr": 0.5}, lambda spec: spec.schedule.lr == 0.5),
        ({"schedule.momentum": 0.25}, lambda spec: spec.schedule.momentum == 0.25),
        ({"norm.momentum": 0.25}, lambda spec: spec.norm_options == {"momentum": 0.25}),
        ({"rows": "6:2"}, lambda spec: spec.rows == (6, 2)),
        ({"rows": [6, 2]}, lambda spec: spec.rows == (6, 2)),
        ({"classes": 4}, lambda spec: spec.classes == 4),
        ({"train_per_class": None}, lambda spec: spec.train_per_class is None),
        ({"crop": "resized"}, lambda spec: spec.augmentation.crop == "resized"),
        ({"lr": "1e-3"}, lambda spec: spec.schedule.lr == 1e-3),
        ({"clip": 3}, lambda spec: spec.schedule.clip == 3.0),
        ({"size": 12}, lambda spec: spec.dataset_options == {"size": 12}),
        ({"method": "two-phases", "strength": 2}, lambda spec: spec.method_options == {"strength": 2.0}),
        ({"norm": "tbbn", "splits": "exact"}, lambda spec: spec.norm_options == {"splits": "exact"}),
        ({"norm": "tbbn", "splits": 4}, lambda spec: spec.norm_options == {"splits": 4}),
    ],
)
def test_values_of_ones_own(asked: dict[str, Any], found: Callable[[Spec], bool], tiny: Tiny) -> None:
    assert found(tiny(**asked))
    assert tiny(**asked) != tiny() or asked == {"train_per_class": None}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"norm": "tbn"}, r"no norm called 'tbn'; did you mean 'tbbn'\? there are .*\bbn\b"),
        ({"method": "fft"}, r"no method called 'fft'; did you mean 'ft'\?"),
        ({"backbone": "rasnet32"}, r"no backbone called 'rasnet32'; did you mean 'resnet32'\?"),
        ({"dataset": "cifar"}, r"no dataset called 'cifar'; did you mean 'cifar10'\?"),
        ({"norm": 3}, "norm: expected a name, found 3"),
        (
            {"protocol": "releasd"},
            r"no protocol called 'releasd'; did you mean 'released'\? there are corrected, pycil, released",
        ),
        ({"epoch": 3}, r"protocol\.epoch: 3 is none of passes, cycle"),
        ({"epocs": 3}, r"no key called 'epocs'; did you mean 'epochs'\?"),
        ({"schedule.epocs": 3}, "no key called 'schedule.epocs'"),
        ({"momentum": 0.9}, "'momentum' could be schedule.momentum or norm.momentum; say which"),
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"epochs": 1.5}, r"schedule\.epochs: expected int, found 1\.5"),
        ({"epochs": True}, r"schedule\.epochs: expected int, found True"),
        ({"lr": "fast"}, r"schedule\.lr: expected float, found 'fast'"),
        ({"lr": float("nan")}, r"schedule\.lr: expected float, found nan"),
        ({"lr": 0}, "lr must be above 0"),
        ({"clip": -1}, "clip can't be negative"),
        ({"schedule.momentum": -0.1}, "momentum can't be negative"),
        ({"weight_decay": -0.1}, "weight_decay can't be negative"),
        ({"flip": 1}, r"augmentation\.flip: expected bool, found 1"),
        ({"crop": "centre"}, r"augmentation\.crop: 'centre' is none of none, random, resized"),
        ({"pad": -1}, "can't be negative"),
        ({"rows": "48"}, "rows: expected 2 values, found '48'"),
        ({"rows": "48:x"}, "rows: expected int, found 'x'"),
        ({"rows": "48:0"}, "rows 48:0: a mixed batch needs rows of both kinds"),
        ({"rows": "50:16", "protocol": "released"}, "rows 50:16: .* 16 does not divide 50"),
        ({"tasks": 0}, "tasks must be at least 1, not 0"),
        ({"tasks": 5, "classes": 4}, "4 classes can't be split into 5 tasks"),
        ({"first_classes": 0}, "first_classes must be at least 1, not 0"),
        ({"increment": 0}, "increment must be at least 1, not 0"),
        ({"task_classes": [2, 0]}, "task_classes: one number of classes a task, each at least 1"),
        ({"increment": 2, "tasks": 3}, "tasks and increment both say how classes are split; give one of them"),
        ({"first_classes": 2, "task_classes": [4, 2]}, "first_classes and task_classes both say"),
        ({"first_classes": 5, "tasks": 3, "classes": 6}, "a first task of 5 leaves 1 of 6 classes to 2 tasks"),
        ({"first_classes": 7, "increment": 2, "classes": 6}, "a first task of 7 classes, but 6 in all"),
        ({"task_classes": [4, 3], "classes": 6}, "task_classes are 7 in all, not 6; set classes=7 for fewer"),
        ({"increment": 3, "stop_after": 3, "classes": 6}, r"stop_after must be in 1 \.\. 2, the number of tasks"),
        ({"increment": 3, "stop_after": 0}, r"stop_after must be in 1 \.\. T, the number of tasks, not 0"),
        ({"memory": 3, "classes": 4}, "a memory of 3 can't hold one exemplar of each of 4 classes"),
        ({"memory": -1}, "memory and memory_per_class can't be negative"),
        ({"memory": 9, "memory_per_class": 2}, "memory and memory_per_class both say how many exemplars are kept"),
        ({"memory_per_class": 2, "herding": "reservoir"}, "herding: reservoir is one for all classes; give memory"),
        ({"classifier": "nme", "herding": "reservoir"}, "classifier: nme needs exemplars of every class"),
        ({"precise": "class-balanced", "herding": "reservoir"}, r"statistics\.precise needs exemplars of every class"),
        ({"memory": 0, "classifier": "nme"}, "classifier: nme needs exemplars, and memory is 0"),
        ({"memory_per_class": 0, "classifier": "nme"}, "classifier: nme needs exemplars, and memory is 0"),
        ({"train_per_class": 0}, "train_per_class must be at least 1, not 0"),
        ({"seed": -1}, r"^seed: a seed must be in \[0, 2\*\*32\), as NumPy wants it, not -1"),
        ({"class_order": -1}, "class_order: a seed must be in"),
        ({"class_order_seed": 2**32}, "class_order: a seed must be in"),
        ({"class_order": "3,1,3"}, "class_order: the label 3 stands there twice"),
        ({"class_order": []}, "class_order: a list of no labels"),
        ({"class_order": [0, -1]}, "class_order: -1 is no label"),
        ({"class_order": True}, "class_order: expected int, found True"),
        (
            {"class_order": "nowhere.txt"},
            r"class_order: 'nowhere\.txt' is neither a seed, nor a list such as 3,1,2, nor a",
        ),
        ({"class_order": "tests"}, "class_order: 'tests' is neither a seed"),
        ({"keep": "best"}, "keep: best needs held-out images"),
        ({"validation": 1}, "validation is a part"),
        ({"norm": "tbbn", "splits": "many"}, r"norm\.splits: 'many' is none of released, divisor, exact"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line(asked: dict[str, Any], message: str, tiny: Tiny) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        tiny(**asked)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_lists_what_there_is(registry: Registry) -> None:
    with pytest.raises(SpecError, match=r"no preset called 'cifar10'; did you mean 'cifar100'\? there are .*quick"):
        resolve("cifar10", registry)


def test_epochs_alone_take_the_milestones_along(tiny: Tiny) -> None:
    assert tiny(epochs=8).schedule.milestones == (4,)
    assert tiny(epochs=8, milestones=[7]).schedule.milestones == (7,)
    assert tiny(epochs=1).schedule.milestones == (1,)


@pytest.mark.parametrize("field", RELEASED)
def test_each_released_field_can_be_set_alone(field: str, tiny: Tiny) -> None:
    needs = {"validation": 0.1} if field == "keep" else {}
    spec = tiny(**{f"protocol.{field}": RELEASED[field]}, **needs)
    assert spec.protocol == dataclasses.replace(Protocol(), **{field: RELEASED[field]}, **needs)


def test_released_takes_the_methods_departures_along(tiny: Tiny) -> None:
    assert tiny(protocol="released").protocol == Protocol(**RELEASED)
    spec = tiny(protocol="released", method="two-phases")
    assert spec.protocol == Protocol(**RELEASED, current_rows="union", drop_last=True)
    assert spec.method_options == {"strength": 0.5}
    single = tiny(protocol="released", budget="floor")
    assert single.protocol == dataclasses.replace(Protocol(**RELEASED), budget="floor")


def test_corrected_takes_a_presets_protocol_back(registry: Registry) -> None:
    settings = Settings({"p": {**TINY, "protocol": "released"}}, {})
    assert resolve("p", registry, settings).protocol == Protocol(**PROTOCOLS["released"])
    assert resolve("p", registry, settings, protocol="corrected").protocol == Protocol()


def test_precedence_is_default_then_registry_yaml_then_the_users(registry: Registry) -> None:
    settings = Settings(
        {"tiny": {**TINY, "method": "two-phases"}}, {"method": {"two-phases": {"tiny": {"strength": 3.0}}}}
    )
    assert resolve("tiny", registry, Settings({"tiny": TINY}, {}), method="two-phases").method_options["strength"] == 1
    assert resolve("tiny", registry, settings).method_options["strength"] == 3
    assert resolve("tiny", registry, settings, strength=8).method_options["strength"] == 8


# The order of classes


@pytest.mark.parametrize(
    ("given", "order"),
    [(1993, 1993), ("1993", 1993), ("3,1,2", (3, 1, 2)), ("4,", (4,)), ([3, 1], (3, 1)), (None, None)],
)
def test_an_order_of_classes_may_be_a_seed_or_a_list(given: object, order: object, tiny: Tiny) -> None:
    assert tiny(class_order=given).class_order == order


@pytest.mark.parametrize("text", ["5 4\n3,2 1 0  # and no more\n", "[5, 4, 3, 2, 1, 0]"])
def test_an_order_in_a_file_is_stored_as_the_list(text: str, tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "order.txt").write_text(text)
    spec = tiny(class_order=str(tmp_path / "order.txt"))
    (tmp_path / "order.txt").unlink()
    (tmp_path / "spec.yaml").write_text(to_yaml(spec))
    assert read_spec(tmp_path / "spec.yaml", registry).class_order == (5, 4, 3, 2, 1, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"1 two 3", "'two' is no label"), (b"-1", "'-1' is no label"), (b"", "a list of no labels"),
     (b"\xff\xfe", "no text"), (b"1 " * 600_000, "is longer than 1024 KiB")],
)  # fmt: skip
def test_a_file_that_holds_no_order(content: bytes, message: str, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "order").write_bytes(content)
    with pytest.raises(SpecError, match=message) as caught:
        tiny(class_order=str(tmp_path / "order"))
    assert "\n" not in str(caught.value)


def test_specs_of_0_1_0_keep_their_key(registry: Registry, tmp_path: Path) -> None:
    """A checkpoint belongs to a key; these files and keys are what 0.1.0 wrote."""
    for path in sorted((ROOT / "tests" / "assets" / "specs-0.1.0").glob("*.yaml")):
        assert read_spec(path, registry).key == path.stem.rpartition("-")[2], path.stem
    tiny = {**TINY, "seed": 4}
    assert (
        from_mapping({**tiny, "class_order_seed": 4}, registry, None, {}).key
        == from_mapping(tiny, registry, None, {}).key
    )
    assert from_mapping({**tiny, "class_order_seed": 0}, registry, None, {}).class_order == 0


# Files


def test_a_spec_survives_its_file(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    spec = tiny(norm="tbbn", splits="exact", method="two-phases", protocol="released", classes=4, tasks=2, lr=1e-5)
    path = tmp_path / "spec.yaml"
    path.write_text(to_yaml(spec))
    assert read_spec(path, registry) == spec
    assert read_spec(path, registry).key == spec.key
    assert read_spec(path, registry, seed=5) == dataclasses.replace(spec, seed=5)
    assert yaml.safe_load(to_yaml(spec)) == to_mapping(spec)


@pytest.mark.parametrize("seed", [{"seed": 1}, {"lr": 0.06}, {"norm": "tbbn"}, {"norm.eps": 1e-3}, {"memory": 25}])
def test_the_key_tells_specs_apart(seed: dict[str, Any], tiny: Tiny) -> None:
    assert tiny(**seed).key != tiny().key


def test_the_key_does_not_care_for_the_presets_name(tiny: Tiny) -> None:
    assert dataclasses.replace(tiny(), preset="another").key == tiny().key


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2", "expected names with values, found list"),
        ("", "expected names with values, found NoneType"),
        ("1: 2", "expected names with values, found dict"),
        ("method: [", "no YAML that can be read"),
        ("!!python/object/apply:os.system ['true']", "no YAML that can be read"),
        ("method: ft\nnrm: bn", r"no field of a spec called 'nrm'; did you mean 'norm'\?"),
        ("norm: bn", "method: expected a name, found None"),
        (yaml.safe_dump({**TINY, "schedule": 3}), "schedule: expected names with values, found 3"),
        (yaml.safe_dump({**TINY, "schedule": {"lrr": 3}}), r"no key called 'schedule\.lrr'"),
    ],
)
def test_a_file_that_is_no_spec(text: str, message: str, registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=message) as caught:
        read_spec(path, registry)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_no_text(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="No such file"):
        read_spec(tmp_path / "none.yaml", registry)
    with pytest.raises(SpecError, match="Is a directory"):
        read_spec(tmp_path, registry)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="no text"):
        read_spec(tmp_path / "binary", registry)


def test_another_part_drops_the_options_of_the_one_it_replaces(registry: Registry) -> None:
    assert resolve("quick", registry).dataset_options == {"size": 16, "train_per_class": 100, "test_per_class": 40}
    assert resolve("quick", registry, dataset="cifar100").dataset_options == {}
    assert resolve("quick", registry, dataset="textures").dataset_options["test_per_class"] == 40


def test_annotations_that_cannot_be_resolved_leave_values_as_they_are(registry: Registry) -> None:
    def build(num_features: int, *, eps: float = 1e-5, width: Missing = 3) -> None:  # type: ignore[name-defined]  # noqa: F821
        raise NotImplementedError

    class Stranger:
        @hookimpl
        def cilnorm_norms(self) -> list[Norm]:
            return [Norm("strange", build)]

    shelves = load(extra=[fake, Stranger()], strict=True)
    assert resolve("quick", shelves, norm="strange", width=4).norm_options == {"width": 4}


def test_presets_extend_earlier_ones(tmp_path: Path) -> None:
    path = tmp_path / "registry.yaml"
    path.write_text("presets:\n  a: {norm: bn, schedule: {lr: 1, epochs: 2}}\n  b: {extends: a, schedule: {lr: 3}}")
    assert read_settings(path).presets["b"] == {"norm": "bn", "schedule": {"lr": 3, "epochs": 2}}
    path.write_text("presets:\n  b: {extends: a}")
    with pytest.raises(SpecError, match="no earlier preset called 'a'; there are none"):
        read_settings(path)
    path.write_text("preset: {}")
    with pytest.raises(SpecError, match=r"no section of registry\.yaml called 'preset'; did you mean 'presets'"):
        read_settings(path)


def test_a_preset_inherits_what_methods_set_for_the_one_it_extends(tmp_path: Path) -> None:
    path = tmp_path / "registry.yaml"
    presets = "presets: {a: {}, b: {extends: a}, c: {extends: b}, d: {}}"
    path.write_text(f"{presets}\nmethods: {{lucir: {{a: {{rank: 2, rank_k: 3}}, b: {{rank: 4}}}}}}")
    own = {"rank": 4, "rank_k": 3}
    assert read_settings(path).own["method"]["lucir"] == {"a": {"rank": 2, "rank_k": 3}, "b": own, "c": own}


# Values


@example("0\x1f")
@example("--3")
@example("1" * 5000)
@given(st.integers() | st.booleans() | st.none() | st.text() | st.floats() | st.lists(st.integers()))
def test_a_value_fits_its_type_or_is_refused(value: object) -> None:
    for hint in (int, float, bool, str, tuple[int, int], tuple[int, ...], int | None):
        try:
            made = coerced(value, hint, "key")
        except SpecError:
            continue
        if hint in (int, float, bool, str):
            assert type(made) is hint
        elif hint == int | None:
            assert made is None or type(made) is int
        else:
            assert isinstance(made, tuple)
            assert all(type(item) is int for item in made)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("48:16", "48:16"), ("12", 12), ("-3", -3), ("+3", 3), ("0", 0), ("010", "010"), ("1_000", 1000), ("0.5", 0.5),
        ("1e-3", "1e-3"), ("null", None), ("true", True), ("[1, 2]", [1, 2]), ("bn", "bn"), ("", None),
    ],
)  # fmt: skip
def test_what_people_type(text: str, value: object) -> None:
    assert parsed(text, "here") == value
    assert type(parsed(text, "here")) is type(value)


@pytest.mark.parametrize("text", ["[1", "2024-99-99", "!!python/name:os.system", "[" * 500])
def test_what_can_not_be_read(text: str) -> None:
    with pytest.raises(SpecError, match=r"^here: no YAML that can be read: "):
        parsed(text, "here")


def test_options_of_a_factory_without_annotations_are_taken_as_they_are(tiny: Tiny) -> None:
    def make(num_features, strength=1, device=None):
        raise AssertionError

    @hookimpl
    def cilnorm_norms() -> list[Norm]:
        return [Norm("bare", make)]

    plugin = SimpleNamespace(__name__="bare", cilnorm_norms=cilnorm_norms)
    registry = load(extra=[fake, plugin], strict=True)
    spec = from_mapping({**TINY, "norm": "bare"}, registry, None, {"norm.strength": [1, "a"]})
    assert spec.norm_options == {"strength": [1, "a"]}
    with pytest.raises(SpecError, match=r"no key called 'norm\.device'"):
        from_mapping({**TINY, "norm": "bare"}, registry, None, {"norm.device": "cpu"})


# Tasks of other sizes


def test_whoever_says_how_large_tasks_are_has_the_presets_word_for_it_replaced(registry: Registry) -> None:
    stepped = Settings({"b50": {**TINY, "first_classes": 4, "increment": 1}}, {})
    assert resolve("b50", registry, stepped).sizes(6) == (4, 1, 1)
    assert resolve("b50", registry, stepped, tasks=2).sizes(6) == (4, 2)
    assert resolve("b50", registry, stepped, first_classes=2).sizes(6) == (2, 1, 1, 1, 1)
    assert resolve("b50", registry, stepped, task_classes=[1, 5]).sizes(6) == (1, 5)
    assert resolve("b50", registry, stepped, task_classes="1,5").sizes(6) == (1, 5)
    listed = Settings({"listed": {**TINY, "task_classes": [1, 5]}}, {})
    assert resolve("listed", registry, listed, tasks=3).sizes(6) == (2, 2, 2)
    assert resolve("listed", registry, listed, increment=3).sizes(6) == (3, 3)


def test_the_number_of_tasks_decides_nothing_where_an_increment_does(tiny: Tiny) -> None:
    by_increment = dataclasses.replace(tiny(increment=2), tasks=7)
    assert by_increment.key == tiny(increment=2).key != tiny().key
    assert dataclasses.replace(tiny(first_classes=2), tasks=4).key != tiny(first_classes=2).key


def test_an_increment_is_checked_once_the_classes_are_counted(tiny: Tiny) -> None:
    with pytest.raises(SpecError, match=r"stop_after must be in 1 \.\. 2, the number of tasks, not 3"):
        tiny(increment=3, stop_after=3).sizes(6)


def test_a_memory_in_all_takes_the_place_of_one_of_each_class(registry: Registry) -> None:
    preset = Settings({"b50": {**TINY, "memory_per_class": 3}}, {})
    assert [resolve("b50", registry, preset).exemplars(seen) for seen in (2, 4, 6)] == [3, 3, 3]
    assert [resolve("b50", registry, preset, memory=24).exemplars(seen) for seen in (2, 4, 6)] == [12, 6, 4]
    kept = resolve("b50", registry, preset)
    assert kept.key == dataclasses.replace(kept, memory=7).key != resolve("b50", registry, preset, memory=24).key


def test_the_first_tasks_own_schedule_moves_along_with_the_epochs(registry: Registry) -> None:
    schedule = {"epochs": 170, "milestones": [80, 120], "first_epochs": 200, "first_milestones": [60, 120, 170]}
    preset = Settings({"pycil": {**TINY, "schedule": schedule}}, {})
    short = resolve("pycil", registry, preset, epochs=17).schedule
    assert (short.epochs, short.milestones) == (17, (8, 12))
    assert (short.first_epochs, short.first_milestones) == (20, (6, 12, 17))
    fixed = resolve("pycil", registry, preset, epochs=17, first_epochs=3, first_milestones=[]).schedule
    assert (fixed.first_epochs, fixed.first_milestones) == (3, ())


def test_pycils_protocol_is_a_set_of_fields_each_of_which_can_be_set_alone(registry: Registry) -> None:
    spec = resolve("cifar100", registry, protocol="pycil")
    assert spec.protocol == Protocol(batches="shuffled", mirrored_means=False, head_start="kaiming")
    assert (spec.rows, spec.class_order) == ((96, 32), 1993)
    own = resolve("cifar100", registry, protocol="pycil", batches="stratified", rows="48:16", class_order=3)
    assert own.protocol == Protocol(mirrored_means=False, head_start="kaiming")
    assert (own.rows, own.class_order) == ((48, 16), 3)
    assert resolve("cifar100", registry, batches="shuffled").protocol == Protocol(batches="shuffled")
    whole = resolve("cifar100-pycil", registry)
    assert whole.protocol == spec.protocol
    assert (whole.rows, whole.class_order, whole.backbone) == ((96, 32), 1993, "resnet32-a")
    first, later = whole.schedule.in_task(0), resolve("cifar100-pycil", registry, method="lucir").schedule.in_task(1)
    assert (first.epochs, first.milestones, first.weight_decay) == (200, (60, 120, 170), 5e-4)
    assert (later.epochs, later.milestones, later.weight_decay, later.momentum) == (170, (80, 120), 2e-4, 0.9)


def test_pycils_protocol_brings_what_its_code_of_the_method_does(registry: Registry) -> None:
    wa = resolve("cifar100", registry, method="wa", protocol="pycil").method_options
    assert (wa["bias"], wa["non_negative"]) == (True, False)
    assert resolve("cifar100", registry, method="der", protocol="pycil").method_options["balance"] == "align"
    assert resolve("cifar100", registry, method="der").method_options["balance"] == "retrain"
    for method in ("wa", "der"):
        spec = resolve("cifar100-pycil", registry, method=method)
        assert spec.method_options == resolve("cifar100", registry, method=method, protocol="pycil").method_options


@pytest.mark.parametrize("number", [1, 2, 3])
def test_orders_that_papers_use_have_names(number: int, registry: Registry) -> None:
    order = resolve("cifar100", registry, class_order=f"podnet-{number}").class_order
    assert isinstance(order, tuple)
    assert sorted(order) == list(range(100))
    assert order[:4] == {1: (87, 0, 52, 58), 2: (58, 30, 93, 69), 3: (71, 54, 45, 32)}[number]
    assert resolve("cifar100", registry, class_order=f"PODNet-{number}").class_order == order
