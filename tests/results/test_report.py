"""The page of results: what it shows, that it needs no network, that it takes any run for what it is."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cilnorm.cli.app import app
from cilnorm.experiment.runner import Result, run
from cilnorm.registry import Registry
from cilnorm.results import charts
from cilnorm.results.probe_section import recovery_table, task_distances
from cilnorm.results.reading import by_label, differing, read_result
from cilnorm.results.report import confused, draw, report
from cilnorm.storage.run_folder import FolderError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds of one spec, another method, and a run that stopped in its first task."""
    from cilnorm.spec import Settings, resolve
    from tests.conftest import TINY

    home = tmp_path_factory.mktemp("runs")
    for name, asked in (("a", {}), ("b", {"seed": 1}), ("c", {"method": "two-phases", "norm": "tbbn"})):
        spec = resolve("tiny", registry, Settings({"tiny": TINY}, {}), **asked)  # type: ignore[arg-type]
        run(spec, home / name, device="cpu", registry=registry)
    shutil.copytree(home / "a", home / "d")
    for name in ("accuracy.csv", "confusion.csv", "summary.json"):
        (home / "d" / name).unlink()
    return [home / name for name in "abcd"]


def test_a_run_is_read_back(finished: Result) -> None:
    result = read_result(finished.folder)
    assert result.matrix == finished.matrix
    assert (result.label, result.seed, result.summary) == ("ft x bn", 0, finished.summary)
    assert [(e["task"], e["epoch"]) for e in result.epochs] == [(t, e) for t in (1, 2, 3) for e in (1, 2)]
    assert result.speed
    assert 1 < result.speed < 1e5


def test_epochs_done_twice_count_once(finished: Result) -> None:
    log = finished.folder / "events.jsonl"
    lines = log.read_text().splitlines()
    again = [line for line in lines if '"task": 3' in line or '"run"' in line]
    log.write_text("\n".join([*lines, *again, '{"event": "epo']) + "\n")
    assert [(e["task"], e["epoch"]) for e in read_result(finished.folder).epochs] == [
        (t, e) for t in (1, 2, 3) for e in (1, 2)
    ]


def test_runs_of_one_spec_share_a_label_and_others_are_told_apart(folders: list[Path]) -> None:
    results = [read_result(folder) for folder in folders]
    assert {label: len(of) for label, of in by_label(results).items()} == {"ft x bn": 3, "two-phases x tbbn": 1}
    results[1].spec["schedule"]["lr"] = 0.5
    assert list(by_label(results[:2])) == ["ft x bn (lr 0.05)", "ft x bn (lr 0.5)"]
    assert differing([results[0].spec, results[1].spec]) == ["seed", "schedule.lr"]


def test_a_run_of_an_earlier_version_is_no_other_kind_of_run(folders: list[Path], tmp_path: Path) -> None:
    """Its spec lacks fields that were added since."""
    before = shutil.copytree(folders[0], tmp_path / "before")
    spec = yaml.safe_load((before / "spec.yaml").read_text())
    assert spec["protocol"].pop("batches") == "stratified"
    assert spec.pop("increment", 0) is None
    del spec["statistics"]
    (before / "spec.yaml").write_text(yaml.safe_dump(spec))
    assert list(by_label([read_result(before), read_result(folders[1])])) == ["ft x bn"]


def test_an_option_stands_in_the_label_of_those_that_have_it(folders: list[Path]) -> None:
    results = [read_result(folder) for folder in folders[:2]]
    results[1].spec["norm_options"] = {"momentum": 0.2}
    assert list(by_label(results)) == ["ft x bn", "ft x bn (momentum 0.2)"]


def test_the_confusion_of_old_and_new(finished: Result) -> None:
    result = read_result(finished.folder)
    result.confusion[2][:] = [[10, 20, 10], [4, 36, 0], [5, 15, 20]]
    curves = confused(result)
    assert curves["old as new"][-1] == (3, 100 * 10 / 80)
    assert curves["old as other old"][-1] == (3, 100 * 24 / 80)
    assert curves["new as old"][-1] == (3, 50)


def test_the_page_stands_alone_and_shows_every_part(folders: list[Path]) -> None:
    results = [read_result(folder) for folder in folders]
    page = report(results)
    assert not re.search(r"(?:src|href)\s*=|url\(|@import|https?://", page)
    for heading in ("Results", "What differs", "Accuracy", "Forgetting", "Accuracy matrices", "Old and new",
                    "Confusion of tasks", "Loss terms", "Speed", "Settings and environment"):  # fmt: skip
        assert f"<h2>{heading}</h2>" in page
    assert "4 runs on blobs, 3 of them finished." in page
    assert f"<td>{results[0].summary['A_f']:.2f}</td>" in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(svg)  # well-formed
        assert "nan" not in svg


