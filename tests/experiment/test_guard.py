"""One process at a time in a folder, signals between two steps, and causes in words."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cilnorm.experiment import runner
from cilnorm.experiment.failures import RunStopped
from cilnorm.experiment.runner import resume, run
from cilnorm.registry import Registry
from cilnorm.spec import Spec
from cilnorm.storage import lock
from cilnorm.storage.interruptions import Interrupted, Interruptions
from cilnorm.storage.lock import busy, lock_folder
from cilnorm.storage.run_folder import LOCK, FolderError
from tests.experiment.test_runner import CPU, Event, bits, events
from tests.fake import Tiny

pytestmark = pytest.mark.slow

HOLD = """
import sys, time
from pathlib import Path
from cilnorm.storage.lock import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


# The lock


def test_a_second_process_is_refused_with_the_firsts_pid_and_host_and_a_dead_ones_lock_is_taken_over(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(FolderError) as caught, lock_folder(folder):
            pass
        first.kill()
    assert str(caught.value) == f"{folder}: process {first.pid} on {socket.gethostname()} is at work there"
    assert (folder / LOCK).exists()  # nobody took it away
    with lock_folder(folder):
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
    assert not (folder / LOCK).exists()


def test_whether_others_are_at_work_is_asked_without_a_lock(tmp_path: Path) -> None:
    assert busy(tmp_path / "run") is None
    assert not (tmp_path / "run").exists()
    with lock_folder(tmp_path):
        found = busy(tmp_path)
        assert found is not None
        assert found.here
        assert f"process {os.getpid()} on" in str(found)
    (tmp_path / LOCK).write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    assert busy(tmp_path) is None  # nobody holds it
    (tmp_path / LOCK).write_text(json.dumps({"pid": 7, "host": "elsewhere"}))
    found = busy(tmp_path)
    assert found is not None
    assert not found.here


def test_a_lock_of_another_host_is_left_to_a_person(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps({"pid": 7, "host": "elsewhere"}))
    refused = pytest.raises(FolderError, match="process 7 on elsewhere is at work there; if that one is dead, delete")
    with refused, lock_folder(tmp_path):
        pass
    assert (tmp_path / LOCK).exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x", "host": 1}', "[" * 100_000])
def test_a_lock_cut_short_names_nobody(content: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(content)
    with lock_folder(tmp_path):
        pass


def test_within_one_process_too(tmp_path: Path) -> None:
    with lock_folder(tmp_path), pytest.raises(FolderError, match=f"process {os.getpid()} on"), lock_folder(tmp_path):
        pass


def test_without_file_locks_a_living_process_is_respected_and_a_dead_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    for pid in (os.getpid(), done.pid):
        (tmp_path / LOCK).write_text(json.dumps({"pid": pid, "host": socket.gethostname()}))
        if pid == os.getpid():
            with pytest.raises(FolderError, match="is at work there"), lock_folder(tmp_path):
                pass
        else:
            with lock_folder(tmp_path):
                pass


@pytest.mark.parametrize("second", ["resume", "overwrite", "go on"])
def test_nobody_disturbs_a_run(second: str, tiny: Callable[..., Spec], registry: Registry, tmp_path: Path) -> None:
    spec, folder = tiny(tasks=1, epochs=1), tmp_path / "run"

    def disturb(event: Event) -> None:
        if event["event"] == "epoch":
            with pytest.raises(FolderError, match="is at work there"):
                intrude()

    def intrude() -> None:
        if second == "resume":
            resume(folder, registry=registry, **CPU)
        else:
            run(spec, folder, registry=registry, overwrite=True, go_on=second == "go on", **CPU)

    run(spec, folder, registry=registry, watch=[disturb], **CPU)


# Signals


def at_step(number: int, *acts: Callable[[], None]) -> Callable[[Event], None]:
    """Does things one after the other from the ``number``-th step on."""
    left, met = list(acts), 0

    def watch(event: Event) -> None:
        nonlocal met
        met += event["event"] == "step"
        if event["event"] == "step" and met >= number and left:
            left.pop(0)()

    return watch


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_waits_for_the_step_and_its_checkpoint(
    number: int, status: int, tiny: Callable[..., Spec], registry: Registry, tmp_path: Path
) -> None:
    spec, folder = tiny(method="two-phases", norm="tbbn"), tmp_path / "run"
    before = signal.getsignal(number)
    with pytest.raises(
        Interrupted, match=f"interrupted at task 2, epoch 1; `cilnorm resume {folder}` goes on"
    ) as caught:
        run(spec, folder, registry=registry, watch=[at_step(8, lambda: os.kill(os.getpid(), number))], **CPU)
    assert caught.value.status == status
    assert signal.getsignal(number) is before
    assert json.loads((folder / "summary.json").read_text())["state"] == "interrupted"
    assert torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["position"] == [1, 0, 0, 2]
    steps: list[Event] = []
    resume(folder, registry=registry, watch=[lambda e: steps.append(e) if e["event"] == "step" else None], **CPU)
    assert steps[0]["step"] == 3
    run(spec, tmp_path / "whole", registry=registry, **CPU)
    assert bits(folder) == bits(tmp_path / "whole")


def test_a_signal_in_the_last_step_of_an_epoch(tiny: Callable[..., Spec], registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(tiny(), tmp_path, registry=registry, watch=[at_step(3, lambda: os.kill(os.getpid(), signal.SIGINT))], **CPU)
    assert torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)["position"] == [0, 0, 1, 0]
    assert len(events(tmp_path, "epoch")) == 1


def test_the_second_signal_does_not_wait() -> None:
    def both() -> None:
        with stops.between_steps():
            signal.raise_signal(signal.SIGTERM)
            assert stops.due
            signal.raise_signal(signal.SIGINT)

    with Interruptions() as stops:
        assert not stops.due
        with pytest.raises(Interrupted, match="SIGINT"):
            both()


def test_outside_the_steps_a_signal_does_not_wait() -> None:
    with Interruptions(), pytest.raises(Interrupted, match="SIGTERM"):
        signal.raise_signal(signal.SIGTERM)


def test_handlers_of_others_and_other_threads_are_left_alone() -> None:
    def own(*_: object) -> None: ...

    before = signal.signal(signal.SIGTERM, own)
    try:
        with Interruptions():
            assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    failures: list[BaseException] = []

    def elsewhere() -> None:
        try:
            with Interruptions():
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert not failures


def test_checkpoints_within_epochs(tiny: Callable[..., Spec], registry: Registry, tmp_path: Path) -> None:
    """After every step: the same bits, and a kill loses no more than a step."""
    spec = tiny(method="two-phases", norm="tbbn", protocol="released")
    run(spec, tmp_path / "whole", registry=registry, **CPU)

    def stop() -> None:
        raise RuntimeError("power")

    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="power"):
        run(spec, folder, registry=registry, watch=[at_step(8, stop)], checkpoint_every=1e-9, **CPU)
    steps: list[Event] = []
    for number in (3, 3, 2, 1000):
        try:
            resume(folder, registry=registry, watch=[at_step(number, stop), steps.append], checkpoint_every=1e-9, **CPU)
        except RuntimeError:
            continue
    assert bits(folder) == bits(tmp_path / "whole")


# Causes


class End(BaseException):
    """What nobody foresees."""


@pytest.mark.parametrize("raised", [SystemExit(0), End("no more"), GeneratorExit()])
@pytest.mark.parametrize("where", ["loss", "forward", "remember"])
def test_what_a_plugin_raises_to_end_the_process_is_a_failure_of_the_run(
    where: str, raised: BaseException, tiny: Callable[..., Spec], registry: Registry, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def leave(*_: object) -> None:
        raise raised

    home = Tiny if where == "forward" else type(registry.methods["ft"].build())
    monkeypatch.setattr(home, where, leave)
    with pytest.raises(RunStopped) as caught:
        run(tiny(), tmp_path / "run", registry=registry, **CPU)
    reason = f"{type(raised).__name__}: {raised}".rstrip(": ")
    assert reason in str(caught.value)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["state"], summary["reason"]) == ("failed", reason)


@pytest.mark.parametrize("shelf", ["datasets", "methods", "norms", "backbones"])
def test_a_part_that_ends_the_process_while_it_is_built_is_an_error_that_names_it(
    shelf: str, tiny: Callable[..., Spec], registry: Registry, tmp_path: Path
) -> None:
    class Leaving:
        """A record's build; a method's is a dataclass for its spec."""

        __dataclass_fields__: dict[str, object] = {}  # noqa: RUF012

        def __call__(self, *_: object, **__: object) -> None:
            raise SystemExit(0)

    spec = tiny()
    name = getattr(spec, shelf[:-1])
    records = {**getattr(registry, shelf).records, name: replace(getattr(registry, shelf)[name], build=Leaving())}
    sick = replace(registry, **{shelf: replace(getattr(registry, shelf), records=records)})
    with pytest.raises(RuntimeError, match=f"{name}.*: SystemExit: 0"):
        run(spec, tmp_path / "run", registry=sick, **CPU)


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...\nand so on")


def out_of_ram(*_: object) -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried")


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken(*_: object) -> None:
    raise ZeroDivisionError("division by zero")


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (out_of_memory, "out of GPU memory: take fewer --rows (12:4 now), a lower precision or a smaller backbone"),
        (out_of_ram, "out of memory: take fewer --rows (12:4 now), a lower precision or a smaller backbone"),
        (broken, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_loss_that_raises(
    failure: Any, reason: str, tiny: Callable[..., Spec], registry: Registry, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    spec, folder = tiny(), tmp_path / "run"
    loss = type(registry.methods["ft"].build()).loss
    calls = iter(range(10))
    monkeypatch.setattr(
        type(registry.methods["ft"].build()), "loss", lambda me, step: failure() if next(calls) == 8 else loss(me, step)
    )
    with pytest.raises((RunStopped, ZeroDivisionError)) as caught:
        run(spec, folder, registry=registry, **CPU)
    monkeypatch.undo()
    summary = json.loads((folder / "summary.json").read_text())
    assert {key: summary[key] for key in ("state", "where", "reason")} == {
        "state": "failed", "where": "task 2, epoch 1", "reason": reason,
    }  # fmt: skip
    if isinstance(caught.value, RunStopped):
        assert str(caught.value) == f"task 2, epoch 1: {reason}; what was done is in {folder}"
    else:
        assert caught.value.__notes__ == [f"at task 2, epoch 1; what was done is in {folder}"]
    assert [event["reason"] for event in events(folder, "stopped")] == [reason]
    resume(folder, registry=registry, **CPU)
    run(spec, tmp_path / "whole", registry=registry, **CPU)
    assert bits(folder) == bits(tmp_path / "whole")


def test_a_loss_that_is_no_number_is_not_saved_within_the_epoch(
    tiny: Callable[..., Spec], registry: Registry, tmp_path: Path
) -> None:
    with pytest.raises(RunStopped, match="the term 'sour' of the loss became nan"):
        run(tiny(method="sour"), tmp_path, registry=registry, checkpoint_every=1e-9, **CPU)
    assert torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)["position"] == [1, 0, 0, 0]


def test_figures_that_can_not_be_drawn(
    tiny: Callable[..., Spec], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full once all tasks are learned."""
    spec, folder = tiny(tasks=1, epochs=1), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(runner, "draw_figures", full)
        with pytest.raises(RunStopped, match="after the last task: No space left on device"):
            run(spec, folder, registry=registry, **CPU)
    assert json.loads((folder / "summary.json").read_text())["where"] == "after the last task"
    steps: list[Event] = []
    resume(folder, registry=registry, watch=[lambda e: steps.append(e) if e["event"] == "step" else None], **CPU)
    assert not steps
    assert json.loads((folder / "summary.json").read_text())["state"] == "finished"


def test_a_disk_that_is_full_when_the_log_grows(
    tiny: Callable[..., Spec], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a line is written before the disk complains."""
    from cilnorm.storage.run_folder import RunFolder

    spec, folder = tiny(), tmp_path / "run"
    log, lines = RunFolder.log, iter(range(100))

    def filling(self: RunFolder, event: Event) -> None:
        if next(lines) >= 6:
            with open(self.path / "events.jsonl", "a") as file:
                file.write('{"time": 1.0, "event": "epo')
            full()
        log(self, event)

    monkeypatch.setattr(RunFolder, "log", filling)
    with pytest.raises(RunStopped, match="task 2, epoch 2: No space left on device"):
        run(spec, folder, registry=registry, **CPU)
    monkeypatch.undo()
    assert json.loads((folder / "summary.json").read_text())["reason"] == "No space left on device"
    resume(folder, registry=registry, **CPU)
    run(spec, tmp_path / "whole", registry=registry, **CPU)
    assert bits(folder) == bits(tmp_path / "whole")
