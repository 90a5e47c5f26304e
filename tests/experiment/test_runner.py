"""A run from first task to last: what it leaves, that it repeats, that it goes on after any stop with the same bits."""

from __future__ import annotations

import csv
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cilnorm.experiment import evaluation, runner
from cilnorm.experiment.assembly import assemble
from cilnorm.experiment.runner import Result, RunStopped, resume, run
from cilnorm.metrics import as_matrix, summarise
from cilnorm.registry import Registry
from cilnorm.spec import Spec, SpecError, read_spec, resolve
from cilnorm.storage.accuracy_files import read_confusion
from cilnorm.storage.checkpoint import CheckpointError
from cilnorm.storage.run_folder import FolderError
from cilnorm.storage.tensor_file import read_tensor_file, tensor_file
from cilnorm.training.protocol import class_order

pytestmark = pytest.mark.slow

Tiny = Callable[..., Spec]
Event = dict[str, Any]
CPU = {"device": "cpu"}


class Power(RuntimeError):
    """Fails in the middle of a run."""


def failing_at(kind: str, number: int) -> Callable[[Event], None]:
    """A watcher that raises at the ``number``-th event of a kind."""
    met = 0

    def watch(event: Event) -> None:
        nonlocal met
        met += event["event"] == kind
        if event["event"] == kind and met == number:
            raise Power(f"{kind} {number}")

    return watch


def events(folder: Path, kind: str) -> list[Event]:
    """The events of a kind, all of them."""
    told = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in told if event["event"] == kind]


def bits(folder: Path) -> dict[str, Any]:
    """All of a run that must repeat to the bit."""
    final = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    return {
        "accuracy": (folder / "accuracy.csv").read_text(),
        "confusion": (folder / "confusion.csv").read_text(),
        "losses": [(e["task"], e["phase"], e["epoch"], e["lr"], e["terms"]) for e in events(folder, "epoch")],
        "weights": {name: tensor.tolist() for name, tensor in final["net"].items()},
        "memory": [kept.tolist() for kept in final["memory"]],
        "steps": json.loads((folder / "summary.json").read_text())["steps"],
    }


# What a run leaves


def test_a_run_leaves_all_that_it_should(figures: None, finished: Result, tiny: Tiny, registry: Registry) -> None:
    folder = finished.folder
    kept = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert kept == {
        "spec.yaml", "environment.json", "events.jsonl", "accuracy.csv", "confusion.csv", "summary.json",
        "checkpoints/last.pt", "checkpoints/previous.pt",
        "figures/accuracy.pdf", "figures/accuracy.png", "figures/matrix.pdf", "figures/matrix.png",
        "figures/classes.pdf", "figures/classes.png",
    }  # fmt: skip
    assert read_spec(folder / "spec.yaml", registry) == tiny()
    with open(folder / "accuracy.csv") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["after_task", "task_1", "task_2", "task_3"]
    assert [[float(cell) for cell in row[1:] if cell] for row in rows[1:]] == finished.matrix
    assert [len(row) for row in finished.matrix] == [1, 2, 3]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == finished.summary
    assert summary["state"] == "finished"
    assert {key: summary[key] for key in summarise(as_matrix(finished.matrix))} == summarise(as_matrix(finished.matrix))
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert environment["device"] == "cpu"
    assert environment["dataset_sha256"] == "of-blobs"
    assert "(extra)" in environment["plugins"]


def test_a_run_draws_no_figures_where_none_are_wanted(
    figures: None, tiny: Tiny, registry: Registry, tmp_path: Path
) -> None:
    spec, where = tiny(tasks=2, classes=4, epochs=1), {"registry": registry, "figures": False, **CPU}
    drawn = [run(spec, tmp_path / "whole", **where).folder]
    with pytest.raises(Power):
        run(spec, tmp_path / "cut", watch=[failing_at("accuracy", 1)], **where)
    drawn.append(resume(tmp_path / "cut", **where).folder)
    assert not [path for folder in drawn for path in (folder / "figures").iterdir()]


