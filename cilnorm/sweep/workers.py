"""Jobs side by side on this machine, each a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from cilnorm.files import in_words
from cilnorm.storage.interruptions import Interruptions
from cilnorm.storage.lock import BUSY, busy
from cilnorm.sweep.jobs import Job

__all__ = ["Watcher", "command", "die_with", "options", "work", "worker_environment"]

Watcher = Callable[[Job, str], None]  # told of a job and "started", "ended", "busy" or, again and again, "running"
PATIENCE = 30.0  # seconds in which a run may finish its step and save
LOOK = 0.2  # seconds between looks at the processes
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


def die_with(parent: int) -> None:
    """Makes this process stop as by Ctrl-C when ``parent`` dies, even by SIGKILL, and die if it does not stop in time.

    Linux sends the signal at once; elsewhere a thread sees within a second that the parent is another one now. On
    Windows, where it stays the same, nothing happens. Ctrl-C is also switched on again where the parent was started
    with it ignored, as a shell does in the background.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGINT)
    if os.getppid() != parent:  # it died before the call
        raise SystemExit(130)
    threading.Thread(target=_outlive, args=(parent,), name="die with parent", daemon=True).start()


def _outlive(parent: int) -> None:
    """Waits for the parent's end, asks this process to stop where the system did not, and ends it if that is no use."""
    while os.getppid() == parent:
        time.sleep(1.0)
    if sys.platform != "linux":
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(PATIENCE)
    os._exit(130)


def command(job: Job, flags: Sequence[str], parent: int | None = None) -> list[str]:
    """The command line that begins or continues a job; with ``parent`` it stops when that process does."""
    tie = f"from cilnorm.sweep.workers import die_with; die_with({parent}); " if parent else ""
    return [sys.executable, "-c", f"{tie}from cilnorm.cli.app import main; main()", *job.arguments(), *flags]


def options(device: str, data_root: Path | None) -> list[str]:
    """What every job is told besides."""
    return ["--device", device, *(["--data-root", str(data_root)] if data_root else [])]


def worker_environment(workers: int) -> dict[str, str]:
    """This process's environment, with the cores divided among the workers; OMP_NUM_THREADS stays if it is set."""
    threads = max(1, len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0]) // workers)
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


def work(jobs: Sequence[Job], workers: int, flags: Sequence[str], watch: Watcher) -> None:
    """Does the jobs, ``workers`` at a time, in order; a failed one is taken down and does not stop the others.

    One that another process of this machine is at work on is waited for, after all others; one of another machine,
    which can't be asked whether it is alive, is left out. Whatever ends this call early, Ctrl-C, SIGTERM or a terminal
    that hangs up, stops the processes first; each leaves a run that can be resumed.
    """
    queue, running = _Queue(jobs), dict[Job, subprocess.Popen[bytes]]()
    environment = worker_environment(workers)
    with Interruptions():
        try:
            while queue.waiting or running:
                while len(running) < workers and (job := queue.next(watch)) is not None:
                    try:
                        running[job] = _start(job, flags, environment)
                    except OSError as error:  # a full disk or too many processes, say
                        job.fail(f"can't be started: {in_words(error)}")
                    watch(job, "started" if job in running else "ended")
                time.sleep(LOOK)
                for job, process in list(running.items()):
                    code = process.poll()
                    if code is not None:
                        del running[job]
                        job.end(code)
                        if code == BUSY:  # another one was quicker
                            queue.waiting.append(job)
                            continue
                    watch(job, "running" if code is None else "ended")
        finally:
            _stop(running.values())


def _start(job: Job, flags: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    job.begin()
    with open(job.log, "ab") as log:
        return subprocess.Popen(
            command(job, flags, os.getpid()),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # the terminal's Ctrl-C comes to the parent alone, and is handed on once
        )


class _Queue:
    """Jobs in order, those that others are at work on after the rest."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self.waiting = deque(jobs)
        self._met: set[Job] = set()  # those that another process was at work on

    def next(self, watch: Watcher) -> Job | None:
        """The first one that can be begun; None if there is none now."""
        for _ in range(len(self.waiting)):
            job = self.waiting.popleft()
            other = busy(job.folder)
            if other is None and not (job in self._met and job.state in ("finished", "failed")):
                return job
            if other is not None and other.here:
                self.waiting.append(job)
                if job in self._met:
                    continue
                self._met.add(job)
                job.begin()
            watch(job, "ended" if other is None else "busy")
        return None


def _stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Ctrl-C for each; who does not heed it, or all of them after a second Ctrl-C, are killed."""
    alive = [process for process in processes if process.poll() is None]
    try:
        for process in alive:
            process.send_signal(signal.SIGINT)
        until = time.monotonic() + PATIENCE
        for process in alive:
            process.wait(max(0.0, until - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in alive:
            process.kill()
        for process in alive:
            process.wait()
