"""What a person sees while jobs go on: a live table of their states on a terminal, a line a change elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cilnorm.sweep.jobs import Job, progress

__all__ = ["Board"]

REFRESH = 1.0  # seconds between looks at the logs of running jobs
STYLES = {"finished": "green", "failed": "red", "running": "bold cyan", "waiting": "dim", "interrupted": "yellow"}


class Board:
    """Watches jobs, a row a label and a column a seed; use as a context manager.

    Args:
        jobs: all of them.
        todo: those that are to be done now.
    """

    def __init__(self, jobs: Sequence[Job], todo: Sequence[Job], console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._jobs, self._todo = jobs, list(todo)
        self._parts = dict.fromkeys(todo, 0.0)
        self._before = {job: progress(job.folder, job.spec) for job in todo}
        self._running: set[Job] = set()
        self._busy: set[Job] = set()
        self._began, self._looked = time.monotonic(), 0.0
        self._live: Live | None = None

    def __enter__(self) -> Board:
        reused = sum(job.state == "finished" for job in self._jobs if job not in self._parts)
        left_out = sum(job.state == "failed" for job in self._jobs if job not in self._parts)
        begun = sum(job.state == "interrupted" for job in self._todo)
        text = f"{len(self._jobs)} runs: {reused} finished before, {len(self._todo)} to do"
        text += f", {begun} of them begun before" if begun else ""
        text += f"; {left_out} failed before (--retry-failed tries them again)" if left_out else ""
        self.console.print(text, soft_wrap=True)
        if self.console.is_terminal and self._todo:
            self._live = Live(self._table(), console=self.console, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.clear()
        if self._live is not None:
            self._live.update(self._table())
            self._live.stop()

    def __call__(self, job: Job, what: str) -> None:
        """Hears that a job was ``started``, is ``running``, has ``ended``, or that others are ``busy`` with it."""
        if what == "busy":
            self._busy.add(job)
        else:
            self._busy.discard(job)
        if what == "busy":
            self._running.discard(job)
        elif what == "ended":
            self._running.discard(job)
            self._parts[job] = 1.0
        else:
            self._running.add(job)
        now = time.monotonic()
        if what == "running" and now - self._looked < REFRESH:
            return
        self._looked = now
        for at_work in self._running:
            self._parts[at_work] = progress(at_work.folder, at_work.spec)
        if self._live is not None:
            self._live.update(self._table())
        elif what != "running":
            self._line(job, what)

    def _line(self, job: Job, what: str) -> None:
        done = sum(job.state == "finished" for job in self._jobs)
        text = f"[{done}/{len(self._jobs)}] {job.label}, seed {job.spec.seed}: "
        text += "started" if what == "started" else job.unfinished if what == "busy" else self._outcome(job)
        self.console.print(escape(text), soft_wrap=True)

    def _outcome(self, job: Job) -> str:
        if job.state == "finished":
            return f"A_f {job.summary['A_f']:.2f} ({job.summary['seconds']:.0f} s){self._left()}"
        return f"{job.state}: {job.reason}" if job.reason else job.state

    def _left(self) -> str:
        """How long the rest takes at the speed so far."""
        done = sum(self._parts[job] - self._before[job] for job in self._todo)
        rest = sum(1 - self._parts[job] for job in self._todo)
        if done <= 0 or rest <= 0:
            return ""
        seconds = (time.monotonic() - self._began) * rest / done
        return f"; about {seconds / 60:.0f} min left" if seconds >= 90 else f"; about {seconds:.0f} s left"

    def _table(self) -> Group:
        labels = list(dict.fromkeys(job.label for job in self._jobs))
        seeds = list(dict.fromkeys(job.spec.seed for job in self._jobs))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("run")
        for seed in seeds:
            table.add_column(f"seed {seed}", justify="right", min_width=8)
        cells = {(job.label, job.spec.seed): self._cell(job) for job in self._jobs}
        for label in labels:
            table.add_row(escape(label), *(cells.get((label, seed), Text()) for seed in seeds))
        done = sum(job.state == "finished" for job in self._jobs)
        minutes = (time.monotonic() - self._began) / 60
        return Group(table, Text(f"{done} of {len(self._jobs)} finished, {minutes:.0f} min{self._left()}"))

    def _cell(self, job: Job) -> Text:
        if job in self._running:
            return Text(f"{self._parts[job]:.0%}", STYLES["running"])
        state = job.state
        if job in self._busy and state != "finished":
            return Text("busy", STYLES["waiting"])
        if state == "finished":
            return Text(f"{job.summary['A_f']:.2f}", STYLES[state])
        waits = state == "new" or (job in self._parts and self._parts[job] < 1)
        return Text("waiting", STYLES["waiting"]) if waits else Text(state, STYLES[state])
