"""A short run of every method against what it gave before: moving code must move no number.

``python -m tests.test_same_numbers`` writes ``assets/same_numbers.json`` anew, after a change that is meant to; with
names of methods behind it, only theirs, where the file was written on this processor and torch.
On the processor and torch that wrote it every bit must be the same; elsewhere sums are rounded in another order.
Where a torch rounds so differently that a run ends elsewhere, ``--apart`` and a method's name, given to that torch,
write its runs to a file of that torch's own, which is looked at first there.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import cilnorm
from cilnorm.registry import Registry, load
from cilnorm.spec import Settings, resolve
from tests import fake

pytestmark = pytest.mark.slow

STORED = Path(__file__).parent / "assets" / "same_numbers.json"
APART = STORED.with_name(f"same_numbers_torch_{'.'.join(torch.__version__.split('.')[:2])}.json")
METHODS = (
    "ft", "eeil", "lucir", "podnet", "ssil", "afc", "wa", "er-ace", "der", "foster", "icarl", "der++", "bic",
)  # fmt: skip
NORMS = ("bn", "tbbn")
PRESET = {
    "method": "ft",
    "norm": "bn",
    "backbone": "resnet8",
    "dataset": "blobs",
    "tasks": 3,
    "memory": 24,
    "rows": [12, 4],
    "augmentation": {"pad": 1, "crop": "random", "flip": True},
    "schedule": {"epochs": 2, "lr": 0.05, "momentum": 0.9, "milestones": [1]},
}


def numbers(method: str, norm: str, protocol: str, registry: Registry, folder: Path) -> dict[str, Any]:
    """The accuracy matrix of a run and the loss terms of its epochs."""
    spec = resolve("short", registry, Settings({"short": PRESET}, {}), method=method, norm=norm, protocol=protocol)
    result = cilnorm.run(spec, folder, device="cpu", registry=registry)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return {"matrix": result.matrix, "terms": [event["terms"] for event in events if event["event"] == "epoch"]}


def here() -> str:
    """What decides in which order sums are rounded: torch and the processor, its caches included."""
    facts = {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        about = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
        named = ("model name", "cpu family", "model", "stepping", "cache size", "flags")
        facts |= {name: about.get(name, "").strip() for name in named}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize("protocol", ["corrected", "released"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_gives_the_numbers_that_are_stored(
    method: str, norm: str, protocol: str, registry: Registry, tmp_path: Path
) -> None:
    key = f"{method} {norm} {protocol}"
    stored = next(each for each in map(read, (APART, STORED)) if key in each["runs"])
    expected = stored["runs"][key]
    found = numbers(method, norm, protocol, registry, tmp_path / "run")
    if stored["written_with"] == here():
        assert found == expected
    for terms, wanted in zip(found["terms"], expected["terms"], strict=True):
        assert terms == pytest.approx(wanted, rel=1e-2, abs=1e-4)
    for row, wanted in zip(found["matrix"], expected["matrix"], strict=True):
        assert row == pytest.approx(wanted, abs=5.0)  # two of a task's forty images


def read(path: Path) -> dict[str, Any]:
    """What is stored in a file; nothing where there is none."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": {}}
    return content


def main(arguments: Sequence[str]) -> None:
    """Writes what the tests compare with."""
    torch.set_num_threads(1)
    asked, apart = [each for each in arguments if each != "--apart"], "--apart" in arguments
    place = APART if apart else STORED
    registry, stored = load(extra=[fake]), read(place)
    runs = stored["runs"] if stored.get("written_with") == here() else {}
    methods = asked if apart or (asked and runs) else METHODS
    for method in methods:
        for norm in NORMS:
            for protocol in ("corrected", "released"):
                with tempfile.TemporaryDirectory() as folder:
                    key = f"{method} {norm} {protocol}"
                    runs[key] = numbers(method, norm, protocol, registry, Path(folder) / "run")
    place.write_text(json.dumps({"written_with": here(), "runs": runs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
