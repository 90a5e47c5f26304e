"""Comparisons: to the bit, and over seeds."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cilnorm.cli.app import app
from cilnorm.experiment.runner import Result, run
from cilnorm.metrics import METRICS
from cilnorm.registry import Registry
from cilnorm.results.comparison import compare, first_difference, gather, sentence
from cilnorm.results.contrast import compare as contrast
from cilnorm.results.reading import RunResult, read_result
from cilnorm.storage.run_folder import FolderError
from cilnorm.storage.tensor_file import read_tensor_file, tensor_file

pytestmark = pytest.mark.slow


@pytest.fixture
def pair(finished: Result, tmp_path: Path) -> tuple[Path, Path]:
    """A run and its copy."""
    copy = tmp_path / "copy"
    shutil.copytree(finished.folder, copy)
    return finished.folder, copy


def part(pair: tuple[Path, Path]) -> str:
    return first_difference(*map(read_result, pair))


def test_a_repeated_run_is_equal_to_the_bit(finished: Result, tiny: Any, registry: Registry, tmp_path: Path) -> None:
    run(tiny(), tmp_path / "again", device="cpu", registry=registry)
    assert part((finished.folder, tmp_path / "again")) == ""


def test_where_images_lie_is_no_difference(finished: Result, tiny: Any, registry: Registry, tmp_path: Path) -> None:
    """To the bit, and in a group."""
    run(tiny(residence="stream"), tmp_path / "streamed", device="cpu", registry=registry)
    assert part((finished.folder, tmp_path / "streamed")) == ""
    home = tmp_path / "group"
    run(tiny(residence="stream", seed=1), home / "1", device="cpu", registry=registry)
    shutil.copytree(finished.folder, home / "0")
    assert [result.seed for result in gather(str(home))] == [0, 1]


def test_where_specs_part(finished: Result, tiny: Any, registry: Registry, tmp_path: Path) -> None:
    run(tiny(seed=1, lr=0.2), tmp_path / "other", device="cpu", registry=registry)
    assert part((finished.folder, tmp_path / "other")) == "the specs differ in seed, schedule.lr"


def test_where_losses_part(pair: tuple[Path, Path]) -> None:
    log = pair[1] / "events.jsonl"
    told = [json.loads(line) for line in log.read_text().splitlines()]
    for event in [event for event in told if event["event"] == "epoch"][2:]:
        event["terms"]["ce"] = math.nextafter(event["terms"]["ce"], 9)
    log.write_text("".join(json.dumps(event) + "\n" for event in told))
    rows = (pair[1] / "accuracy.csv").read_text().splitlines()
    (pair[1] / "accuracy.csv").write_text("\n".join([*rows[:3], rows[3].replace("3,", "3,1", 1)]) + "\n")
    assert part(pair).startswith("task 2, phase main, epoch 1: the term 'ce' is ")  # the first of all that differs


def test_where_accuracies_part(pair: tuple[Path, Path]) -> None:
    rows = (pair[1] / "accuracy.csv").read_text().splitlines()
    first = rows[2].split(",")[1]
    rows[2] = rows[2].replace(f"2,{first}", "2,99.0", 1)
    (pair[1] / "accuracy.csv").write_text("\n".join(rows) + "\n")
    assert part(pair) == f"after task 2: the accuracy on task 1 is {float(first)} and 99.0"


def test_where_weights_part(pair: tuple[Path, Path]) -> None:
    path = pair[1] / "checkpoints" / "last.pt"
    content = read_tensor_file(path)
    weight = content["net"]["backbone.conv.weight"]
    weight[0, 0, 1, 0] = torch.nextafter(weight[0, 0, 1, 0], torch.tensor(9.0))
    path.write_bytes(tensor_file(content))
    assert part(pair) == f"the last checkpoints: 1 of {weight.numel()} values of backbone.conv.weight differ"
    path.write_bytes(b"nothing")
    with pytest.raises(FolderError, match=r"last\.pt: can't be read"):
        part(pair)


def test_a_run_that_ends_early(pair: tuple[Path, Path]) -> None:
    rows = (pair[1] / "accuracy.csv").read_text().splitlines()
    (pair[1] / "accuracy.csv").write_text("\n".join(rows[:-1]) + "\n")
    assert part(pair) == f"after task 3: {pair[1]} ends before it"
    assert part((pair[1], pair[0])) == f"after task 3: {pair[1]} ends before it"


# Over seeds


def group(*values: float, seeds: tuple[int, ...] = (), norm: str = "bn", state: str = "finished") -> list[RunResult]:
    """Runs whose metrics are all alike."""
    return [
        RunResult(Path(f"{norm}{seed}"), {"method": "ft", "norm": norm, "seed": seed}, [], [], [],
                  {"state": state, **dict.fromkeys(METRICS, value)}, {})
        for seed, value in zip(seeds or range(len(values)), values, strict=True)
    ]  # fmt: skip


def test_a_paired_test_by_hand() -> None:
    """Differences 1, 2, 3, 2: mean 2, deviation 0.8165, t = 2 / (0.8165 / 2) = 4.899 with 3 degrees of freedom."""
    found = compare(group(35.0, 36.0, 37.0, 38.0), group(36.0, 38.0, 40.0, 40.0))[0]
    assert (found.metric, found.paired, found.seeds) == ("A_f", True, (0, 1, 2, 3))
    assert found.difference == pytest.approx(2)
    assert found.t == pytest.approx(4.898979)
    assert found.effect == pytest.approx(2.449490)
    assert found.freedom == 3
    assert found.p == pytest.approx(0.016277, abs=1e-5)
    assert (found.low, found.high) == pytest.approx((2 - 3.182446 * 0.408248, 2 + 3.182446 * 0.408248), abs=1e-4)
    text = sentence(found, "ft x bn", "ft x tbbn")
    assert text.startswith("ft x tbbn reaches A_f 38.50 ± 1.91 % against 36.50 ± 1.29 % of ft x bn, +2.00 points")
    assert "over 4 paired seeds (95 % CI 0.70 to 3.30; paired t-test, t(3) = 4.90, p = 0.016, d_z = 2.45)" in text
    assert "unlikely to be chance" in text
    assert "With 4 seeds the normality that the test assumes can't be checked" in text


def test_pairs_are_made_by_seed_and_not_by_order() -> None:
    one, other = group(1.0, 5.0, 9.0, seeds=(0, 1, 2)), group(10.0, 2.0, 6.5, seeds=(2, 0, 1))
    found = compare(one, other)[0]
    assert (found.one, found.other) == ((1.0, 5.0, 9.0), (2.0, 6.5, 10.0))


def test_without_common_seeds_the_test_is_welchs() -> None:
    found = compare(group(30.0, 31.0, 32.0), group(30.5, 31.0, 33.0, seeds=(7, 8, 9)))[0]
    assert (found.paired, len(found.seeds)) == (False, 6)
    assert found.p
    assert found.p > 0.05
    text = sentence(found, "a", "b")
    assert "Welch's t-test" in text
    assert "not distinguishable from chance" in text


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (group(30.0), group(31.0), "in one run each: nothing can be said about chance"),
        (group(30.0), group(31.0, 32.0, seeds=(4, 5)), "a group of one run allows no test"),
        (group(30.0, 31.0), group(32.0, 33.0), "the same for every seed: no test applies"),
    ],
)
def test_too_few_seeds_are_said_to_be(one: Any, other: Any, message: str) -> None:
    found = compare(one, other)[0]
    assert found.p is None
    assert message in sentence(found, "a", "b")


def test_five_seeds_are_not_complained_of() -> None:
    found = compare(group(1.0, 2.0, 3.0, 4.0, 5.0), group(2.0, 3.5, 4.0, 5.5, 6.0))[0]
    assert "can't be checked" not in sentence(found, "a", "b")


def test_unfinished_runs_are_not_compared() -> None:
    with pytest.raises(FolderError, match="bn0 is not finished"):
        compare(group(1.0, state="running"), group(2.0))


def test_groups_are_gathered(finished: Result, tiny: Any, registry: Registry, tmp_path: Path) -> None:
    home = tmp_path / "group"
    for seed in (0, 1):
        run(tiny(seed=seed), home / f"seed-{seed}", device="cpu", registry=registry)
    (home / "seed-0.log").touch()
    assert [result.seed for result in gather(str(home))] == [0, 1]
    assert [result.seed for result in gather(str(home / "seed-*"))] == [0, 1]
    assert [result.seed for result in gather(str(home / "seed-1"))] == [1]
    with pytest.raises(FolderError, match="holds no run"):
        gather(str(tmp_path / "nothing*"))
    run(tiny(seed=2, norm="tbbn"), home / "seed-2", device="cpu", registry=registry)
    with pytest.raises(FolderError, match="differ in norm; a group differs in its seeds alone"):
        gather(str(home))
    shutil.rmtree(home / "seed-2")
    told = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["compare", str(home), str(home / "seed-0")])
    assert told.exit_code == 0, told.output
    assert "the groups have the same settings" in told.stdout
    told = CliRunner().invoke(app, ["compare", str(finished.folder), str(home / "seed-0")])
    assert told.stdout == "equal to the bit: spec, losses, accuracies and weights\n"
    told = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["compare", str(home / "seed-1"), str(home / "seed-0")])
    assert told.stdout.startswith("not equal: the specs differ in seed\n")
    assert "in one run each" in told.stdout


def test_groups_of_one_method_and_norm_are_called_by_what_tells_them_apart(
    finished: Result, tiny: Any, registry: Registry, tmp_path: Path
) -> None:
    for lr in (0.2, 0.3):
        run(tiny(lr=lr), tmp_path / f"{lr}", device="cpu", registry=registry)
    found = contrast(tmp_path / "0.2", tmp_path / "0.3")
    assert found.names == ("ft x bn (lr 0.2)", "ft x bn (lr 0.3)")
    assert found.verdict.startswith("ft x bn (lr 0.3) reaches A_f")
    further = {"milestones": [1], "weight_decay": 1.5e-5, "clip": 1.5, "first_epochs": 3}
    run(tiny(lr=0.3, seed=1, **further), tmp_path / "far", device="cpu", registry=registry)
    assert contrast(tmp_path / "0.2", tmp_path / "far").names == ("A", "B")
    run(tiny(lr=0.2, seed=1), tmp_path / "seed", device="cpu", registry=registry)
    assert contrast(tmp_path / "0.2", tmp_path / "seed").names == ("A", "B")
