"""Kills runs at random instants until they are through, and compares them with runs that nobody disturbed.

    python -m benchmarks.chaos --kills 200
    python -m benchmarks.chaos --kills 50 --ranks 2 --tasks 4

Real processes, SIGKILL, ten tasks of tiny images, or another number, with every method in turn. A killed run is resumed
and killed again; what it ends with (accuracies, weights, exemplars, every logged loss) must equal the undisturbed run
to the bit. No figures are drawn, so that kills meet the training. Prints the kills, the resumptions and the
differences, of which there must be none. With ``--ranks`` several processes share a run, any one of them is killed, and
the others must end by themselves; if they don't, that is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from cilnorm import registry as registries
from cilnorm.experiment import runner
from cilnorm.experiment.runner import RunStopped, run
from cilnorm.spec import Settings, read_spec, resolve, to_yaml
from cilnorm.training.ranks import joined
from tests import fake
from tests.conftest import TINY

CASES = (
    ("lucir", "tbbn"), ("eeil", "tbbn+cn"), ("podnet", "brn"), ("afc", "sn"), ("ssil", "tbbn"), ("ft", "gn"),
)  # fmt: skip
TASKS = 10
PATIENCE = 300.0  # seconds in which the processes of a run must end, killed or not
MISSED = timedelta(seconds=15)  # after which one that was killed before all had met is missed; else it is ten minutes
REGISTRY = registries.load(extra=[fake])


@dataclass
class Tally:
    """What came of it; ``differences`` names each file or value in which a disturbed run differed."""

    kills: int = 0
    resumes: int = 0
    finished: int = 0
    differences: list[str] = field(default_factory=list)


def small(tasks: int) -> dict[str, int]:
    """Values of a run of so many tasks, two classes each."""
    return {"tasks": tasks, "memory": 4 * tasks, "dataset.classes": 2 * tasks, "dataset.train": 18, "dataset.test": 6}


def serve() -> None:
    """Forks the processes of a run for each line of standard input; says their numbers, and how each of them ended.

    What is forked has imported everything already, so that the kills meet the run and not its imports.
    """
    import torch._dynamo

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        spec, folder, every, ranks = json.loads(line)
        port = _free_port()
        children = []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                _take_part(spec, folder, every, (rank, ranks, port))
            children.append(child)
        print(*children, flush=True)
        print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _take_part(spec: str, folder: str, every: float | None, place: tuple[int, int, int]) -> None:
    """Begins or continues a run in this process, which ends with it."""
    rank, ranks, port = place
    if ranks > 1:
        names = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}})
        runner.joined = partial(joined, timeout=MISSED)  # type: ignore[assignment]
    status = 1
    try:
        run(read_spec(Path(spec), REGISTRY), folder, device="cpu", registry=REGISTRY, go_on=True,
            checkpoint_every=every, figures=False)  # fmt: skip
        status = 0
    except RunStopped as stopped:
        print(stopped, file=sys.stderr)
    finally:
        traceback.print_exc() if sys.exc_info()[0] else None
        os._exit(status)


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
    kills: int,
    place: Path,
    cases: Sequence[tuple[str, str]] = CASES,
    seed: int | None = None,
    limit: float = 3600.0,
    ranks: int = 1,
    tasks: int = TASKS,
) -> Tally:
    """Kills that many times, or for ``limit`` seconds, and tells what came of it."""
    chance, tally, ends = random.Random(seed), Tally(), time.monotonic() + limit
    expected: dict[tuple[str, str], tuple[Path, dict[str, Any], float]] = {}
    command = [sys.executable, "-m", "benchmarks.chaos", "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=0) as server:
        assert server.stdout is not None
        server.stdout.readline()  # its imports are no part of the time in which a run may be killed
        for number, case in enumerate(cycle(cases)):
            if tally.kills >= kills or time.monotonic() > ends:
                break
            if case not in expected:
                expected[case] = _undisturbed(server, case, place, (ranks, tasks))
            spec, whole, seconds = expected[case]
            folder = place / f"run {number}"
            while _killed(server, spec, folder, chance, seconds if tally.kills < kills else None, ranks):
                tally.kills += 1
                tally.resumes += (folder / "spec.yaml").exists()
            tally.finished += 1
            found = results(folder)
            tally.differences += [f"{folder}: {name}" for name, value in whole.items() if found[name] != value]
        server.communicate()
    return tally


def _killed(
    server: Any, spec: Path, folder: Path, chance: random.Random, seconds: float | None, ranks: int = 1
) -> bool:
    """Whether a process that goes on with a run was killed within so many seconds, because it was not through."""
    server.stdin.write(json.dumps([str(spec), str(folder), chance.choice((None, 1e-9)), ranks]) + "\n")
    server.stdin.flush()
    children = [int(child) for child in server.stdout.readline().split()]
    if seconds is not None and not select.select([server.stdout], [], [], chance.uniform(0, seconds))[0]:
        with suppress(ProcessLookupError):
            os.kill(chance.choice(children), signal.SIGKILL)
    if not select.select([server.stdout], [], [], PATIENCE)[0]:
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        raise RuntimeError(f"{folder}: its processes did not end within {PATIENCE:.0f} s")
    status = [int(ended) for ended in server.stdout.readline().split()]
    killed = -signal.SIGKILL in status
    if any(ended not in ((0, 1, -signal.SIGKILL) if killed else (0,)) for ended in status):
        raise RuntimeError(f"{folder}: status {status}")
    return killed and _unfinished(folder)


def _unfinished(folder: Path) -> bool:
    """Whether a run has still something to do; one of its processes may be killed when all is done."""
    summary = folder / "summary.json"
    return not summary.exists() or json.loads(summary.read_text())["state"] != "finished"


def _undisturbed(
    server: Any, case: tuple[str, str], place: Path, size: tuple[int, int]
) -> tuple[Path, dict[str, Any], float]:
    (method, norm), (ranks, tasks) = case, size
    spec = place / f"{method} {norm}.yaml"
    asked: dict[str, Any] = {**small(tasks), "method": method, "norm": norm}
    spec.write_text(to_yaml(resolve("tiny", REGISTRY, Settings({"tiny": TINY}, {}), **asked)))
    began = time.monotonic()
    _killed(server, spec, place / spec.stem, random.Random(0), None, ranks)
    return spec, results(place / spec.stem), time.monotonic() - began


def main() -> None:
    """Prints a line of counts, and one for each difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="of the instants, as far as the machine repeats")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds after which no further run is begun")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share each run")
    parser.add_argument("--tasks", type=int, default=TASKS, help="of each run")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve()
        return
    torch.set_num_threads(1)
    began = time.monotonic()
    how = {"seed": asked.seed, "limit": asked.limit, "ranks": asked.ranks, "tasks": asked.tasks}
    with tempfile.TemporaryDirectory() as place:
        tally = chaos(asked.kills, Path(place), **how)
    print(
        f"{tally.kills} kills, {tally.resumes} resumes, {tally.finished} runs finished, "
        f"{len(tally.differences)} differences, {time.monotonic() - began:.0f} s"
    )
    print(*tally.differences, sep="\n", end="")
    sys.exit(bool(tally.differences))


if __name__ == "__main__":
    main()
