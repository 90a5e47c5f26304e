"""Whatever is cut short, a run goes on to the same bits: every method, every norm, every write, real kills."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.chaos import chaos, results
from cilnorm.experiment import runner
from cilnorm.experiment.runner import resume, run
from cilnorm.registry import Registry, load
from cilnorm.spec import Spec, resolve
from cilnorm.storage.run_folder import FolderError, RunFolder
from cilnorm.training.fast_engines import CompiledEngine
from tests import fake
from tests.experiment.test_runner import CPU, Event
from tests.training.test_engine import Remembered

pytestmark = pytest.mark.slow

SHELVES = load(extra=[fake])
METHODS = [name for name in SHELVES.methods if name not in ("two-phases", "sour")]
Tiny = Callable[..., Spec]


class Kill(BaseException):
    """Ends the process, as far as the code in it can tell: nothing catches it."""


@pytest.fixture(autouse=True, scope="module")
def _no_last_words() -> Iterator[None]:
    """A process that is killed records no failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "record_failure", lambda *_, **__: nullcontext())
        yield


def killed_at(*numbers: int) -> Callable[[Event], None]:
    """A watcher that kills at these steps, counted through the run."""
    met = 0

    def watch(event: Event) -> None:
        nonlocal met
        met += event["event"] == "step"
        if event["event"] == "step" and met in numbers:
            raise Kill

    return watch


