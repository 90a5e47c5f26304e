"""Tuning: what may be searched, that trials keep off the stream that is evaluated, and that a stopped one goes on."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("optuna")

from cilnorm import api
from cilnorm.cli.app import app
from cilnorm.experiment import runner
from cilnorm.experiment.tuning import candidates
from cilnorm.registry import Registry
from cilnorm.spec import Settings, SpecError, resolve
from cilnorm.storage.own_files import FolderError
from cilnorm.sweep import jobs, tuning
from cilnorm.sweep.jobs import Job
from cilnorm.sweep.search import Dimension, read_search
from cilnorm.sweep.tuning import Tuning
from tests.conftest import TINY

pytestmark = pytest.mark.slow

Make = Callable[..., Tuning]
TWO = read_search(["schedule.lr=log:0.01:0.5", "schedule.momentum=0.5,0.9"])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("groups=4,8,16", Dimension("groups", (4, 8, 16))),
        ("rows=12:4,8:8", Dimension("rows", ("12:4", "8:8"))),
        ("milestones=[1],[1, 2]", Dimension("milestones", ([1], [1, 2]))),
        ("norm=bn,tbbn", Dimension("norm", ("bn", "tbbn"))),
        ("schedule.lr=log:0.01:0.5", Dimension("schedule.lr", low=0.01, high=0.5, log=True)),
        ("momentum=uniform:0:0.9", Dimension("momentum", low=0, high=0.9)),
        ("epochs=uniform:2:10", Dimension("epochs", low=2, high=10, whole=True)),
    ],
)
def test_what_may_be_searched(text: str, found: Dimension) -> None:
    assert read_search([text]) == [found]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "nothing to choose: --search takes KEY=4,8,16"),
        (["lr"], "--search takes KEY=4,8,16"),
        (["lr="], "--search takes"),
        (["lr=0.1"], "one value is no choice"),
        (["lr=log:0:1"], "above 0"),
        (["lr=uniform:2:1"], "the first number must be the smaller one"),
        (["lr=log:0.1"], "log takes two numbers"),
        (["lr=log:nan:1"], "the first number must be"),
        (["lr=1,2", "lr=3,4"], "lr stands there twice"),
        (["seed=1,2"], "it is no hyperparameter"),
        (["class_order=1,2"], "it is no hyperparameter"),
        (["lr=[1,"], "no YAML that can be read"),
    ],
)
def test_what_may_not(texts: list[str], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        read_search(texts)
    assert said in str(caught.value)


@pytest.fixture
def make(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A tuning of the tiny preset, whose runs go on in this process."""

    def resolved(preset: str, shelves: Registry, **asked: Any) -> Any:
        return resolve(preset, shelves, Settings({"tiny": TINY}, {}), **asked)

    def work(todo: Sequence[Job], workers: int, flags: object, watch: object) -> None:
        for job in todo:
            job.begin()
            try:
                runner.run(job.spec, job.folder, device="cpu", registry=registry, go_on=True)
            except Exception as error:
                job.fail(f"{type(error).__name__}: {error}")

    monkeypatch.setattr(tuning, "resolve", resolved)
    monkeypatch.setattr(api, "work", work)
    monkeypatch.setattr(jobs, "read_spec", lambda path, shelves: resolve_file(path, registry))
    monkeypatch.setattr(runner, "draw_figures", lambda *_: None)

    def made(search: Sequence[Dimension] = TWO, **named: Any) -> Tuning:
        named = {"asked": {"tasks": 2, "epochs": 1, "stop_after": 1}, "on": {}, "trials": 3, **named}
        return Tuning(tmp_path / "tuning", "tiny", search=search, registry=registry, **named)

    return made


def resolve_file(path: Path, registry: Registry) -> Any:
    from cilnorm.spec import read_spec

    return read_spec(path, registry)


def test_trials_keep_off_the_stream_that_is_evaluated(make: Make) -> None:
    plain = make()
    plain.check()
    trial, [evaluated] = plain.trial_spec(plain.first), plain.evaluation(plain.first)
    assert (trial.seed, evaluated.seed) == (1000, 0)
    assert (trial.protocol.score, trial.protocol.validation) == ("validation", 0.1)
    assert evaluated.protocol.score == "test"
    for asked, on in (
        ({"class_order": 7}, {}),  # the seed draws no order then
        ({}, {"seed": 0}),
        ({}, {"class_order": 0}),  # what the seed 0 draws
        ({"class_order": 7}, {"class_order": 7, "seed": 3}),
        ({"class_order": [4, 0, 1, 2, 3, 5]}, {"class_order": [4, 0, 1, 2, 3, 5]}),
    ):
        with pytest.raises(SpecError, match="in the same order of classes"):
            make(asked=asked, on=on).check()
        make(asked=asked, on=on, same_stream=True).check()
    make(asked={"class_order": 7}, on={"class_order": 8}).check()
    make(asked={"class_order": 7}, on={"dataset": "numerals"}).check()
    with pytest.raises(SpecError, match=r"\(seed 1000\)"):
        make(seeds=(0, 1000)).check()


def test_a_list_and_a_seed_that_draw_the_same_order_are_the_same(make: Make) -> None:
    from cilnorm.training.protocol import class_order

    drawn = list(class_order(6, 7))
    with pytest.raises(SpecError, match="in the same order of classes"):
        make(asked={"class_order": 7}, on={"class_order": drawn}).check()