def test_what_a_file_says_is_text_and_never_markup(finished: Result) -> None:
    spec = yaml.safe_load((finished.folder / "spec.yaml").read_text())
    spec["norm"] = "<script>alert(1)</script>"
    (finished.folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    page = report([read_result(finished.folder)], "<b>title</b>")
    assert page.count("<script>") == 1
    assert "<b>title" not in page


def test_a_run_without_a_result_still_has_a_page(folders: list[Path]) -> None:
    page = report([read_result(folders[3])])
    assert "Loss terms" in page
    assert "Accuracy matrices" not in page


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("spec.yaml", "[1", "no YAML that can be read"),
        ("spec.yaml", "3", "is no spec of a run"),
        ("accuracy.csv", "x\n1,two\n", "accuracy.csv: can't be read"),
        ("summary.json", "{", "summary.json: can't be read"),
        ("confusion.csv", "x\n1,1,x\n", "confusion.csv: can't be read"),
        ("events.jsonl", '{"event": "epoch"}\n', "events.jsonl: can't be read"),
    ],
)
def test_damaged_files_are_named(name: str, content: str, message: str, finished: Result) -> None:
    (finished.folder / name).write_text(content)
    with pytest.raises(FolderError) as caught:
        read_result(finished.folder)
    assert message in str(caught.value)


def test_the_command_and_its_figures(folders: list[Path], tmp_path: Path) -> None:
    arguments = ["report", *map(str, folders), "--out", str(tmp_path / "r.html"), "--figures", str(tmp_path / "f")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "r.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    names = {path.name for path in (tmp_path / "f").iterdir()}
    stems = {"accuracy", "newest", "first", "forgetting", "old-as-new", "matrix-ft-x-bn", "matrix-two-phases-x-tbbn"}
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg", "pdf")}
    missing = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert (missing.exit_code, "holds no run" in missing.stderr) == (2, True)


def test_figures_of_nothing_are_none(folders: list[Path], tmp_path: Path) -> None:
    assert draw([read_result(folders[3])], tmp_path) == []


# Charts


def numbers(svg: str, attribute: str, of: str) -> list[float]:
    return [float(node.get(attribute, "nan")) for node in ET.fromstring(svg).iter(of)]


def test_a_line_rises_as_its_values_do() -> None:
    svg = charts.lines({"a & b": [[(1, 0.0), (2, 50.0), (3, 100.0)]]}, "x", "y", 100)
    marks = [node.get("transform", "") for node in ET.fromstring(svg).iter("path") if node.get("transform")]
    places = [tuple(map(float, mark.removeprefix("translate(").rstrip(")").split())) for mark in marks]
    xs, ys = [x for x, _ in places], [y for _, y in places]
    assert xs == sorted(xs)
    assert ys == sorted(ys, reverse=True)
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2])
    assert "a &amp; b: 2, 50.00" in svg


def test_curves_and_their_legend_differ_in_their_mark() -> None:
    svg = charts.lines({str(at): [[(1, float(at))]] for at in range(10)}, "x", "y")
    marks = [(node.get("class"), node.get("d")) for node in ET.fromstring(svg).iter("path") if node.get("transform")]
    assert len({shape for _, shape in marks[:8]}) == 8
    assert len(set(marks)) == 10
    legends = [ET.fromstring(charts.legend_mark(at)).find("path") for at in range(10)]
    assert [(mark.get("class"), mark.get("d")) for mark in legends if mark is not None] == marks


def test_a_heat_map_shows_one_decimal() -> None:
    assert ">0.3</text>" in charts.heat_map([[0.25]], "x", "y")


@pytest.mark.parametrize(
    "draw_it",
    [
        lambda: charts.lines({"a": [[(1, 5.0)]]}, "x", "y"),
        lambda: charts.lines({"a": [[(1, float("nan")), (2, 1.0)]]}, "x", "y"),
        lambda: charts.lines({"a": [], "b": [[(0, -3.0), (1e6, 1e-9)]]}, "x", "y"),
        lambda: charts.lines({}, "x", "y"),
        lambda: charts.bars({"a": [-3.0, 4.0], "b": [0.0]}, ["1", "2"], "x", "y"),
        lambda: charts.bars({}, [], "x", "y"),
        lambda: charts.heat_map([[0.0], [100.0, 130.0]], "x", "y"),
        lambda: charts.heat_map([[float(u) for u in range(50)] for _ in range(50)], "x", "y"),
    ],
)
def test_no_values_break_a_chart(draw_it: Callable[[], str]) -> None:
    svg = draw_it()
    ET.fromstring(svg)
    assert "nan" not in svg
    assert "inf" not in svg


