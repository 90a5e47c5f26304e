"""What a person sees while a run goes on: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cilnorm.cli.remaining import Remaining
from cilnorm.metrics import as_matrix, average_per_task
from cilnorm.registry import Registry
from cilnorm.text import half_up

__all__ = ["Display"]

UNITS = 1000  # of the bar
QUIET = 10.0  # seconds between plain lines within a task


class Display:
    """Watches a run's events; use as a context manager.

    Args:
        registry: knows the run's method, for a better estimate of the time that is left.
    """

    def __init__(self, console: Console | None = None, registry: Registry | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._remaining = Remaining(registry)
        self._tasks, self._task, self._seen = 0, 0, 0
        self._terms, self._accuracy = "", ""
        self._sizes: Sequence[int] = ()
        self._matrix: list[list[float]] = []
        self._parted = False  # whether another line was printed between two rows of the matrix
        self._printed = time.monotonic()
        self._bar: Progress | None = None
        self._handle: Any = None
        self._gone = False

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            columns = (
                TextColumn("[bold]task {task.fields[at]}[/]"), BarColumn(), TextColumn("{task.fields[epoch]}"),
                TextColumn("[cyan]{task.fields[terms]}[/]"), TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
            )  # fmt: skip
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._handle = self._bar.add_task("run", total=None, at="-", epoch="loading the images", terms="", left="")
            with self._outliving_the_reader():
                self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            with self._outliving_the_reader():
                self._bar.stop()

    @contextmanager
    def _outliving_the_reader(self) -> Iterator[None]:
        """A display that can't be written any more is given up, and the run goes on; rich would end the process."""
        try:
            yield
        except (OSError, ValueError, SystemExit):  # a ValueError is what a closed file raises
            self._gone = True

    def __call__(self, event: dict[str, Any]) -> None:
        handler = getattr(self, f"_on_{event['event']}", None)
        self._remaining(event)
        if handler is not None and not self._gone:
            with self._outliving_the_reader():
                handler(event)

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)
        self._printed = time.monotonic()

    def _on_run(self, event: dict[str, Any]) -> None:
        self._tasks, self._sizes = event["tasks"], event.get("sizes", ())
        what = " x ".join(event[name] for name in ("method", "norm", "backbone", "dataset"))
        self._print(escape(f"{what}, {self._tasks} tasks, seed {event['seed']}; folder {event['folder']}"))
        if event["notice"]:
            self._print(f"[yellow]note:[/] {escape(event['notice'])}")
        self._matrix = [list(row) for row in event["matrix"]]
        if self._matrix:
            self._print(f"{len(self._matrix)} of {self._tasks} tasks were learned before")
        self._print_matrix()

    def _print_matrix(self) -> None:
        """The head of the accuracy matrix and the rows so far."""
        header = "".join(f"{f't{u + 1}':>6}" for u in range(self._tasks))
        self._print(f"[dim]after     mean{header}  (accuracy in % on each task, among all classes seen)[/]")
        for row in self._matrix:
            self._print_row(row)
        self._parted = False

    def _print_row(self, row: Sequence[float]) -> None:
        cells = "".join(f"{half_up(value):>6}" for value in row)
        self._print(f"task {len(row):>2}: [bold]{half_up(self._mean(row)):>6}[/]{cells}")

    def _mean(self, row: Sequence[float]) -> float:
        """Over all seen tasks, as A_f and A_a are."""
        return float(average_per_task(as_matrix([*[()] * (len(row) - 1), row]), self._sizes)[-1])

    def _on_warning(self, event: dict[str, Any]) -> None:
        self._print(f"[yellow]warning:[/] {escape(event['text'])}")
        self._parted = True

    def _on_trial(self, event: dict[str, Any]) -> None:
        options = " ".join(f"{name} {value}" for name, value in event["options"].items())
        self._print(escape(f"trying {options}: {half_up(event['accuracy'])} % on held-out images of the first tasks"))

    def _on_task(self, event: dict[str, Any]) -> None:
        self._task, self._seen = event["task"], event["seen"]

    def _on_step(self, event: dict[str, Any]) -> None:
        if self._bar is None:
            return
        self._bar.update(
            self._handle,
            total=UNITS,
            completed=UNITS * self._remaining.part,
            left=_in_words(self._remaining.seconds),
            at=f"{self._task}/{self._tasks}",
            epoch=f"epoch {event['epoch']}/{event['epochs']} step {event['step']}/{event['of']}",
            terms=self._terms + self._accuracy,
        )

    def _on_epoch(self, event: dict[str, Any]) -> None:
        self._terms = escape(" ".join(f"{name} {value:.3f}" for name, value in event["terms"].items()))
        if self._bar is None and time.monotonic() - self._printed > QUIET:
            where = f"task {self._task}/{self._tasks} {escape(event['phase'])} epoch {event['epoch']}/{event['of']}"
            left = _in_words(self._remaining.seconds)
            self._print(f"  {where}: {self._terms}; {event['seconds']:.0f} s{left and ', '}{left}")
            self._parted = True

    def _on_accuracy(self, event: dict[str, Any]) -> None:
        row = event["accuracy"]
        self._matrix.append(list(row))
        self._accuracy = f"  accuracy {half_up(self._mean(row))} %"
        self._print_row(row)

    def _on_finished(self, event: dict[str, Any]) -> None:
        if self._parted:
            self._print_matrix()
        self._print(f"{_figures(event)}  ({event['steps']} steps, {event['seconds']:.0f} s)")
        if "by_head" in event:
            self._print(f"{_figures(event['by_head'])}  (by the head; above: by the nearest mean of exemplars, NME)")
        for view, metrics in event.get("by_view", {}).items():
            self._print(f"{_figures(metrics)}  (by the {view})")


def _in_words(seconds: float | None) -> str:
    """``about 80 s left``; empty where it is not known."""
    if seconds is None:
        return ""
    if seconds < 600:
        return f"about {seconds:.0f} s left"
    return f"about {seconds / 60:.0f} min left" if seconds < 36_000 else f"about {seconds / 3600:.0f} h left"


def _figures(metrics: dict[str, Any]) -> str:
    return "  ".join(
        f"{name} [bold]{half_up(metrics[name], 2)}[/]" for name in ("A_f", "A_a", "F", "forgetting", "A_l")
    )