def test_keys_are_looked_at_before_anything_runs(make: Make) -> None:
    with pytest.raises(SpecError, match="no key called 'momentun'"):
        make(read_search(["momentun=1,2"])).check()
    with pytest.raises(SpecError, match="lr is both set and searched for"):
        make(read_search(["lr=0.1,0.2"]), asked={"lr": 0.3}).check()


def do(todo: Sequence[Job]) -> None:
    api.Sweep("", "", Path(), (), todo).run()


def test_the_command_refuses_what_would_flatter(registry: Registry, tmp_path: Path) -> None:
    def complaint(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["tune", "--out", str(tmp_path / "out"), *arguments])
        assert result.exit_code == 2, result.output
        return str(result.stderr)

    assert "or say --same-stream" in complaint("--search", "lr=0.1,0.2", "--on", "seed=0")
    assert "no metric called 'A_g'" in complaint("--search", "lr=0.1,0.2", "--metric", "A_g")
    assert "no key called 'lrr'" in complaint("--search", "lrr=0.1,0.2")
    assert not list(tmp_path.iterdir())


def test_without_optuna_it_says_what_to_install(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"pip install 'cilnorm\[tune\]'"):
        make().check()


def test_the_choice_of_cn_s_groups_is_a_case_of_it(make: Make, registry: Registry) -> None:
    """The trials that a run of cn* makes by itself, and those of docs/tuning.md."""
    search = read_search(["norm.groups=4,8,16,32"])
    same = make(search, asked={"norm": "cn"}, on={"stop_after": 2}, same_stream=True, trials=None)
    starred = resolve("tiny", registry, Settings({"tiny": TINY}, {}), norm="cn*")
    expected = [replace(spec, norm="cn") for _, spec in candidates(starred, "groups", registry)]
    assert [same.trial_spec(values) for values in same.combinations] == expected


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_tuning_chooses_evaluates_and_says_how_to_repeat_it(make: Make) -> None:
    told: list[str] = []
    found = api.tune(make(seeds=(0, 1), tell=told.append))
    assert len(told) == len(found.trials) == 3
    assert told[0].startswith("trial 1: schedule.lr ")
    scores = [trial.score for trial in found.trials]
    assert scores == sorted(scores, key=lambda score: -(score or 0))
    for trial in found.trials:
        assert trial.score == read(trial.folder / "summary.json")["A_f"]
    result = read(found.path)
    best = result["best"]["values"]
    assert result["best"]["held_out"] == scores[0]
    assert result["trials_on"] == {"seed": 1000}
    assert [read(job.folder / "summary.json")["A_f"] for job in found.winner.jobs] == result["evaluated"]["A_f"]
    assert [job.spec.schedule.lr for job in found.winner.jobs] == [best["schedule.lr"]] * 2
    assert all(job.spec.protocol.score == "test" for job in found.winner.jobs)
    words = shlex.split(found.command)
    assert words[:4] == ["cilnorm", "run", "--preset", "tiny"]
    assert words[-2:] == ["--seeds", "0,1"]
    assert f"schedule.lr={best['schedule.lr']}" in words


def test_a_stopped_tuning_goes_on_and_ends_the_same(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make().run(do)
    other = replace(make(), folder=make().folder.with_name("stopped"))
    begun: list[Job] = []

    def stop_at_the_second(todo: Sequence[Job]) -> None:
        begun.extend(todo)
        if len(begun) == 2:
            raise KeyboardInterrupt
        do(todo)

    with pytest.raises(KeyboardInterrupt):
        other.run(stop_at_the_second)
    again: list[Job] = []

    def go_on(todo: Sequence[Job]) -> None:
        again.extend(todo)
        do(todo)

    ended = other.run(go_on)
    assert again[0].spec == begun[1].spec  # the one that was under way
    assert len(again) == 2
    assert [(t.number, t.values, t.score) for t in ended] == [(t.number, t.values, t.score) for t in whole]
    assert other.run(lambda todo: pytest.fail("all are there")) == ended
    with pytest.raises(FolderError, match="holds another tuning"):
        replace(other, asked={"tasks": 2}).run(go_on)


def test_lists_are_gone_through_in_order_and_what_does_not_fit_is_no_candidate(make: Make) -> None:
    search = read_search(["rows=0:4,12:4"])
    found = make(search, trials=None).run(do)
    assert [(trial.number, trial.values["rows"]) for trial in found] == [(1, "12:4"), (0, "0:4")]
    assert found[1].score is None
    assert "a mixed batch needs rows of both kinds" in found[1].reason
    assert make(read_search(["gamma=0.1,0.5,0.9", "lr=0.1,0.2"]), trials=None).combinations[:2] == [
        {"gamma": 0.1, "lr": 0.1}, {"gamma": 0.1, "lr": 0.2},
    ]  # fmt: skip


def test_no_trial_that_ends_well_is_an_error(make: Make) -> None:
    none = make(read_search(["classes=70,80"]), trials=None, asked={"memory": 100})
    with pytest.raises(SpecError, match=r"ended well: SpecError: blobs has 6 classes, not 70"):
        none.run(do)