@pytest.mark.parametrize(("low", "high"), [(0, 100), (0, 1), (1, 10), (0.2, 0.21), (-5, 3), (0, 12345)])
def test_ticks_are_few_round_and_within(low: float, high: float) -> None:
    ticks = charts._ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert low - 1e-9 <= ticks[0]
    assert ticks[-1] <= high + 1e-9


def test_a_report_of_many_runs_is_light(folders: list[Path]) -> None:
    results: list[Any] = [read_result(folder) for folder in folders] * 10
    page = report(results)
    assert len(page) < 1_000_000


def test_settings_stand_in_rows(folders: list[Path]) -> None:
    page = report([read_result(folders[2])])
    for key, value in (("norm", "tbbn"), ("lr", "0.05"), ("flip", "true"), ("rows", "[12, 4]"), ("strength", "1.0")):
        assert f'<tr><th scope="row">{key}</th><td>{value}</td></tr>' in page.replace("&#34;", '"')
    for title in ("run", "schedule", "method options", "protocol", "environment", "packages"):
        assert f"<h3>{title}</h3>" in page
    assert "<details open>" in page
    assert "<details open>" not in report([read_result(folder) for folder in folders])


PROBE = {
    "accuracy": {
        "before": [40.0, 50.0, 90.0], "statistics": [50.0, 60.0, 80.0], "affine": [45.0, 45.0, 90.0],
        "both": [60.0, 70.0, 85.0],
    },
    "layers": [
        {"layer": f"norm{depth}", "images": kind, "mean": 0.1 * depth, "scale": 0.2}
        for depth in (1, 2, 3) for kind in ("all", "old", "new")
    ],
    "settings": {"epochs": 5},
}  # fmt: skip


def test_the_probe_is_a_section_where_there_is_one(finished: Result) -> None:
    assert "Probe of the norm layers" not in report([read_result(finished.folder)])
    place = finished.folder / "probes" / "bn-bias.json"
    place.parent.mkdir()
    place.write_text(json.dumps(PROBE))
    page = report([read_result(finished.folder)])
    assert "Probe of the norm layers" in page
    assert page.count("<h3>Distance of running") == 2
    assert "Distance from each task" not in page  # in no file of an earlier version
    tasks = [
        {"layer": f"norm{depth}", "images": "task", "task": task, "mean": depth * task, "scale": 0.5}
        for task in (1, 2) for depth in (1, 3)
    ]  # fmt: skip
    assert task_distances({"tasks": tasks}) == {
        "running means": [(1.0, 2.0), (2.0, 4.0)],
        "running deviations": [(1.0, 0.5), (2.0, 0.5)],
    }
    place.write_text(json.dumps({**PROBE, "tasks": tasks}))
    again = report([read_result(finished.folder)])
    assert again.count("<h3>Distance from each task") == 1
    assert again.count("<h3>Distance of running") == 2
    rows = recovery_table([("it", PROBE)])["rows"]
    assert [row[1:] for row in rows] == [
        ["before", "45.0", "90.0", "60.0", "–", "–"],
        ["statistics", "55.0", "80.0", "63.3", "+10.0", "50 %"],
        ["affine", "45.0", "90.0", "60.0", "+0.0", "0 %"],
        ["both", "65.0", "85.0", "71.7", "+20.0", "100 %"],
    ]
    lost = json.dumps({**PROBE, "tasks": [{}]})
    for damaged in (lost, "{", "[]", '{"accuracy": {}, "layers": []}', '{"accuracy": {"before": [1]}, "layers": [{}]}'):
        place.write_text(damaged)
        assert "Probe of the norm layers" not in report([read_result(finished.folder)])


def test_nothing_recovered_has_no_part() -> None:
    worse = {"accuracy": {"before": [50.0, 85.0], "affine": [60.0, 85.0], "both": [40.0, 60.0]}, "layers": []}
    assert [row[-1] for row in recovery_table([("it", worse)])["rows"]] == ["–", "–", "–"]