def test_the_confusion_of_tasks_agrees_with_the_accuracies(finished: Result) -> None:
    confusion = read_confusion(finished.folder)
    assert [len(after) for after in confusion] == [1, 2, 3]
    for after, row in zip(confusion, finished.matrix, strict=True):
        assert all(sum(counts) == 40 for counts in after)  # 20 test images of each of two classes
        for task, percent in enumerate(row):
            assert after[task][task] >= round(percent / 100 * 40)  # the right task, if not the right class of it


def test_a_run_learns(finished: Result) -> None:
    assert finished.summary["A_l"] > 60  # two of six patterns a task, and noise


def test_events_tell_the_whole_story(finished: Result) -> None:
    told = [json.loads(line) for line in (finished.folder / "events.jsonl").read_text().splitlines()]
    task = ["task", "epoch", "epoch", "accuracy"]
    assert [event["event"] for event in told] == ["run", *task * 3, "finished"]
    assert [event["memory"] for event in told if event["event"] == "accuracy"] == [24, 24, 24]
    epochs = [event for event in told if event["event"] == "epoch"]
    assert [(e["task"], e["epoch"], e["lr"]) for e in epochs[:3]] == [
        (1, 1, 0.05),
        (1, 2, pytest.approx(0.005)),
        (2, 1, 0.05),
    ]
    assert [e["steps"] for e in epochs] == [
        3,
        3,
        4,
        4,
        4,
        4,
    ]  # 48 images in batches of 16, then of 12 beside 4 old ones
    assert finished.summary["steps"] == 22
    assert [event["seconds"] for event in told] == sorted(event["seconds"] for event in told)


