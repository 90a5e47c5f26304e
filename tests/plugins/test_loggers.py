"""Loggers: they hear what the log holds, in order, and each writes it where it should."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cilnorm.experiment.loggers import Loggers
from cilnorm.experiment.runner import resume, run
from cilnorm.hookspecs import Logger, hookimpl
from cilnorm.registry import Registry, load
from cilnorm.spec import Spec, SpecError
from tests import fake

STEPS = [3, 6, 10, 14, 18, 22]  # at the ends of epochs: 3 + 3 steps, then 4 an epoch
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
    if name == "wandb":  # names its folders by run and second
        time.sleep(1.1)
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
    assert [step for step, _ in losses] == STEPS
    last = [events.Scalars(f"accuracy/task {task}")[-1] for task in (1, 2, 3)]
    assert [point.step for point in last] == [3, 3, 3]
    assert [point.value for point in last] == pytest.approx(matrix[-1])


def told(folder: Path, name: str) -> dict[str, str]:
    """What the run's folder notes of another program's run."""
    found: dict[str, str] = json.loads((folder / f"{name}.json").read_text())
    return found


def records(data: bytes) -> Iterator[bytes]:
    """The records of a file of W&B: LevelDB's log, pieces with a header of 7 bytes in blocks of 32 KiB."""
    at, whole = 7, b""
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of it, or its end
            yield whole
            whole = b""


def ended(file: Path, kind: Any) -> list[bytes]:
    """The records of a file once it has its last one: W&B's own process may write it a moment after a run's end."""
    for _ in range(300):
        found = list(records(file.read_bytes()))
        if found and kind.FromString(found[-1]).WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    raise AssertionError(f"{file} has no end after half a minute")


def test_the_wandb_logger(tiny: Tiny, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, each process writes a file of its own; both are of one run, which `wandb sync` puts together."""
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    matrix = told_in_two_parts(tiny, registry, tmp_path / "run", "wandb")
    noted = told(tmp_path / "run", "wandb")
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{noted['id']}.wandb"}
    rows: dict[int, dict[str, Any]] = {}
    config = {}
    for file in files:  # their names begin with the time
        for record in map(Record.FromString, ended(file, Record)):
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                rows.setdefault(record.history.step.num, {}).update(items)
            elif record.WhichOneof("record_type") == "run":
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    assert [step for step, row in rows.items() if "loss/ce" in row] == STEPS
    last = rows[STEPS[-1]]
    assert [last[f"accuracy/task {task}"] for task in (1, 2, 3)] == matrix[-1]
    assert last["task"] == 3
    assert "metric/A_f" in last
    assert config["schedule.lr"] == 0.05
    assert (noted["project"], noted["name"]) == ("cilnorm", f"run-{noted['id']}")


def test_the_trackio_logger(tiny: Tiny, registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    matrix = told_in_two_parts(tiny, registry, tmp_path / "run", "trackio")
    name = told(tmp_path / "run", "trackio")["name"]
    assert SQLiteStorage.get_runs("cilnorm").count(name) == 1
    rows = SQLiteStorage.get_logs("cilnorm", name)
    assert sorted({row["step"] for row in rows if "loss/ce" in row}) == STEPS
    accuracies = [row for row in rows if "accuracy/mean" in row]
    assert [accuracies[-1][f"accuracy/task {task}"] for task in (1, 2, 3)] == matrix[-1]
    assert any("metric/A_f" in row for row in rows)
    assert SQLiteStorage.get_run_config("cilnorm", name)["schedule.lr"] == 0.05
    assert "Trackio" not in capsys.readouterr().out


def test_the_mlflow_logger(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")

    matrix = told_in_two_parts(tiny, registry, tmp_path / "run", "mlflow")
    client, number = mlflow.MlflowClient(), told(tmp_path / "run", "mlflow")["id"]
    run = client.get_run(number)
    assert run.info.status == "FINISHED"
    assert (run.info.run_name, run.data.params["schedule.lr"]) == ("run", "0.05")
    assert sorted({point.step for point in client.get_metric_history(number, "loss/ce")}) == STEPS
    last = [client.get_metric_history(number, f"accuracy/task {task}")[-1] for task in (1, 2, 3)]
    assert [(point.step, point.value) for point in last] == [(3, value) for value in matrix[-1]]
    assert run.data.metrics["A_f"] > 0


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_one_that_can_not_write_is_left_out(
    name: str, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = pytest.importorskip(name)

    def full(*arguments: Any, **named: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(library, "MlflowClient" if name == "mlflow" else "init", full)
    with Loggers([name], registry) as loggers:
        loggers({"event": "run", "folder": str(tmp_path), "steps": 0})
        loggers({"event": "epoch", "steps": 3, "lr": 0.1, "terms": {"ce": 1.0}})
    assert f"the logger {name} is left out from here on: OSError: [Errno 28]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
