"""What people see while a run goes on."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cilnorm.cli import progress
from cilnorm.cli.progress import Display
from cilnorm.experiment.runner import run
from cilnorm.registry import Registry
from cilnorm.spec import Spec

pytestmark = pytest.mark.slow

EVENTS: list[dict[str, Any]] = [
    {"event": "run", "folder": "runs/[bold]x[/bold] [/]", "tasks": 2, "notice": "odd [/] files", "method": "ft",
     "norm": "bn", "backbone": "tiny", "dataset": "blobs", "seed": 3, "matrix": []},
    {"event": "task", "task": 1, "classes": 2, "seen": 2, "memory": 0},
    {"event": "step", "step": 1, "of": 2, "epoch": 1, "epochs": 1},
    {"event": "epoch", "task": 1, "phase": "[main]", "epoch": 1, "of": 1, "terms": {"ce": 1.25, "[/]": 0.5},
     "seconds": 30.0},
    {"event": "step", "step": 2, "of": 2, "epoch": 1, "epochs": 1},
    {"event": "accuracy", "task": 1, "accuracy": [90.0], "memory": 4, "seconds": 40.0},
    {"event": "task", "task": 2, "classes": 2, "seen": 4, "memory": 4},
    {"event": "accuracy", "task": 2, "accuracy": [50.04, 80.0], "memory": 4, "seconds": 80.0},
    {"event": "an event of a later version"},
    {"event": "finished", "A_f": 65.0, "A_a": 77.5, "F": 20.0, "forgetting": 40.0, "A_l": 85.0, "steps": 12,
     "seconds": 81.0},
]  # fmt: skip


def shown(terminal: bool, events: list[dict[str, Any]] = EVENTS) -> str:
    text = io.StringIO()
    with Display(Console(file=text, force_terminal=terminal, width=200, highlight=False)) as display:
        for event in events:
            display(event)
    return text.getvalue()


def test_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET", -1.0)
    assert shown(terminal=False).splitlines() == [
        "ft x bn x tiny x blobs, 2 tasks, seed 3; folder runs/[bold]x[/bold] [/]",
        "note: odd [/] files",
        "after     mean    t1    t2  (accuracy in % on each task, among all classes seen)",
        "  task 1/2 [main] epoch 1/1: ce 1.250 [/] 0.500; 30 s, about 30 s left",
        "task  1:   90.0  90.0",
        "task  2:   65.0  50.0  80.0",
        "after     mean    t1    t2  (accuracy in % on each task, among all classes seen)",
        "task  1:   90.0  90.0",
        "task  2:   65.0  50.0  80.0",
        "A_f 65.00  A_a 77.50  F 20.00  forgetting 40.00  A_l 85.00  (12 steps, 81 s)",
    ]


HEAD = "after     mean    t1    t2  (accuracy in % on each task, among all classes seen)"


def test_a_matrix_whose_rows_stand_together_is_printed_once() -> None:
    assert shown(terminal=False).splitlines()[-4:-1] == [HEAD, "task  1:   90.0  90.0", "task  2:   65.0  50.0  80.0"]
    assert shown(terminal=False).count("after     mean") == 1


def test_a_resumed_run_shows_the_rows_that_were_there() -> None:
    before = [{**EVENTS[0], "notice": "", "matrix": [[90.0]]}, *EVENTS[6:]]
    assert shown(terminal=False, events=before).splitlines()[1:-1] == [
        "1 of 2 tasks were learned before", HEAD, "task  1:   90.0  90.0", "task  2:   65.0  50.0  80.0",
    ]  # fmt: skip
    done = [{**EVENTS[0], "notice": "", "matrix": [[90.0], [50.0, 80.0]]}, EVENTS[-1]]
    assert shown(terminal=False, events=done).splitlines()[2:-1] == [
        HEAD, "task  1:   90.0  90.0", "task  2:   65.0  50.0  80.0",
    ]  # fmt: skip


def test_a_half_is_rounded_up() -> None:
    events = [{**EVENTS[0], "matrix": [[0.25]]}, {**EVENTS[7], "accuracy": [0.35, 2.25]}]
    lines = shown(terminal=False, events=events).splitlines()[-2:]
    assert lines == ["task  1:    0.3   0.3", "task  2:    1.3   0.4   2.3"]


def test_epochs_are_shown_only_now_and_then() -> None:
    assert "epoch 1/1" not in shown(terminal=False)


def test_a_bar_on_a_terminal() -> None:
    text = shown(terminal=True)
    assert "\x1b[" in text
    assert "task 1/2" in text
    assert "ce 1.250 [/] 0.500" in text
    assert "note:" in text


class Gone(io.StringIO):
    """A file whose reader went away after some text."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("terminal", [False, True])
def test_a_reader_that_goes_away_ends_the_display_alone(
    terminal: bool, tiny: Callable[..., Spec], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Console, "on_broken_pipe", lambda self: sys.exit(1))  # as rich does, the file's number left out
    with Display(Console(file=Gone(), force_terminal=terminal, width=120)) as display:
        done = run(tiny(epochs=1), tmp_path / "run", device="cpu", registry=registry, watch=[display])
    assert done.summary["state"] == "finished"


def test_it_follows_a_whole_run(
    tiny: Callable[..., Spec], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "QUIET", float("inf"))  # however slow the machine is
    for terminal in (False, True):
        text = io.StringIO()
        with Display(Console(file=text, force_terminal=terminal, width=120)) as display:
            run(tiny(epochs=1), tmp_path / str(terminal), device="cpu", registry=registry, watch=[display])
        assert text.getvalue().count("task  ") == 3
        assert "A_f" in text.getvalue()