def test_watchers_hear_what_the_log_holds_and_steps_besides(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    heard: list[Event] = []
    run(tiny(), tmp_path / "run", registry=registry, watch=[heard.append], **CPU)
    logged = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    told = [event for event in heard if event["event"] != "step"]
    assert [{k: v for k, v in e.items() if k != "time"} for e in logged] == json.loads(json.dumps(told))
    steps = [event for event in heard if event["event"] == "step"]
    assert [(e["step"], e["of"], e["epoch"], e["epochs"]) for e in steps[:4]] == [
        (1, 3, 1, 2),
        (2, 3, 1, 2),
        (3, 3, 1, 2),
        (1, 3, 2, 2),
    ]


@pytest.mark.parametrize("norm", ["bn", "tbbn"])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(
    norm: str, tiny: Tiny, registry: Registry, tmp_path: Path
) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        torch.manual_seed(hash(name) % 1000)  # nothing may hang on the global generator
        run(tiny(norm=norm, seed=seed, method="two-phases"), tmp_path / name, registry=registry, **CPU)
    assert bits(tmp_path / "one") == bits(tmp_path / "two")
    assert bits(tmp_path / "one")["weights"] != bits(tmp_path / "three")["weights"]


def test_a_run_leaves_the_global_generator_alone(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    run(tiny(tasks=1), tmp_path / "run", registry=registry, **CPU)
    assert torch.equal(torch.rand(1), expected)


def test_the_order_of_classes_may_have_a_seed_of_its_own(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    for name, options in (("one", {}), ("other", {"class_order_seed": 4})):
        run(tiny(**options), tmp_path / name, registry=registry, **CPU)
    assert bits(tmp_path / "one")["memory"] != bits(tmp_path / "other")["memory"]


def test_the_order_of_classes_follows_the_seed_unless_it_is_given(tiny: Tiny, registry: Registry) -> None:
    def order(**asked: Any) -> list[int]:
        return list(assemble(tiny(**asked), registry, torch.device("cpu")).order)

    assert order() == class_order(6, 0) == order(seed=3, class_order=0)
    assert order(seed=3) == class_order(6, 3) != order()
    assert order(seed=3, class_order=1993) == class_order(6, 1993)
    assert order(class_order="5,0,1,4,2,3") == [5, 0, 1, 4, 2, 3]
    assert order(class_order=[5, 0, 1, 4], classes=4, tasks=2) == [5, 0, 1, 4]
    assert order(class_order=[5, 0, 1, 4, 2], classes=4, tasks=2) == [5, 0, 1, 4]


def test_an_order_as_a_list_gives_the_bits_of_the_seed_that_draws_it(
    tiny: Tiny, registry: Registry, tmp_path: Path
) -> None:
    run(tiny(seed=3), tmp_path / "seed", registry=registry, **CPU)
    run(tiny(seed=3, class_order=class_order(6, 3)), tmp_path / "list", registry=registry, **CPU)
    assert bits(tmp_path / "seed") == bits(tmp_path / "list")


def test_composition_and_vocabulary_reach_the_method(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    run(tiny(method="two-phases", epochs=1), tmp_path / "run", registry=registry, **CPU)
    told = [(e["task"], e["phase"], e["steps"], sorted(e["terms"])) for e in events(tmp_path / "run", "epoch")]
    assert told == [
        (1, "main", 3, ["ce"]),
        (2, "main", 4, ["ce", "distil"]),
        (2, "tail", 2, ["ce", "distil"]),  # six of each of four classes, in batches of 16
        (2, "tail", 2, ["ce", "distil"]),
        (3, "main", 4, ["ce", "distil"]),
        (3, "tail", 2, ["ce", "distil"]),  # four of each of six classes
        (3, "tail", 2, ["ce", "distil"]),
    ]


# Going on

STOPS = [
    ("run", 1), ("task", 1), ("step", 2), ("epoch", 1), ("step", 5), ("epoch", 2), ("accuracy", 1), ("task", 2),
    ("step", 8), ("epoch", 3), ("step", 16), ("epoch", 5), ("epoch", 6), ("accuracy", 2), ("task", 3), ("epoch", 8),
    ("accuracy", 3), ("finished", 1),
]  # fmt: skip
FEW = [("step", 2), ("epoch", 4), ("accuracy", 1), ("step", 20)]
VARIANTS: dict[str, dict[str, Any]] = {
    "ft": {},
    "phases": {"method": "two-phases", "norm": "tbbn"},
    "released": {"method": "two-phases", "norm": "tbbn", "protocol": "released"},
}


@pytest.fixture(scope="module")
def whole(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Spec, str], dict[str, Any]]:
    """The bits of the run that is never stopped."""
    known: dict[str, dict[str, Any]] = {}

    def of(spec: Spec, name: str) -> dict[str, Any]:
        if name not in known:
            known[name] = bits(run(spec, tmp_path_factory.mktemp(name) / "run", registry=registry, **CPU).folder)
        return known[name]

    return of


@pytest.mark.parametrize(
    ("variant", "stop"),
    [("released", stop) for stop in STOPS] + [(variant, stop) for variant in ("ft", "phases") for stop in FEW],
    ids=lambda value: value if isinstance(value, str) else f"{value[0]}{value[1]}",
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    variant: str, stop: tuple[str, int], tiny: Tiny, registry: Registry, tmp_path: Path, whole: Any
) -> None:
    spec = tiny(**VARIANTS[variant])
    folder = tmp_path / "run"
    with pytest.raises(Power):
        run(spec, folder, registry=registry, watch=[failing_at(*stop)], **CPU)
    state = json.loads((folder / "summary.json").read_text())["state"]
    assert state == ("finished" if stop[0] == "finished" else "failed")
    torch.manual_seed(99)
    resume(folder, registry=registry, **CPU)
    assert bits(folder) == whole(spec, variant)
    assert json.loads((folder / "summary.json").read_text())["state"] == "finished"


def test_a_run_may_be_stopped_again_and_again(tiny: Tiny, registry: Registry, tmp_path: Path, whole: Any) -> None:
    spec, folder = tiny(**VARIANTS["released"]), tmp_path / "run"
    with pytest.raises(Power):
        run(spec, folder, registry=registry, watch=[failing_at("step", 1)], **CPU)
    for _ in range(20):
        try:
            resume(folder, registry=registry, watch=[failing_at("epoch", 2)], **CPU)
        except Power:
            continue
        break
    assert bits(folder) == whole(spec, "released")


def test_resuming_a_finished_run_changes_no_number(finished: Result, registry: Registry) -> None:
    before = bits(finished.folder)
    again = resume(finished.folder, registry=registry, **CPU)
    assert bits(finished.folder) == before
    assert again.matrix == finished.matrix


def test_ctrl_c_is_recorded(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if event["event"] == "accuracy":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny(), tmp_path / "run", registry=registry, watch=[interrupt], **CPU)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["state"] == "interrupted"


def test_what_can_not_be_resumed(finished: Result, registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="nothing holds no run: there is no such folder"):
        resume(tmp_path / "nothing", registry=registry, **CPU)
    checkpoint = finished.folder / "checkpoints" / "last.pt"
    content = checkpoint.read_bytes()
    (checkpoint.parent / "previous.pt").unlink()
    checkpoint.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"last\.pt can't be read: its checksum"):
        resume(finished.folder, registry=registry, **CPU)
    checkpoint.write_bytes(content)
    text = (finished.folder / "spec.yaml").read_text()
    (finished.folder / "spec.yaml").write_text(text.replace("seed: 0", "seed: 1", 1))
    changed = r"belongs to another run: .*spec\.yaml was changed since the run began \(seed 1, was 0\): put it back"
    with pytest.raises(CheckpointError, match=changed):
        resume(finished.folder, registry=registry, **CPU)


# What can go wrong


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_what_was_done(
    tiny: Tiny, registry: Registry, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(RunStopped, match="task 2, epoch 1: the term 'sour' of the loss became nan") as caught:
        run(tiny(method="sour"), folder, registry=registry, **CPU)
    assert str(folder) in str(caught.value)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["state"], summary["where"]) == ("failed", "task 2, epoch 1")
    assert summary["A_f"] > 0
    assert len((folder / "accuracy.csv").read_text().splitlines()) == 2


def test_a_folder_with_a_run_is_refused_without_overwrite(finished: Result, tiny: Tiny, registry: Registry) -> None:
    before = bits(finished.folder)
    with pytest.raises(FolderError, match="holds a run already; resume it, or give --overwrite"):
        run(tiny(seed=1), finished.folder, registry=registry, **CPU)
    assert bits(finished.folder) == before
    (finished.folder / "tuning.json").write_text("stale")
    run(tiny(seed=1), finished.folder, registry=registry, overwrite=True, **CPU)
    assert bits(finished.folder) != before
    assert not (finished.folder / "tuning.json").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_files_is_refused_always(
    overwrite: bool, tiny: Tiny, registry: Registry, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FolderError, match="holds other files"):
        run(tiny(), tmp_path, registry=registry, overwrite=overwrite, **CPU)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_fine(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    assert run(tiny(tasks=1, epochs=1), tmp_path, registry=registry, **CPU).folder == tmp_path


def test_a_place_where_nothing_can_be_written(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(FolderError, match=rf"can't write the run folder {place}: Not a directory"):
            run(tiny(), place, registry=registry, **CPU)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(FolderError, match="Permission denied"):
        run(tiny(), tmp_path / "run", registry=registry, **CPU)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_from_the_start(
    call: str, tiny: Tiny, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, call, full)
    with pytest.raises(FolderError, match=r"can't write the run folder .*: No space left on device"):
        run(tiny(), tmp_path / "run", registry=registry, **CPU)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


def full(*_: object) -> None:
    """What a full disk answers."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_on_the_way(
    tiny: Tiny, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    folder = tmp_path / "run"

    def fill(event: Event) -> None:
        if event["event"] == "task" and event["task"] == 2:
            monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(RunStopped, match=r"^task 2, epoch 2: No space left on device; what was done is in "):
        run(tiny(), folder, registry=registry, watch=[fill], **CPU)
    monkeypatch.undo()
    assert not list(folder.rglob(".*"))  # nothing half written stays behind
    resume(folder, registry=registry, **CPU)
    assert bits(folder) == whole(tiny(), "ft")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tasks": 7}, "6 classes can't be split into 7 tasks"),
        ({"classes": 7, "tasks": 2, "memory": 100}, "blobs has 6 classes, not 7"),
        ({"memory": 5}, "a memory of 5 can't hold one exemplar of each of 6 classes"),
        ({"class_order": [0, 1, 2, 3, 4, 6]}, r"class_order names the label 6; blobs has the labels 0 \.\. 5"),
        ({"class_order": [4, 1, 2]}, "class_order names 3 of 6 classes; give all, or set classes=3"),
        ({"norm.momentum": 0.5, "norm": "tbbn", "splits": -1}, "splits can't be -1"),
        (
            {"protocol": "released", "train_per_class": 4},
            r"keep: best needs held-out images; a part of 0\.1 leaves some task none",
        ),
    ],
)
def test_a_spec_that_does_not_fit_the_images(
    asked: dict[str, Any], message: str, tiny: Tiny, registry: Registry, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=message):
        run(tiny(**asked), tmp_path / "run", registry=registry, **CPU)
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_there(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    for name in ("abacus", "cuda:77"):
        with pytest.raises(SpecError, match=f"no device '{name}' here: "):
            run(tiny(), tmp_path / "run", registry=registry, device=name)


# Fields of the protocol, each of which changes what it says


def heard(spec: Spec, registry: Registry, folder: Path, kind: str) -> list[Event]:
    run(spec, folder, registry=registry, **CPU)
    return events(folder, kind)


def test_budget(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    for budget, kept in (("floor", [26, 24, 24]), ("ceil", [26, 28, 30])):
        told = heard(tiny(memory=26, epochs=1, budget=budget), registry, tmp_path / budget, "accuracy")
        assert [event["memory"] for event in told] == kept


def test_test_images_of_full_batches_only(
    tiny: Tiny, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 test images a task, 32 of them in full batches of 16."""
    scored: list[int] = []
    scores = evaluation._scores
    monkeypatch.setattr(evaluation, "_scores", lambda *of: scored.append(len(of[2])) or scores(*of))
    for images, count in (("all", 40), ("full", 32)):
        run(tiny(epochs=1, test_images=images), tmp_path / images, registry=registry, **CPU)
        assert scored == [count] * 6
        scored.clear()


def test_a_task_smaller_than_a_batch_is_scored_whole(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    """The released code divides by zero there."""
    spec = tiny(epochs=1, test_images="full", **{"dataset.test": 5})
    told = heard(spec, registry, tmp_path / "run", "accuracy")
    assert all(value % 10 == 0 for event in told for value in event["accuracy"])  # of ten images


def test_a_released_task_scores_960_of_1000_images() -> None:
    for protocol, scored in (("released", 960), ("corrected", 1000)):
        spec = resolve("cifar100", protocol=protocol)
        assert len(evaluation.scored_images(spec, torch.arange(1000))) == scored


def test_held_out_images_are_never_trained_on(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    told = heard(tiny(epochs=1, validation=0.5), registry, tmp_path / "run", "epoch")
    assert [event["steps"] for event in told] == [2, 2, 2]  # 24 images a task


def test_union_makes_epochs_longer(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    told = heard(tiny(epochs=1, current_rows="union"), registry, tmp_path / "run", "epoch")
    assert [event["steps"] for event in told] == [3, 6, 6]  # 48 + 24 images in rows of 12


def test_cycle_and_drop_last(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    """48 images in rows of 12, then of 10 beside 26 and 28 in rows of 2."""
    for drop_last, steps in ((False, [4, 11, 12]), (True, [4, 13, 14])):
        spec = tiny(epochs=1, epoch="cycle", drop_last=drop_last, budget="ceil", memory=26, rows="10:2")
        told = heard(spec, registry, tmp_path / str(drop_last), "epoch")
        assert [event["steps"] for event in told] == steps


def test_the_first_task_takes_its_own_epochs(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    told = heard(tiny(epochs=2, first_task=1.5), registry, tmp_path / "run", "epoch")
    assert [(event["task"], event["of"]) for event in told] == [(1, 3)] * 3 + [(2, 2)] * 2 + [(3, 2)] * 2


@pytest.mark.parametrize(("field", "value"), [("herding", "icarl"), ("herd_again", True)])
def test_herding_fields_change_the_memory(
    field: str, value: object, tiny: Tiny, registry: Registry, tmp_path: Path
) -> None:
    for name, asked in (("as it is", {}), ("changed", {field: value})):
        run(tiny(epochs=1, **asked), tmp_path / name, registry=registry, **CPU)
    assert bits(tmp_path / "as it is")["memory"] != bits(tmp_path / "changed")["memory"]


def test_the_best_weights_are_restored(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    """Hopeless later epochs: with ``best`` the first epoch's weights, statistics included, come back."""
    common = {"tasks": 1, "validation": 0.25, "gamma": 1e4, "milestones": [1], "norm": "bn"}
    first = run(tiny(epochs=1, **{**common, "milestones": []}), tmp_path / "first", registry=registry, **CPU)
    best = run(tiny(epochs=2, keep="best", **common), tmp_path / "best", registry=registry, **CPU)
    last = run(tiny(epochs=2, **common), tmp_path / "last", registry=registry, **CPU)
    weights = {result.folder.name: bits(result.folder)["weights"] for result in (first, best, last)}
    assert weights["best"] == weights["first"] != weights["last"]


def test_a_held_out_loss_that_is_no_number_never_wins(
    tiny: Tiny, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"tasks": 1, "validation": 0.25, "keep": "best", "milestones": []}
    losses = iter([float("nan"), 0.5, float("nan")])
    monkeypatch.setattr(runner, "held_out_loss", lambda *_: next(losses))
    worse = run(tiny(epochs=3, **common), tmp_path / "three", registry=registry, **CPU)
    monkeypatch.undo()
    two = run(tiny(epochs=2, **{**common, "keep": "last"}), tmp_path / "two", registry=registry, **CPU)
    assert bits(worse.folder)["weights"] == bits(two.folder)["weights"]


def test_a_network_may_be_given_another_size_than_is_stored(
    registry: Registry, tiny: Callable[..., Spec], tmp_path: Path
) -> None:
    spec = tiny(crop_size=6, **{"augmentation.crop": "resized"})
    assert tiny(crop_size=None).key == tiny().key != spec.key
    one = run(spec, tmp_path / "one", device="cpu", registry=registry)
    assert len(one.matrix) == 3
    assert json.loads((one.folder / "environment.json").read_text())["images"]["size"] == [3, 6, 6]
    with pytest.raises(SpecError, match="no centre of 9; set test_size"):
        run(tiny(crop_size=9), tmp_path / "two", device="cpu", registry=registry)


def test_images_that_do_not_fit_the_device_are_told_in_one_line(
    registry: Registry, tiny: Callable[..., Spec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("cilnorm.experiment.assembly.Pixels", full)
    with pytest.raises(
        SpecError,
        match=r"^the images of blobs take 0\.0 GB, which cpu does not have; --set residence=stream reads them",
    ):
        run(tiny(), tmp_path / "run", device="cpu", registry=registry)


# Tasks of other sizes


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        ({"first_classes": 4, "increment": 1}, [4, 1, 1]),
        ({"first_classes": 4, "tasks": 2}, [4, 2]),
        ({"task_classes": [1, 3, 2]}, [1, 3, 2]),
        ({"first_classes": 2, "increment": 3, "stop_after": 2}, [2, 3]),
    ],
)
def test_tasks_may_be_of_other_sizes(
    asked: dict[str, Any], sizes: list[int], tiny: Tiny, registry: Registry, tmp_path: Path
) -> None:
    spec = tiny(norm="tbbn", epochs=1, **asked)
    whole = run(spec, tmp_path / "whole", registry=registry, **CPU)
    assert [event["classes"] for event in events(whole.folder, "task")] == sizes
    assert events(whole.folder, "run")[0]["tasks"] == len(sizes) == len(whole.matrix)
    with pytest.raises(Power):
        run(spec, tmp_path / "halted", registry=registry, watch=[failing_at("epoch", 2)], **CPU)
    resume(tmp_path / "halted", registry=registry, **CPU)
    assert bits(tmp_path / "halted") == bits(whole.folder)


@pytest.mark.parametrize("norm", ["tbbn", "tbbn+cn"])
def test_a_run_tells_layers_how_many_classes_are_old_and_new(
    norm: str, tiny: Tiny, registry: Registry, tmp_path: Path
) -> None:
    """The same rows in the same order: what is counted alone makes the difference, where tasks differ in size."""
    common = {"norm": norm, "epochs": 1, "splits": "exact"}
    unequal = {**common, "first_classes": 4, "increment": 1}
    found = [
        bits(run(tiny(**asked, unit=unit), tmp_path / f"{number} {unit}", registry=registry, **CPU).folder)["weights"]
        for number, asked in enumerate((common, unequal))
        for unit in ("tasks", "classes")
    ]
    assert found[0] == found[1]
    assert found[2] != found[3]


def test_a_list_of_tasks_must_hold_every_class(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="task_classes are 5 in all, not 6; set classes=5 for fewer"):
        run(tiny(task_classes=[3, 2]), tmp_path / "run", registry=registry, **CPU)
    assert run(tiny(task_classes=[3, 2], classes=5, epochs=1), tmp_path / "run", registry=registry, **CPU).summary


# Which exemplars, and how many


def kept(folder: Path) -> list[int]:
    """Exemplars of each class at the end."""
    return [len(of_class) for of_class in torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["memory"]]


def test_exemplars_of_each_class_stay_as_many(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    whole = run(tiny(memory_per_class=5, epochs=1), tmp_path / "run", registry=registry, **CPU)
    assert [event["memory"] for event in events(whole.folder, "accuracy")] == [10, 20, 30]
    assert kept(whole.folder) == [5] * 6


@pytest.mark.parametrize("rule", ["greedy", "icarl", "random", "closest", "reservoir"])
def test_a_run_goes_on_with_the_same_exemplars_under_every_rule(
    rule: str, tiny: Tiny, registry: Registry, tmp_path: Path
) -> None:
    spec = tiny(epochs=1, herding=rule)
    whole = run(spec, tmp_path / "whole", registry=registry, **CPU)
    with pytest.raises(Power):
        run(spec, tmp_path / "halted", registry=registry, watch=[failing_at("epoch", 2)], **CPU)
    resume(tmp_path / "halted", registry=registry, **CPU)
    assert bits(tmp_path / "halted") == bits(whole.folder)
    assert sum(kept(whole.folder)) == 24
    assert (kept(whole.folder) == [4] * 6) == (rule != "reservoir")


def test_rules_choose_other_exemplars(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    rules = ("greedy", "icarl", "random", "closest", "reservoir")
    chosen = {
        str(bits(run(tiny(epochs=1, herding=rule), tmp_path / rule, registry=registry, **CPU).folder)["memory"])
        for rule in rules
    }
    assert len(chosen) == len(rules)


@pytest.mark.parametrize("method", ["ft", "lucir"])
@pytest.mark.parametrize("asked", [{"memory": 0}, {"memory_per_class": 0}])
def test_a_method_that_can_learns_without_exemplars(
    method: str, asked: dict[str, Any], tiny: Tiny, registry: Registry, tmp_path: Path
) -> None:
    spec = tiny(method=method, norm="tbbn", epochs=1, **asked)
    whole = run(spec, tmp_path / "run", registry=registry, **CPU)
    assert [event["memory"] for event in events(whole.folder, "accuracy")] == [0, 0, 0]
    assert [event["steps"] for event in events(whole.folder, "epoch")] == [3, 3, 3]  # 48 images, 16 rows


def test_a_method_that_needs_exemplars_says_so(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"eeil needs exemplars, and memory is 0; ft, .*lucir.* can do without"):
        run(tiny(method="eeil", memory=0), tmp_path / "run", registry=registry, **CPU)
    with pytest.raises(SpecError, match=r"task 2, phase balanced: no batch of 16 rows can be filled from \[0\] images"):
        run(tiny(method="lucir", memory=0, balanced_epochs=0.5), tmp_path / "run", registry=registry, **CPU)


def test_a_balanced_phase_refuses_a_reservoir(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="phase tail: herding: reservoir keeps different numbers of each class"):
        run(tiny(method="two-phases", herding="reservoir"), tmp_path / "run", registry=registry, **CPU)


# What else is measured, and the upper bound


@pytest.mark.parametrize("classifier", ["head", "nme"])
def test_what_else_is_measured_agrees_with_what_it_is(
    classifier: str, tiny: Tiny, registry: Registry, tmp_path: Path
) -> None:
    spec = tiny(classifier=classifier, first_classes=4, increment=1, epochs=1)
    whole = run(spec, tmp_path / "whole", registry=registry, **CPU)
    told = events(whole.folder, "accuracy")
    assert [event["seen"] for event in told] == [4, 5, 6]
    for event in told:
        for task, percent in enumerate(event["accuracy"]):
            assert event["task_aware"][task] >= percent
            assert event["top5"][task] >= percent
        assert event["task_aware"][1:] == [100.0] * (event["task"] - 1)  # tasks of one class
        assert (event["top5"] == [100.0] * event["task"]) or event["seen"] > 5
        assert ("ece_old" in event) == (event["task"] > 1)
        assert 0 <= event["ece_new"] <= 100
    summary = whole.summary
    row, sizes = whole.matrix[-1], [4, 1, 1]
    assert summary["A_f"] == pytest.approx(sum(a * size for a, size in zip(row, sizes, strict=True)) / 6)
    assert summary["sizes"] == sizes
    assert summary["task_aware"]["A_f"] >= summary["A_f"]
    assert summary["top5"].keys() == {"A_f", "A_a", "A_l"}
    assert (summary["ece_old"], summary["ece_new"]) == (told[-1]["ece_old"], told[-1]["ece_new"])
    with pytest.raises(Power):
        run(spec, tmp_path / "halted", registry=registry, watch=[failing_at("epoch", 2)], **CPU)
    again = resume(tmp_path / "halted", registry=registry, **CPU).summary
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}


def test_a_run_that_an_earlier_version_began_goes_on_without_the_other_measures(
    tiny: Tiny, registry: Registry, tmp_path: Path
) -> None:
    with pytest.raises(Power):
        run(tiny(epochs=1), tmp_path / "run", registry=registry, watch=[failing_at("epoch", 2)], **CPU)
    for name in ("last", "previous"):
        path = tmp_path / "run" / "checkpoints" / f"{name}.pt"
        content = read_tensor_file(path)
        del content["others"]
        path.write_bytes(tensor_file(content))
    summary = resume(tmp_path / "run", registry=registry, **CPU).summary
    assert summary["state"] == "finished"
    assert "task_aware" not in summary


def test_joint_training_sees_every_image_of_every_task(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    spec = tiny(method="joint", memory=0, epochs=2, norm="tbbn")
    whole = run(spec, tmp_path / "joint", registry=registry, **CPU)
    steps = [event["steps"] for event in events(whole.folder, "epoch")]
    assert steps == [3, 3, 6, 6, 9, 9]  # 48 images a task in batches of 16
    ft = run(tiny(memory=0, epochs=2, norm="tbbn"), tmp_path / "ft", registry=registry, **CPU)
    first = [event["terms"] for event in events(whole.folder, "epoch")[:2]]
    assert first == [event["terms"] for event in events(ft.folder, "epoch")[:2]]
    assert whole.matrix[0] == ft.matrix[0]
    assert whole.summary["A_f"] > ft.summary["A_f"] + 10  # which forgets, without a memory
