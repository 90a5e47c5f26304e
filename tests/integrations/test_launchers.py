"""The launchers of PyCIL and Mammoth, on stand-ins that have the names and signatures of the commits they name.

The tests marked ``frameworks`` run the real ones, for some minutes each, on CIFAR-100 in ``CILNORM_DATA``:

    PYCIL_CHECKOUT=PyCIL MAMMOTH_CHECKOUT=mammoth CILNORM_DATA=DATA pytest -m frameworks
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cilnorm.integrations import pycil as pycil_launcher
from cilnorm.integrations.launcher import Framework, parse_command
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
ASSETS = ROOT / "tests" / "assets"
PYCIL, MAMMOTH = ASSETS / "pycil_f3509b8", ASSETS / "mammoth_e75a491"
SETTINGS = {
    "dataset": "letters", "shuffle": False, "seed": [1], "init_cls": 3, "increment": 2, "device": [-1],
    "model_name": "replay", "convnet_type": "resnet32",
}  # fmt: skip


def ran(*words: str, fails: bool = False) -> str:
    """What a command prints; both streams."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


def counted(*words: str) -> dict[str, int]:
    return json.loads(ran("tests.integrations.standin", *words).strip().splitlines()[-1])


@pytest.fixture
def config(tmp_path: Path) -> Any:
    def write(**changes: Any) -> str:
        path = tmp_path / "replay.json"
        path.write_text(json.dumps({**SETTINGS, **changes}), encoding="utf-8")
        return str(path)

    return write


def pycil(*words: str) -> tuple[str, ...]:
    return ("cilnorm.integrations.pycil", "--norm", "tbbn", "--checkout", str(PYCIL), *words)


def mammoth(*words: str, switch: str = "--without-clip") -> tuple[str, ...]:
    return ("cilnorm.integrations.mammoth", "--norm", "tbbn", "--checkout", str(MAMMOTH), switch, "--", *words)


def test_pycil_tells_each_pass_of_network_and_teacher(config: Any) -> None:
    words = ("pycil", "0 3 5", "--norm", "tbbn", "--checkout", str(PYCIL), "--", "--config", config())
    found = counted(*words)
    # 27 images of the first task; then 18 and 9 of later ones beside 9 and 9 in memory; batches of 8, each task's twice
    # once there is a teacher in training mode.
    batches = [4, 4, 3]
    assert found["told"] == batches[0] + 2 * (batches[1] + batches[2])
    assert found["checked"] == sum(batches)
    assert found["mixed"] >= 8


def test_pycil_runs_as_a_command_and_says_what_it_does(config: Any) -> None:
    first = ran(*pycil("--set", "splits=exact", "--", "--config", config())).splitlines()[0]
    assert first == "cilnorm: tbbn (splits=exact) in PyCIL, written for f3509b8"
    assert "tbbn (splits=auto)" in ran(*pycil("--", "--config", config()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": ["0", "1"]}, 'name one device in the configuration: "device": ["0"]'),
        ({"convnet_type": "memo_resnet32"}, "memo_resnet32 comes in two parts"),
        ({"shifts": True}, "8 of 8 rows are images that no batch held"),
    ],
)
def test_pycil_refuses_what_it_can_t_tell(config: Any, changes: dict[str, Any], message: str) -> None:
    assert message in ran(*pycil("--", "--config", config(**changes)), fails=True)


def test_another_pycil_is_refused_with_the_commit(tmp_path: Path, config: Any) -> None:
    shutil.copytree(PYCIL, tmp_path / "PyCIL")
    path = tmp_path / "PyCIL" / "utils" / "inc_net.py"
    path.write_text(path.read_text(encoding="utf-8").replace("def get_convnet(", "def convnet("), encoding="utf-8")
    words = ("--norm", "bn", "--checkout", str(tmp_path / "PyCIL"), "--", "--config", config())
    text = ran("cilnorm.integrations.pycil", *words, fails=True)
    assert "has no get_convnet; this integration was written for its commit f3509b8" in text


