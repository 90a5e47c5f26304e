"""Options chosen on held-out images."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cilnorm
from cilnorm.experiment import runner
from cilnorm.experiment.trials import RunContext
from cilnorm.experiment.tuning import Trial, choose_options, finished_accuracy
from cilnorm.registry import Registry
from cilnorm.results.comparison import gather
from cilnorm.results.reading import read_result
from cilnorm.results.report import report
from cilnorm.spec import Spec, SpecError, read_spec
from cilnorm.storage.interruptions import Interrupted, Interruptions
from cilnorm.storage.run_folder import RunFolder
from tests.experiment.test_runner import bits

pytestmark = pytest.mark.slow

Tiny = Callable[..., Spec]


def _fail(trial: Spec) -> float:
    raise SpecError("does not divide")


def test_the_best_value_wins_and_unfitting_ones_are_noted(tiny: Tiny, registry: Registry) -> None:
    accuracies = {4: 30.0, 8: 50.0, 16: 50.0}
    seen = []

    def score(trial: Spec) -> float:
        seen.append(trial)
        if trial.norm_options["groups"] not in accuracies:
            raise SpecError("does not divide")
        return accuracies[trial.norm_options["groups"]]

    spec = replace(tiny(), norm="cn*")
    chosen, trials = choose_options(spec, registry, score)
    assert trials == [Trial("groups", g, accuracies.get(g)) for g in (4, 8, 16, 32)]
    assert chosen == replace(spec, norm_options={"groups": 8})
    assert all(trial.protocol.score == "validation" and trial.protocol.validation == 0.1 for trial in seen)
    assert {trial.stop_after for trial in seen} == {2}


def test_an_option_that_is_set_is_not_tried(tiny: Tiny, registry: Registry) -> None:
    spec = replace(tiny(), norm="cn*", norm_options={"groups": 4})
    assert choose_options(spec, registry, _fail) == (spec, [])


def test_no_fitting_value_is_an_error(tiny: Tiny, registry: Registry) -> None:
    with pytest.raises(SpecError, match="no value of cn"):
        choose_options(replace(tiny(), norm="cn*"), registry, _fail)


def test_the_choice_stands_in_the_run_folder(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    events: list[dict[str, object]] = []
    spec = replace(tiny(), norm="cn*", backbone="resnet8")
    result = cilnorm.run(spec, tmp_path / "run", registry=registry, watch=[events.append])
    trials = json.loads((result.folder / "tuning.json").read_text())
    best = max((trial for trial in trials if trial["accuracy"] is not None), key=lambda trial: trial["accuracy"])
    assert [trial["value"] for trial in trials if trial["accuracy"] is None] == [32]  # 16 channels in the first stage
    assert read_spec(result.folder / "spec.yaml", registry).norm_options == {"groups": best["value"]}
    assert sum(event["event"] == "trial" for event in events) == 3
    assert len(result.matrix) == spec.tasks


def step(number: int, act: Callable[[], None]) -> Callable[[], bool]:
    """A stand-in for ``Interruptions.due`` that does something at its ``number``-th call."""
    calls = iter(range(1, 1 << 30))

    def due() -> bool:
        if next(calls) == number:
            act()
        return False

    return due


@pytest.mark.parametrize("at", [2, 12, 20])
def test_a_signal_during_the_choice_loses_no_trial(
    at: int, tiny: Tiny, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished trial is not done again, an interrupted one goes on, and the bits are those of an undisturbed run."""
    spec, folder = replace(tiny(), norm="cn*", backbone="tiny"), tmp_path / "run"
    whole = cilnorm.run(spec, tmp_path / "whole", registry=registry, device="cpu")
    started = counting(monkeypatch)
    with monkeypatch.context() as patch:
        due = step(at, lambda: os.kill(os.getpid(), signal.SIGTERM))
        asked = Interruptions.due.fget
        patch.setattr(Interruptions, "due", property(lambda me: due() or asked(me)))  # type: ignore[misc]
        with pytest.raises(Interrupted, match=f"interrupted at the choice of cn.*; `cilnorm resume {folder}` goes on"):
            cilnorm.run(spec, folder, registry=registry, device="cpu")
    assert json.loads((folder / "summary.json").read_text())["state"] == "interrupted"
    assert read_spec(folder / "spec.yaml", registry) == spec
    assert not (folder / "tuning.json").exists()
    assert read_result(folder).matrix == []  # for a report
    assert [result.folder for result in gather(str(folder))] == [folder]  # for a comparison
    report([read_result(folder)])
    before = [path for path in started if path.parent.name == "trials"]
    finished = [path for path in before if finished_accuracy(path) is not None]
    again = cilnorm.run(spec, folder, registry=registry, device="cpu", go_on=True)
    assert not set(finished) & set(started[len(before) :])
    assert again.matrix == whole.matrix
    for name in ("accuracy.csv", "confusion.csv", "spec.yaml", "tuning.json"):
        assert (folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert bits(folder) == bits(whole.folder)
    for trial in whole.folder.glob("trials/*"):
        assert (folder / "trials" / trial.name / "accuracy.csv").read_bytes() == (trial / "accuracy.csv").read_bytes()


def counting(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders in which a run is done from now on, in order."""
    folders: list[Path] = []
    rest = runner._rest

    def noted(means: RunContext, folder: RunFolder, *more: Any) -> Any:
        folders.append(folder.path)
        return rest(means, folder, *more)

    monkeypatch.setattr(runner, "_rest", noted)
    return folders


def test_a_norm_that_fits_with_no_value_leaves_no_folder_and_no_run_undone(
    finished: Any, tiny: Tiny, registry: Registry, tmp_path: Path
) -> None:
    norm = replace(registry.norms["cn*"], tune={"groups": (3, 5)})
    records = {**registry.norms.records, "cn*": norm}
    odd = replace(registry, norms=replace(registry.norms, records=records))
    for folder in (tmp_path / "new", finished.folder):
        with pytest.raises(SpecError, match=r"no value of cn.*'s groups fits tiny"):
            cilnorm.run(replace(tiny(), norm="cn*"), folder, registry=odd, device="cpu", overwrite=True)
    assert not (tmp_path / "new").exists()
    assert read_spec(finished.folder / "spec.yaml", registry) == tiny()


def test_stop_after_learns_the_first_tasks_alone(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    whole = cilnorm.run(tiny(), tmp_path / "whole", registry=registry)
    cut = cilnorm.run(replace(tiny(), stop_after=2), tmp_path / "cut", registry=registry)
    assert cut.matrix == whole.matrix[:2]


def test_score_validation_looks_at_held_out_images_only(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    protocol = replace(tiny().protocol, validation=0.25, score="validation")
    held_out = cilnorm.run(replace(tiny(), protocol=protocol), tmp_path / "run", registry=registry)
    rows = json.loads((held_out.folder / "summary.json").read_text())
    assert rows["state"] == "finished"
    assert held_out.matrix != cilnorm.run(tiny(), tmp_path / "test", registry=registry).matrix
