"""Loggers: they hear what the log holds, in order, and each writes it where it should."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cilnorm.experiment.loggers import Loggers
from cilnorm.experiment.runner import resume, run
from cilnorm.hookspecs import Logger, hookimpl
from cilnorm.registry import Registry, load
from cilnorm.spec import Spec, SpecError
from tests import fake

Tiny = Callable[..., Spec]
Event = dict[str, Any]


class Notebook:
    """A logger of a stranger's."""

    pages: list[Any] = []  # noqa: RUF012

    def __init__(self, folder: Path) -> None:
        self.pages.append(folder)

    def __call__(self, event: Event) -> None:
        self.pages.append(event)

    def close(self) -> None:
        self.pages.append("closed")


class Offer:
    @hookimpl
    def cilnorm_loggers(self) -> list[Logger]:
        return [Logger("notebook", Notebook), Logger("lost", Notebook, needs=("no_such_module",))]


def test_a_logger_hears_what_the_log_holds(tiny: Tiny, tmp_path: Path) -> None:
    registry = load(extra=[fake, Offer()], strict=True)
    Notebook.pages.clear()
    with Loggers(["notebook", "notebook"], registry) as loggers:
        run(tiny(), tmp_path / "run", device="cpu", registry=registry, watch=[loggers])
    logged = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    folder, *told, closed = Notebook.pages
    assert (folder, closed) == (tmp_path / "run", "closed")
    assert json.loads(json.dumps(told)) == [{k: v for k, v in e.items() if k != "time"} for e in logged]


@pytest.mark.parametrize("at", ["build", "run", "accuracy", "close"])
@pytest.mark.parametrize("error", [SystemExit, RuntimeError])
def test_a_logger_that_raises_is_left_out_said_once_and_stops_no_run(
    at: str, error: type[BaseException], tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Sick(Notebook):
        def __init__(self, folder: Path) -> None:
            self.raise_at("build")

        def __call__(self, event: Event) -> None:
            self.raise_at(event["event"])

        def close(self) -> None:
            self.raise_at("close")

        def raise_at(self, where: str) -> None:
            if where == at:
                raise error("it is full")

    class Both:
        @hookimpl
        def cilnorm_loggers(self) -> list[Logger]:
            return [Logger("sick", Sick), Logger("notebook", Notebook)]

    registry = load(extra=[fake, Both()], strict=True)
    Notebook.pages.clear()
    with Loggers(["sick", "notebook"], registry) as loggers:
        run(tiny(), tmp_path / "run", device="cpu", registry=registry, watch=[loggers])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["state"] == "finished"
    assert sum(event["event"] == "accuracy" for event in Notebook.pages[1:-1]) == 3
    assert capsys.readouterr().err == (
        f"cilnorm: the logger sick is left out from here on: {error.__name__}: it is full\n"
    )


def test_what_is_not_there_is_said_before_anything_is_trained() -> None:
    registry = load(extra=[Offer()], strict=True)
    with pytest.raises(SpecError, match="no logger called 'notbook'; did you mean 'notebook'"):
        Loggers(["notbook"], registry)
    with pytest.raises(SpecError, match=r"the logger lost needs no_such_module: pip install 'cilnorm\[lost\]'"):
        Loggers(["lost"], registry)


def stop_after(task: int) -> Callable[[Event], None]:
    def watch(event: Event) -> None:
        if event["event"] == "accuracy" and event["task"] == task:
            raise RuntimeError("stop")

    return watch


def told_in_two_parts(tiny: Tiny, registry: Registry, folder: Path, name: str) -> list[list[float]]:
    """A run that is stopped once and resumed; its matrix."""
    with pytest.raises(RuntimeError), Loggers([name], registry) as loggers:
        run(tiny(), folder, device="cpu", registry=registry, watch=[loggers, stop_after(2)])
    with Loggers([name], registry) as loggers:
        return resume(folder, device="cpu", registry=registry, watch=[loggers]).matrix


def test_the_csv_logger(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    matrix = told_in_two_parts(tiny, registry, tmp_path / "run", "csv")
    with open(tmp_path / "run" / "log.csv") as file:
        rows = list(csv.DictReader(file))
    latest = {(row["task"], row["phase"], row["epoch"], row["name"]): float(row["value"]) for row in rows}
    assert [latest["3", "", "", f"accuracy/task {task}"] for task in (1, 2, 3)] == matrix[-1]
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    epochs = [event for event in events if event["event"] == "epoch"]
    assert len([key for key in latest if key[3] == "loss/ce"]) == len(epochs) == 6
    for event in epochs:
        assert latest[str(event["task"]), "main", str(event["epoch"]), "loss/ce"] == event["terms"]["ce"]


def test_the_tensorboard_logger(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    matrix = told_in_two_parts(tiny, registry, tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = [(point.step, point.value) for point in events.Scalars("loss/ce")]
    assert [step for step, _ in losses] == [3, 6, 10, 14, 18, 22]  # 3 + 3 steps, then 4 an epoch
    last = [events.Scalars(f"accuracy/task {task}")[-1] for task in (1, 2, 3)]
    assert [point.step for point in last] == [3, 3, 3]
    assert [point.value for point in last] == pytest.approx(matrix[-1])
