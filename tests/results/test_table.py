"""Tables: their arithmetic and their four shapes, and that a real one goes on after a kill."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cilnorm import api
from cilnorm import registry as registries
from cilnorm.cli.app import app
from cilnorm.cli.board import Board
from cilnorm.experiment.runner import run
from cilnorm.metrics import TABULATED
from cilnorm.registry import Registry, load
from cilnorm.results.table import Entry, best, to_csv, to_latex, to_markdown, verdicts
from cilnorm.spec import Spec, read_spec, to_yaml
from cilnorm.storage.lock import BUSY, lock_folder
from cilnorm.storage.run_folder import MARK
from cilnorm.sweep import workers
from cilnorm.sweep.jobs import Job, progress
from tests import fake
from tests.conftest import ROOT
from tests.strangers import distribute

pytestmark = pytest.mark.slow


def entry(norm: str, *final: float, method: str = "ft", published: float | None = None, **more: Any) -> Entry:
    """An entry whose metrics are all alike."""
    values = {metric: list(final) for metric in TABULATED}
    return Entry(method, norm, values, {} if published is None else dict.fromkeys(TABULATED, published), **more)


@pytest.mark.parametrize(
    ("values", "paper", "held"),
    [
        ((36.0,), 35.1, True),  # within a point
        ((36.2,), 35.1, False),
        ((34.0, 38.0, 39.0), 33.0, True),  # 4 apart, sd 2.65
        ((36.9, 37.0, 37.1), 35.41, False),
        ((), 35.41, None),
        ((36.0,), None, None),
    ],
)
def test_what_counts_as_reproduced(values: tuple[float, ...], paper: float | None, held: bool | None) -> None:
    assert entry("bn", *values, published=paper).reproduced("A_f") is held


def test_the_best_norm_is_sought_within_a_method_and_forgetting_is_best_when_low() -> None:
    entries = [
        entry("bn", 30.0, 31.0),
        entry("tbbn", 40.0, 41.0),
        entry("cn", 35.0, 36.0),
        entry("bn", 90.0, 91.0, method="eeil"),
    ]
    found = best(entries)
    assert found == {*(("ft", "tbbn", metric) for metric in ("A_f", "A_a", "A_l")), ("ft", "bn", "F")}
    assert not [name for name in found if name[0] == "eeil"]  # best of one says nothing


def test_only_a_difference_above_the_spread_is_bold() -> None:
    deviation = 2**-0.5  # of two seeds one point apart
    near, far = 40.0 - 0.9 * deviation, 40.0 - 1.1 * deviation
    for second, clear in ((near, False), (far, True), (40.0, False)):
        entries = [entry("tbbn", 39.5, 40.5), entry("bn", second, second), entry("cn", 20.0, 20.0)]
        assert (("ft", "tbbn", "A_f") in best(entries)) is clear
        assert ("**40.00" in to_markdown(entries, "x")) is clear
    assert not best([entry("tbbn", 40.0), entry("bn", 10.0, 10.1)])  # one seed has no spread
    for page in (to_markdown(entries, "x"), to_latex(entries, "x", "x")):
        assert "more than the larger of their two standard deviations over seeds" in page


def test_labels_are_escaped_in_every_format() -> None:
    entries = [entry("=1+1|`x`", 30.0, 31.0), entry("50% {a_b}", 40.0, 41.0, missing={3: "failed: <b> | c"})]
    page = to_markdown(entries, "a *title* | <b>")
    assert r"# a \*title\* \| \<b\>" in page
    assert r"| `ft` | `` =1+1\|`x` `` |" in page
    assert r"failed: \<b\> \| c." in page
    rows = list(csv.DictReader(io.StringIO(to_csv([*entries, entry("@SUM(A1)", 1.0, published=2.0)]))))
    assert {row["norm"] for row in rows} == {"'=1+1|`x`", "50% {a_b}", "'@SUM(A1)"}
    assert rows[-1]["difference"] == "-1.0000"  # a number that we wrote is no formula
    tex = to_latex(entries, "100 %", "my}table_%")
    assert r"50\% \{a\_b\}" in tex
    assert r"\label{tab:my-table-}" in tex


def test_the_four_shapes() -> None:
    why = {2: "failed: the disk is full"}
    entries = [entry("cn*", 35.0, 36.0, published=36.05), entry("tbbn", 40.0, 41.0, published=38.46, missing=why)]
    page = to_markdown(entries, "norms")
    assert "| `ft` | `tbbn` | 2 | **40.50 ± 0.71**<br>(38.46, +2.04 ✗) |" in page
    assert "35.50 ± 0.71<br>(36.05, -0.55 ✓)" in page
    assert "ft x tbbn, seed 2: failed: the disk is full." in page
    assert "4 of 8 published values are reproduced" in page
    rows = list(csv.DictReader(io.StringIO(to_csv(entries))))
    assert len(rows) == 8
    assert rows[4] == {
        "method": "ft", "norm": "tbbn", "metric": "A_f", "seeds": "2", "mean": "40.5000", "sd": "0.7071",
        "published": "38.4600", "difference": "2.0400", "reproduced": "no", "values": "40.0000 41.0000",
    }  # fmt: skip
    tex = to_latex(entries, "All of 100 %, a_b", "norms")
    assert r"\caption{All of 100 \%, a\_b}" in tex
    assert r"& tbbn & \textbf{40.50} {\scriptsize$\pm$0.71} & 38.46 & $+2.04$ &" in tex
    assert r"& cn$^*$ & 35.50 {\scriptsize$\pm$0.71} & 36.05 & $-0.55\,\checkmark$" in tex
    columns = tex.partition(r"\begin{tabular}{")[2].partition("}")[0]
    rows_of_cells = [line for line in tex.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert [line.count("&") for line in rows_of_cells] == [len(columns) - 1] * 3  # the heads below heads, two norms
    assert tex.count("{") == tex.count("}")


def test_a_table_without_published_values_says_so_and_shows_none() -> None:
    entries = [entry("bn", 30.0), Entry("ft", "tbbn", {metric: [] for metric in TABULATED}, {}, {0: "not begun"})]
    assert "paper" not in to_latex(entries, "", "x")
    assert "| `ft` | `tbbn` | 0 | – |" in to_markdown(entries, "x")
    lines = verdicts(entries)
    assert lines == [
        "ft x tbbn, seed 0: not begun",
        "nothing is compared with the paper: its values are for other data or another protocol",
    ]


def test_a_table_says_why_published_values_do_not_stand_beside_it() -> None:
    why, unknown = "lr 0.001, published with 0.1", "its rows can't be known"
    entries = [entry("bn", 30.0, note=why), entry("tbbn", 31.0, note=why)]
    assert verdicts(entries) == [f"not compared: {why}"]
    assert f"not compared: {why}." in to_markdown(entries, "norms")
    assert f"% not compared: {why}" in to_latex(entries, "", "norms").splitlines()
    entries += [entry("cn", 32.0, published=31.5, note=unknown), entry("gn", 1.0)]
    assert verdicts(entries)[1:] == [
        f"not compared: {why} (ft x bn, ft x tbbn)",
        f"the published value is compared, though {unknown} (ft x cn)",
    ]


# Jobs


@pytest.fixture
def job(tiny: Callable[..., Spec], tmp_path: Path) -> Job:
    return Job("ft x bn", tiny(), tmp_path / "cells" / "one")


def test_the_state_of_a_job_is_what_lies_on_the_disk(job: Job, registry: Registry) -> None:
    job.prepare(registry)
    assert (job.state, job.arguments()[0]) == ("new", "run")
    (job.folder / "checkpoints").mkdir(parents=True)
    assert (job.state, job.arguments()[0]) == ("new", "run")  # a process died before it wrote a file
    run(job.spec, job.folder, device="cpu", registry=registry)
    assert (job.state, job.arguments()) == ("finished", ["resume", str(job.folder)])
    assert progress(job.folder) == 1
    for state, expected in (("running", "interrupted"), ("interrupted", "interrupted"), ("failed", "failed")):
        (job.folder / "summary.json").write_text(json.dumps({"state": state, "reason": "so\nit is"}))
        assert job.state == expected
    assert job.reason == "so it is"
    (job.folder / "summary.json").write_text("{")
    job.log.write_text("a line\ncilnorm: no memory left\n")
    job.end(1)
    assert (job.state, job.reason) == ("failed", "no memory left")
    job.begin()
    job.end(130)
    assert job.state == "interrupted"
    for code in (143, 129, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT, BUSY):
        job.end(code)
        assert job.state == "interrupted"
    job.end(-9)
    assert job.reason == "killed by signal 9"


def test_a_place_taken_by_other_settings_is_refused(job: Job, registry: Registry, tiny: Any) -> None:
    job.prepare(registry)
    with pytest.raises(OSError, match="was begun with other settings"):
        Job("x", tiny(seed=1), job.folder).prepare(registry)


def test_a_run_of_the_same_spec_that_was_begun_by_other_means_is_taken_over(
    job: Job, registry: Registry, tiny: Any
) -> None:
    job.folder.mkdir(parents=True)
    (job.folder / MARK).write_text(to_yaml(job.spec))
    with pytest.raises(OSError, match="was begun with other settings"):
        Job("x", tiny(seed=1), job.folder).prepare(registry)
    job.prepare(registry)
    assert job.state == "interrupted"
    assert job.arguments() == ["resume", str(job.folder)]
    job.prepare(registry)  # and again, now that it is written down beside it


def test_progress_reads_the_end_of_a_log(tmp_path: Path) -> None:
    assert progress(tmp_path) == 0
    events = [{"event": "run", "tasks": 4}, {"event": "task", "task": 1}]
    events += [{"event": "epoch", "task": 2, "epoch": e, "of": 2000, "pad": "x" * 200} for e in range(1, 1001)]
    text = "".join(json.dumps(event) + "\n" for event in events)
    (tmp_path / "events.jsonl").write_text(text + '{"event": "accu')
    assert progress(tmp_path) == pytest.approx(1.5 / 4)


def test_a_long_first_task_weighs_as_much_as_it_takes(tiny: Callable[..., Spec], tmp_path: Path) -> None:
    spec = tiny(tasks=3, epochs=2, first_task=3.0)
    events = [{"event": "run", "tasks": 3, "sizes": [2, 2, 2]}, {"event": "accuracy", "task": 1}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    first, later = 6 * 48 / 16, 2 * 48 / 12  # epochs of batches of 16 rows; later ones have 12 current rows
    assert progress(tmp_path, spec) == pytest.approx(first / (first + 2 * later))
    assert progress(tmp_path) == pytest.approx(1 / 3)


def test_ctrl_c_stops_the_workers(job: Job, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that heeds it, one that does not."""
    job.prepare(registry)
    deaf = Job("deaf", job.spec, job.folder.with_name("deaf"))
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    code = {job: "", deaf: ignore}

    def sleeper(asked: Job, *_: object) -> list[str]:
        return [sys.executable, "-c", code[asked] + "import time; print('up', flush=True); time.sleep(60)"]

    def interrupt(*_: object) -> None:
        if all(each.log.exists() and each.log.read_text() for each in code):
            raise KeyboardInterrupt

    monkeypatch.setattr(workers, "command", sleeper)
    monkeypatch.setattr(workers, "PATIENCE", 1.0)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        workers.work([job, deaf], 2, [], interrupt)
    assert time.monotonic() - began < 30
    assert "KeyboardInterrupt" in job.log.read_text()
    assert job.state == deaf.state == "new"