def test_mammoth_tells_stream_and_buffer_in_one_pass_or_apart() -> None:
    words = ("--norm", "tbbn", "--checkout", str(MAMMOTH), "--without-clip", "--", "--model")
    together = counted("mammoth", "0 2 4", *words, "er")
    assert together["told"] == together["checked"] == 9
    assert together["mixed"] >= 5
    apart = counted("mammoth", "0 2 4", *words, "derpp")
    # The stream's pass is of one kind in every step; the first step has no buffer, the others two passes over it.
    assert apart["told"] == 9 + 2 * 8
    assert apart["checked"] == 9 + 8
    assert apart["left"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "der"), "4 of 4 rows are images that no batch held"),
        (("--model", "er", "--setting", "domain-il"), "the data set's setting is domain-il"),
        (("--model", "er", "--distributed", "dp"), "leave --distributed at no"),
        (("--model", "er", "--code_optimization", "3"), "no -O 3"),
    ],
)
def test_mammoth_refuses_what_it_can_t_tell(words: tuple[str, ...], message: str) -> None:
    assert message in ran(*mammoth(*words), fails=True)


def test_without_clip_mammoth_says_what_helps() -> None:
    text = ran(*mammoth("--model", "er", switch="--set=splits=auto"), fails=True)
    assert (
        "No module named 'open_clip'; this integration was written for its commit e75a491; try --without-clip" in text
    )


def test_what_a_checkout_lacks_is_named_with_the_commit() -> None:
    framework = Framework("Loops", "abc1234", ())
    assert framework.find("json", "loads", "JSONDecoder.decode") is json
    with pytest.raises(SystemExit, match=r"Loops's json has no JSONDecoder\.guess; .* its commit abc1234"):
        framework.find("json", "loads", "JSONDecoder.guess")
    with pytest.raises(SystemExit, match=r"Loops's no_such_module can't be imported: .* its commit abc1234"):
        framework.find("no_such_module")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--norm", "tbn"), "tbn"),
        (("--norm", "tbbn", "--set", "splits"), "--set takes OPTION=VALUE, not splits"),
        (("--norm", "tbbn", "--set", "parts=2"), "parts"),
        (("--norm", "adab2n"), "adab2n adds adab2n to the loss, and PyCIL's methods have no place for it"),
        (("--norm", "tbbn", "--checkout", str(ROOT)), "is no checkout of PyCIL: it has no main.py"),
    ],
)
def test_a_mistake_is_said_before_anything_runs(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = () if "--checkout" in words else ("--checkout", str(PYCIL))
    with pytest.raises(SystemExit):
        parse_command(pycil_launcher.PYCIL, [*words, *place, "--", "--config", "none.json"])
    assert message in capsys.readouterr().err.splitlines()[-1]


def checkout(variable: str) -> list[str]:
    folder, data = os.environ.get(variable), os.environ.get("CILNORM_DATA")
    if not folder or not data:
        pytest.skip(f"{variable} names no checkout, or CILNORM_DATA no folder with cifar-100-python")
    return ["--checkout", folder, "--data", data, "--norm", "tbbn", "--images", "20"]


@pytest.mark.frameworks
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("method", ["replay", "icarl", "wa", "bic", "der", "podnet"])
def test_the_real_pycil_is_told_every_pass(method: str) -> None:
    words = ("benchmarks.frameworks", "pycil", *checkout("PYCIL_CHECKOUT"), "--method", method)
    found = json.loads(ran(*words).strip().splitlines()[-1])
    assert len(found["accuracies"]) == 3
    assert found["checked"] == found["told"] > 30
    assert found["mixed"] > 10


@pytest.mark.frameworks
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("method", "share"), [("er", 1), ("er_ace", 1), ("derpp", 0.6), ("icarl", 1)])
def test_the_real_mammoth_is_told_every_pass(method: str, share: float) -> None:
    words = ("benchmarks.frameworks", "mammoth", *checkout("MAMMOTH_CHECKOUT"), "--method", method)
    found = json.loads(ran(*words).strip().splitlines()[-1])
    assert len(found["accuracies"]) == 3
    assert found["told"] >= found["checked"] >= share * found["told"] > 15  # DER++'s second pass has no targets
    assert found["mixed"] > 5
