"""Options chosen on held-out images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import cilnorm
from cilnorm.registry import Registry
from cilnorm.spec import Spec, SpecError, read_spec
from cilnorm.tuning import Trial, tuned

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
    chosen, trials = tuned(spec, registry, score)
    assert trials == [Trial("groups", g, accuracies.get(g)) for g in (4, 8, 16, 32)]
    assert chosen == replace(spec, norm_options={"groups": 8})
    assert all(trial.protocol.score == "validation" and trial.protocol.validation == 0.1 for trial in seen)
    assert {trial.stop_after for trial in seen} == {2}


def test_an_option_that_is_set_is_not_tried(tiny: Tiny, registry: Registry) -> None:
    spec = replace(tiny(), norm="cn*", norm_options={"groups": 4})
    assert tuned(spec, registry, _fail) == (spec, [])


def test_no_fitting_value_is_an_error(tiny: Tiny, registry: Registry) -> None:
    with pytest.raises(SpecError, match="no value of cn"):
        tuned(replace(tiny(), norm="cn*"), registry, _fail)


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
