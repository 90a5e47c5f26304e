"""Kills runs at random instants until they are through, and compares them with runs that nobody disturbed.

    python -m benchmarks.chaos --kills 200

Real processes, SIGKILL, ten tasks of tiny images with every method in turn. A killed run is resumed and killed again;
what it ends with (accuracies, weights, exemplars, every logged loss) must equal the undisturbed run to the bit. Prints
the kills, the resumptions and the differences, of which there must be none.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from cilnorm import registry as registries
from cilnorm.runner import run
from cilnorm.spec import Settings, read_spec, resolve, to_yaml
from tests import fake
from tests.conftest import TINY

CASES = (
    ("lucir", "tbbn"), ("eeil", "tbbn+cn"), ("podnet", "brn"), ("afc", "sn"), ("ssil", "tbbn"), ("ft", "gn"),
)  # fmt: skip
SMALL = {"tasks": 10, "memory": 40, "dataset.classes": 20, "dataset.train": 18, "dataset.test": 6}
IMPORTED = ["benchmarks.chaos", "torch._dynamo", "matplotlib.backends.backend_agg", "matplotlib.figure"]


@dataclass
class Tally:
    """What came of it; ``differences`` names each file or value in which a disturbed run differed."""

    kills: int = 0
    resumes: int = 0
    finished: int = 0
    differences: list[str] = field(default_factory=list)


def work(spec: Path, folder: Path, every: float | None) -> None:
    """The life of a process: start the run or go on with it, to the end."""
    torch.set_num_threads(1)
    registry = registries.load(extra=[fake])
    run(read_spec(spec, registry), folder, device="cpu", registry=registry, go_on=True,
        checkpoint_every=every)  # fmt: skip


def told(folder: Path, kind: str) -> Iterator[dict[str, Any]]:
    """The events of a kind, without their times."""
    for line in (folder / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == kind:
            yield {key: value for key, value in event.items() if key not in ("time", "seconds")}


def results(folder: Path) -> dict[str, Any]:
    """All that must be equal to the bit, by name."""
    last = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "accuracy.csv": (folder / "accuracy.csv").read_text(),
        "weights": {name: (tensor.dtype, tensor.numpy().tobytes()) for name, tensor in last["net"].items()},
        "memory": [kept.tolist() for kept in last["memory"]],
        "losses": list(told(folder, "epoch")),
        "accuracies": list(told(folder, "accuracy")),
        "summary": {key: value for key, value in summary.items() if key != "seconds"},
    }


def chaos(
    kills: int, place: Path, cases: Sequence[tuple[str, str]] = CASES, seed: int | None = None, limit: float = 3600.0
) -> Tally:
    """Kills that many times, or for ``limit`` seconds, and tells what came of it."""
    chance, tally, ends = random.Random(seed), Tally(), time.monotonic() + limit
    expected: dict[tuple[str, str], tuple[Path, dict[str, Any], float]] = {}
    for number, case in enumerate(cycle(cases)):
        if tally.kills >= kills or time.monotonic() > ends:
            break
        if case not in expected:
            expected[case] = _undisturbed(case, place)
        spec, whole, seconds = expected[case]
        folder = place / f"run {number}"
        while _killed(spec, folder, chance.uniform(0, seconds) if tally.kills < kills else None, chance):
            tally.kills += 1
            tally.resumes += (folder / "spec.yaml").exists()
        tally.finished += 1
        found = results(folder)
        tally.differences += [f"{folder}: {name}" for name, value in whole.items() if found[name] != value]
    return tally


def _killed(spec: Path, folder: Path, after: float | None, chance: random.Random) -> bool:
    """Whether a process that goes on with a run had to be killed after so many seconds, because it was not through."""
    processes = multiprocessing.get_context("forkserver")  # forks of a process that has imported everything: quick
    processes.set_forkserver_preload(IMPORTED)
    process = processes.Process(target=work, args=(spec, folder, chance.choice((None, 1e-9))))
    process.start()
    process.join(after)
    process.kill()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{folder}: status {process.exitcode}")
    return process.exitcode != 0


def _undisturbed(case: tuple[str, str], place: Path) -> tuple[Path, dict[str, Any], float]:
    method, norm = case
    spec = place / f"{method} {norm}.yaml"
    registry = registries.load(extra=[fake])
    asked: dict[str, Any] = {**SMALL, "method": method, "norm": norm}
    spec.write_text(to_yaml(resolve("tiny", registry, Settings({"tiny": TINY}, {}), **asked)))
    run(read_spec(spec, registry), place / f"{spec.stem} warm", device="cpu", registry=registry)
    began = time.monotonic()
    folder = run(read_spec(spec, registry), place / spec.stem, device="cpu", registry=registry).folder
    return spec, results(folder), time.monotonic() - began


def main() -> None:
    """Prints a line of counts, and one for each difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="of the instants, as far as the machine repeats")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds after which no further run is begun")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        tally = chaos(asked.kills, Path(place), seed=asked.seed, limit=asked.limit)
    print(
        f"{tally.kills} kills, {tally.resumes} resumes, {tally.finished} runs finished, "
        f"{len(tally.differences)} differences, {time.monotonic() - began:.0f} s"
    )
    print(*tally.differences, sep="\n", end="")
    sys.exit(bool(tally.differences))


if __name__ == "__main__":
    main()