def test_a_job_that_can_not_be_started_stops_no_other(
    job: Job, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log can't be written."""
    other = Job("other", job.spec, job.folder.with_name("other"))
    for each in (job, other):
        each.prepare(registry)
    job.log.mkdir()
    told: list[tuple[str, str]] = []
    monkeypatch.setattr(workers, "command", lambda *_: [sys.executable, "-c", ""])
    workers.work([job, other], 1, [], lambda each, what: told.append((each.label, what)))
    assert [each for each in told if each[1] != "running"] == [
        ("ft x bn", "ended"), ("other", "started"), ("other", "ended"),
    ]  # fmt: skip
    assert job.unfinished == f"failed: can't be started: {job.log}: Is a directory"
    job.log.rmdir()
    workers.work([job], 1, [], lambda *_: None)
    assert job.state == "new"  # the failure is forgotten


def test_a_busy_job_is_waited_for_after_the_others_and_never_failed(
    job: Job, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Job("other", job.spec, job.folder.with_name("other"))
    for each in (job, other):
        each.prepare(registry)
    told: list[tuple[str, str]] = []
    lock = ExitStack()
    lock.enter_context(lock_folder(job.folder))

    def watch(each: Job, what: str) -> None:
        if what != "running":
            told.append((each.label, what))
        if told[-1] == ("other", "ended"):
            assert "is at work there" in job.unfinished
            lock.close()

    monkeypatch.setattr(workers, "command", lambda *_: [sys.executable, "-c", ""])
    workers.work([job, other], 2, [], watch)
    assert told == [
        ("ft x bn", "busy"), ("other", "started"), ("other", "ended"), ("ft x bn", "started"), ("ft x bn", "ended"),
    ]  # fmt: skip
    assert job.state == "new"


def test_what_others_finished_meanwhile_is_not_done_again(
    job: Job, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.prepare(registry)
    job.end(-9)
    told = []

    def watch(_: Job, what: str) -> None:
        told.append(what)
        if what == "busy":
            (job.folder / "summary.json").write_text('{"state": "failed", "reason": "so it is"}')
            lock.close()

    lock = ExitStack()
    lock.enter_context(lock_folder(job.folder))
    monkeypatch.setattr(workers, "command", lambda *_: pytest.fail("it is done"))
    workers.work([job], 1, [], watch)
    assert told == ["busy", "ended"]
    assert job.reason == "so it is"  # not the failure before


def test_a_process_that_found_another_one_quicker_is_started_again(
    job: Job, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.prepare(registry)
    codes = iter([BUSY, BUSY, 0])
    monkeypatch.setattr(workers, "command", lambda *_: [sys.executable, "-c", f"raise SystemExit({next(codes)})"])
    told: list[str] = []
    workers.work([job], 1, [], lambda _, what: told.append(what))
    assert [what for what in told if what != "running"] == ["started"] * 3 + ["ended"]
    assert not job.reason


def test_a_lock_of_another_host_is_not_waited_for(job: Job, registry: Registry, site: Path) -> None:
    job.prepare(registry)
    job.folder.mkdir()
    (job.folder / "lock").write_text('{"pid": 7, "host": "elsewhere"}')
    told: list[str] = []
    workers.work([job], 1, [], lambda _, what: told.append(what))
    assert told == ["busy"]
    assert job.state == "new"
    busy = cilnorm("run", *job.arguments()[1:], "--device", "cpu")
    assert busy.exit_code == BUSY, busy.output
    assert "process 7 on elsewhere is at work there; if that one is dead, delete" in busy.stderr


@pytest.mark.skipif(os.name == "nt", reason="needs processes with parents")
def test_a_worker_dies_with_a_killed_parent_even_if_it_does_not_heed_ctrl_c() -> None:
    child = (
        "import os, signal, sys, time; from cilnorm.sweep import workers; workers.PATIENCE = 0.1; "
        "workers.die_with(os.getppid()); signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "print('up', flush=True); time.sleep(100)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.kill()
        began = time.monotonic()
        assert process.stdout.read() == b""  # until the child is gone
        assert time.monotonic() - began < 60


def test_the_cores_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert workers.worker_environment(3)["OMP_NUM_THREADS"] == "2"
    assert workers.worker_environment(20)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert workers.worker_environment(3)["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize("terminal", [False, True])
def test_the_board_shows_states(terminal: bool, tiny: Any, registry: Registry, tmp_path: Path) -> None:
    from rich.console import Console

    jobs = [
        Job(f"ft x {norm}", tiny(seed=seed), tmp_path / f"{norm}{seed}") for norm in ("bn", "[b]") for seed in (0, 1)
    ]
    for each in jobs:
        each.prepare(registry)
    run(jobs[0].spec, jobs[0].folder, device="cpu", registry=registry)
    stream = io.StringIO()
    with Board(jobs, jobs[1:], Console(file=stream, force_terminal=terminal, width=100, highlight=False)) as board:
        board(jobs[1], "started")
        board(jobs[1], "running")
        jobs[1].end(-9)
        board(jobs[1], "ended")
    told = stream.getvalue()
    assert "4 runs: 1 finished before, 3 to do" in told
    assert ("killed by signal 9" in told) != terminal
    assert ("waiting" in told) == terminal
    assert ("ft x [b]" in told) == terminal


# Whole tables


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fake plugin, for this process and for those that it starts."""
    distribute(tmp_path / "site", "fake", {}, {"fake": "tests.fake"})
    before = [str(tmp_path / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(before))
    monkeypatch.setattr(registries, "load", lambda strict=False: load(extra=[fake], strict=strict))
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL = {"backbone": "tiny", "dataset": "blobs", "tasks": 3, "memory": 24, "rows": [12, 4]}


def grid_file(path: Path, methods: list[str], epochs: int) -> None:
    path.write_text(yaml.safe_dump({"methods": methods, "norms": ["bn"], "set": {**SMALL, "epochs": epochs}}))


def cilnorm(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))


def test_a_dry_run_tries_every_method_with_every_norm_and_writes_nothing(site: Path) -> None:
    grid_file(site / "grid.yaml", ["ft", "lucir"], 12)
    before = sorted(site.rglob("*"))
    asked = ["table", "grid.yaml", "--preset", "quick", "--device", "cpu", "--seeds", "0,1", "--dry-run"]
    good = cilnorm(*asked)
    assert good.exit_code == 0, good.output
    assert good.output.count("can begin") == 2
    assert "4 runs, nothing trained or written" in good.output
    refused = cilnorm(*asked, "--set", "rows=[4000,16]")
    assert refused.exit_code == 1
    assert refused.output.count("a batch of 4016 rows, but") == 2
    assert "2 of 2 can't begin" in refused.output
    assert sorted(site.rglob("*")) == before


def test_a_killed_table_goes_on_reuses_what_is_there_and_reports_what_fails(site: Path, registry: Registry) -> None:
    grid_file(site / "grid.yaml", ["ft", "sour"], 12)
    asked = ["table", "grid.yaml", "--preset", "quick", "--workers", "2", "--out", "out", "--device", "cpu"]
    process = subprocess.Popen([sys.executable, "-c", "from cilnorm.cli.app import main; main()", *asked])
    until = time.monotonic() + 120
    while not (begun := [path.parent for path in site.glob("out/cells/ft-*/checkpoints/last.pt")]):
        assert time.monotonic() < until, "no cell got as far as a checkpoint"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    [folder] = [path.parent for path in begun]
    length = -1
    while length != (length := (folder / "events.jsonl").stat().st_size):
        time.sleep(0.5)  # its worker stops as well
    assert json.loads((folder / "summary.json").read_text())["state"] != "finished"

    again = cilnorm(*asked, "--retry-failed")  # whether "sour" failed before the kill depends on the machine
    assert again.exit_code == 1, again.output
    assert "1 of 2 runs failed" in again.stderr
    assert "sour x bn, seed 0: failed: task 2, epoch 1: the term 'sour' of the loss became nan" in again.stdout
    whole = run(read_spec(folder / "spec.yaml", registry), site / "whole", device="cpu", registry=registry)
    assert (folder / "accuracy.csv").read_text() == (whole.folder / "accuracy.csv").read_text()
    assert f"{whole.summary['A_f']:.2f}" in (site / "out" / "table.md").read_text()

    stamp = (folder / "summary.json").stat().st_mtime_ns
    third = cilnorm(*asked)
    assert "2 runs: 1 finished before, 0 to do; 1 failed before (--retry-failed tries them again)" in third.stdout
    assert (folder / "summary.json").stat().st_mtime_ns == stamp


def test_two_tables_in_one_folder_share_the_work_and_fail_nothing(site: Path) -> None:
    grid_file(site / "grid.yaml", ["ft"], 6)
    asked = ["table", "grid.yaml", "--seeds", "0,1", "--workers", "2", "--out", "out", "--device", "cpu"]
    start = [sys.executable, "-c", "from cilnorm.cli.app import main; main()", *asked]
    tables = [subprocess.Popen(start, stdout=subprocess.PIPE) for _ in range(2)]
    printed = [table.communicate()[0].decode() for table in tables]
    assert [table.returncode for table in tables] == [0, 0], printed
    assert not list(site.glob("out/cells/*.failed"))
    logs = [path.read_text().splitlines() for path in site.glob("out/cells/*/events.jsonl")]
    assert [sum('"event": "accuracy"' in line for line in log) for log in logs] == [3, 3]


def test_a_table_whose_cells_are_not_finished_says_so(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid_file(site / "grid.yaml", ["ft", "sour"], 1)
    monkeypatch.setattr(api, "work", lambda *_: None)
    done = cilnorm("table", "grid.yaml", "--out", "out", "--device", "cpu")
    assert done.exit_code == 1
    assert done.stderr == "cilnorm: 2 of 2 runs are not finished; the same command goes on\n"
    assert "ft x bn, seed 0: not begun" in done.stdout


def test_a_table_that_is_asked_to_stop_says_how_to_go_on(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid_file(site / "grid.yaml", ["ft"], 1)
    ends = [sys.executable, "-c", ""]
    monkeypatch.setattr(workers, "command", lambda *_: [signal.raise_signal(signal.SIGTERM), ends][1])
    done = cilnorm("table", "grid.yaml", "--out", "out", "--device", "cpu")
    assert done.exit_code == 143
    assert done.stderr == "cilnorm: interrupted by SIGTERM; the same command goes on\n"
    assert (site / "out" / "table.md").exists()


def test_seeds_without_a_folder_find_theirs_again(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []
    monkeypatch.setattr(api, "work", lambda jobs, *_: folders.extend(job.folder for job in jobs))
    asked = ("run", *(f"--set={key}={value}" for key, value in SMALL.items()), "--device", "cpu")
    for more in (("--seeds", "0,1"), ("--seeds", "1,2", "--seed", "7"), ("--seeds", "0", "--epochs", "3")):
        assert cilnorm(*asked, *more).exit_code == 1
    assert folders[0].parent == folders[2].parent != folders[4].parent
    assert [folder.name for folder in folders] == ["seed-0", "seed-1", "seed-1", "seed-2", "seed-0"]


def test_several_seeds_of_one_run(site: Path) -> None:
    asked = ("run", "--preset", "quick", *(f"--set={key}={value}" for key, value in SMALL.items()))
    result = cilnorm(*asked, "--epochs", "1", "--seeds", "0,1", "--workers", "2", "--out", "out", "--device", "cpu")
    assert result.exit_code == 0, result.output
    found = [json.loads((site / "out" / f"seed-{seed}" / "summary.json").read_text()) for seed in (0, 1)]
    assert found[0]["ece_new"] != found[1]["ece_new"]  # accuracies on so few images can agree
    assert f"{(found[0]['A_f'] + found[1]['A_f']) / 2:.2f} ± " in result.stdout
    assert (
        "2 runs: 2 finished before, 0 to do"
        in cilnorm(*asked, "--epochs", "1", "--seeds", "0,1", "--out", "out").stdout
    )
    other = cilnorm(*asked, "--epochs", "2", "--seeds", "0,1", "--out", "out")
    assert (other.exit_code, "was begun with other settings" in other.stderr) == (2, True)
    assert cilnorm(*asked, "--seeds", "0,x").exit_code == 2