def killed_often(spec: Spec, folder: Path, registry: Registry, every: int) -> None:
    """Run and resume, each process saving after each step and dying after so many; whole at the end."""
    for _ in range(1000):
        try:
            run(spec, folder, registry=registry, watch=[killed_at(every)], go_on=True, checkpoint_every=1e-9, **CPU)
        except Kill:
            continue
        return
    raise AssertionError("it never ends")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_every_phase(method: str, tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    """A process of three steps each, so that some end in, before and after every phase."""
    options: dict[str, Any] = {"eeil": {"gradient_noise": 0.3}, "lucir": {"balanced_epochs": 0.5}}.get(method, {})
    spec = tiny(method=method, norm="tbbn", tasks=2, **options)
    run(spec, tmp_path / "whole", registry=registry, **CPU)
    killed_often(spec, tmp_path / "run", registry, 3)
    assert results(tmp_path / "run") == results(tmp_path / "whole")


@pytest.mark.parametrize("norm", SHELVES.norms)
def test_every_norm(norm: str, tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    tuned = {f"norm.{option}": values[0] for option, values in SHELVES.norms[norm].tune.items()}
    spec = tiny(method="ft", norm=norm, tasks=2, epochs=1, **tuned)
    run(spec, tmp_path / "whole", registry=registry, **CPU)
    killed_often(spec, tmp_path / "run", registry, 3)
    assert results(tmp_path / "run") == results(tmp_path / "whole")


@pytest.mark.filterwarnings("error:.*going on eagerly")
@pytest.mark.parametrize("engine", ["graph", "compile"])
def test_every_engine(
    engine: str, tiny: Tiny, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within epochs; the graph is a capture without a GPU, the compiler one that writes no code."""
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: plain(module, backend="aot_eager"))
    made = {"graph": Remembered, "compile": CompiledEngine}[engine]
    monkeypatch.setattr(runner, "engine_class", lambda *_: made)
    spec = tiny(method="two-phases", norm="tbbn", tasks=2)
    run(spec, tmp_path / "whole", registry=registry, **CPU)
    killed_often(spec, tmp_path / "run", registry, 3)
    torch.compiler.reset()
    assert results(tmp_path / "run") == results(tmp_path / "whole")


# Each write


@pytest.fixture(scope="module")
def short(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> tuple[Spec, dict[str, Any]]:
    """A run with two tasks, two phases and few writes, and what it leaves."""
    from cilnorm.spec import Settings
    from tests.conftest import TINY

    asked = {"method": "two-phases", "norm": "tbbn", "tasks": 2, "epochs": 1}
    spec = resolve("tiny", registry, Settings({"tiny": TINY}, {}), **asked)
    folder = run(spec, tmp_path_factory.mktemp("short") / "run", registry=registry, **CPU).folder
    return spec, results(folder)


def killing(call: Callable[..., Any], number: int, before: bool) -> Callable[..., Any]:
    """``call``, but the process dies before or after its ``number``-th time."""
    times = iter(range(10_000))

    def instead(*arguments: Any, **keywords: Any) -> Any:
        last = next(times) == number
        if last and before:
            raise Kill
        answer = call(*arguments, **keywords)
        if last:
            raise Kill
        return answer

    return instead


@pytest.mark.parametrize(("call", "every"), [("replace", 1), ("fsync", 3)])
def test_killed_during_each_write(
    call: str,
    every: int,
    short: tuple[Spec, dict[str, Any]],
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec, whole = short
    number = 0
    while True:
        folder = tmp_path / str(number)
        monkeypatch.setattr(os, call, killing(getattr(os, call), number, before=number % 2 == 0))
        try:
            run(spec, folder, registry=registry, **CPU)
        except Kill:
            monkeypatch.undo()
        else:
            break
        (folder / ".last.pt.left-by-a-kill.part").write_bytes(b"half")
        run(spec, folder, registry=registry, go_on=True, **CPU)
        assert results(folder) == whole, f"{call} {number}"
        assert not list(folder.rglob(".*"))
        number += every
    assert number > 12


def test_half_a_line_in_the_log(short: tuple[Spec, dict[str, Any]], registry: Registry, tmp_path: Path) -> None:
    spec, whole = short
    with pytest.raises(Kill):
        run(spec, tmp_path, registry=registry, watch=[killed_at(7)], **CPU)
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"event": "epoch", "task": 9}\n{"event": "epo')
    resume(tmp_path, registry=registry, **CPU)
    assert results(tmp_path) == whole


@pytest.mark.parametrize("kept", [0, 150])
def test_a_log_shorter_than_the_checkpoint_knows(
    kept: int, short: tuple[Spec, dict[str, Any]], registry: Registry, tmp_path: Path
) -> None:
    """Somebody emptied it; the run goes on all the same."""
    spec, whole = short
    with pytest.raises(Kill):
        run(spec, tmp_path, registry=registry, watch=[killed_at(7)], **CPU)
    os.truncate(tmp_path / "events.jsonl", kept)
    resume(tmp_path, registry=registry, **CPU)
    found = results(tmp_path)
    assert found["weights"] == whole["weights"]
    assert found["losses"] == whole["losses"][-len(found["losses"]) :]


def test_a_damaged_newest_checkpoint(short: tuple[Spec, dict[str, Any]], registry: Registry, tmp_path: Path) -> None:
    spec, whole = short
    with pytest.raises(Kill):
        run(spec, tmp_path, registry=registry, watch=[killed_at(9)], **CPU)
    os.truncate(tmp_path / "checkpoints" / "last.pt", 1000)
    heard: list[Event] = []
    resume(tmp_path, registry=registry, watch=[heard.append], **CPU)
    assert "going on from the checkpoint before it" in heard[0]["text"]
    assert heard[0]["event"] == "warning"
    assert results(tmp_path) == whole


# Going on, or starting


def test_results_outlive_their_checkpoints(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    spec = tiny(tasks=1, epochs=1)
    run(spec, tmp_path, registry=registry, **CPU)
    shutil.rmtree(tmp_path / "checkpoints")
    files = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file() and path.name != "lock"}
    for again in (resume, partial(run, spec, go_on=True)):
        with pytest.raises(FolderError, match="is finished, and its checkpoints are gone"):
            again(tmp_path, registry=registry, **CPU)
    assert {path: path.read_bytes() for path in files} == files
    assert run(spec, tmp_path, registry=registry, overwrite=True, **CPU).matrix


def test_run_goes_on_with_the_same_spec_alone(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    spec = tiny(tasks=1, epochs=1)
    run(spec, tmp_path, registry=registry, go_on=True, **CPU)
    before = results(tmp_path)
    run(spec, tmp_path, registry=registry, go_on=True, **CPU)
    assert results(tmp_path) == before
    with pytest.raises(FolderError, match="holds a run of another spec; give --overwrite or another --out"):
        run(tiny(tasks=1, epochs=1, seed=1), tmp_path, registry=registry, go_on=True, **CPU)


def test_a_folder_that_was_begun_without_its_spec_is_started(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    for name in ("checkpoints", "figures"):
        (tmp_path / name).mkdir()
    (tmp_path / ".spec.yaml.abc.part").write_text("half")
    run(tiny(tasks=1, epochs=1), tmp_path, registry=registry, go_on=True, **CPU)
    (tmp_path / "checkpoints" / "thesis.tex").touch()
    (tmp_path / "spec.yaml").unlink()
    with pytest.raises(FolderError, match="holds other files"):
        run(tiny(tasks=1, epochs=1), tmp_path, registry=registry, go_on=True, **CPU)


def test_a_tuned_run_is_known_by_what_was_asked(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    spec = tiny(norm="cn*", tasks=2, epochs=1)
    run(spec, tmp_path, registry=registry, **CPU)
    trials: list[Event] = []
    watch = [lambda event: trials.append(event) if event["event"] == "trial" else None]
    run(spec, tmp_path, registry=registry, go_on=True, watch=watch, **CPU)
    assert not trials


def test_a_preset_of_somebody_else_names_no_other_folder(tiny: Tiny) -> None:
    from dataclasses import replace

    from cilnorm.storage.run_folder import default_folder

    folder = default_folder(replace(tiny(), preset="../../etc/passwd\0"))
    assert folder.parent == Path("runs")
    assert "\0" not in folder.name


def test_the_log_is_cut_at_a_line(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"a": 1}\n{"b": 2}\n{"c"')
    for logged, left in ((10**18, 2), (18, 2), (17, 1), (9, 1), (3, 0)):
        RunFolder(tmp_path).reopen(logged, [])
        assert (tmp_path / "events.jsonl").read_text().count("\n") == left


# Processes


def test_twenty_kills_of_real_processes_change_nothing(tmp_path: Path) -> None:
    tally = chaos(20, tmp_path, cases=(("lucir", "tbbn"),), tasks=5)
    assert (tally.kills, tally.differences) == (20, [])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that are forked")
def test_no_number_is_lost_when_one_of_two_processes_is_killed_at_random_instants(tmp_path: Path) -> None:
    """Where one is killed before both have met, the other misses it after a quarter of a minute."""
    tally = chaos(3, tmp_path, cases=(("lucir", "tbbn"),), ranks=2, tasks=2)
    assert tally.kills == 3
    assert tally.finished >= 1
    assert not tally.differences
