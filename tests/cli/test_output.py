"""Readers that go away: what is printed to them is dropped, and nothing else changes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cilnorm.cli.output import Lasting
from tests.conftest import ROOT
from tests.strangers import distribute

pytestmark = pytest.mark.slow

START = [sys.executable, "-c", "from cilnorm.cli.app import main; main()"]
RUN = ["run", "--device=cpu", "--backbone=tiny", "--dataset=blobs", "--tasks=3", "--memory=24", "--rows=12:4"]
FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts a command in a process of its own, the fake plugin installed."""
    distribute(tmp_path / "site", "fake", {}, {"fake": "tests.fake"})
    paths = os.pathsep.join([str(tmp_path / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    return lambda command, **streams: subprocess.Popen(command, env=environment, cwd=tmp_path, **streams)


def state(folder: Path) -> Any:
    return json.loads((folder / "summary.json").read_text())["state"]


def test_a_stream_without_a_reader_becomes_the_null_device() -> None:
    reader, writer = os.pipe()
    stream = Lasting(writer, "w")
    assert stream.write(b"one") == 3
    os.close(reader)
    assert stream.write(b"four") == 4
    assert stream.error is not None
    assert stream.error.errno == errno.EPIPE
    assert os.path.samestat(os.fstat(writer), os.stat(os.devnull))
    assert stream.write(b"five") == 4
    stream.close()


def test_a_slow_reader_of_a_pipe_that_does_not_block_is_waited_for() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    count = "while size := len(__import__('os').read(0, 65536)): print(size)"
    with subprocess.Popen([sys.executable, "-c", count], stdin=reader, stdout=subprocess.PIPE) as other:
        os.close(reader)
        stream, left = Lasting(writer, "w"), 500_000
        while left:
            left -= stream.write(bytes(left))
        stream.close()
        assert other.stdout is not None
        assert sum(map(int, other.stdout.read().split())) == 500_000
    assert stream.error is None


def test_a_run_goes_on_when_its_reader_goes(start: Start, tmp_path: Path) -> None:
    process = start([*START, *RUN, "--epochs=1", "--out=run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert b"folder run" in process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
    assert state(tmp_path / "run") == "finished"


def test_a_run_without_standard_streams_writes_into_no_file_of_its_own(start: Start, tmp_path: Path) -> None:
    line = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *START, *RUN, "--epochs=1", "--out=run"]
    assert start(line).wait() == 0
    assert state(tmp_path / "run") == "finished"
    assert all(json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines())


@FULL
def test_a_full_device_is_named_and_only_a_command_whose_result_is_lost_fails(start: Start, tmp_path: Path) -> None:
    for command, status in (([*RUN, "--epochs=1", "--out=run"], 0), (["list"], 1)):
        with open("/dev/full", "wb") as full:
            process = start([*START, *command], stdout=full, stderr=subprocess.PIPE)
            _, told = process.communicate()
        assert told.decode().splitlines() == ["cilnorm: can't write standard output: No space left on device"]
        assert process.returncode == status
    assert state(tmp_path / "run") == "finished"


def test_a_list_ends_quietly_when_its_reader_goes(start: Start) -> None:
    process = start([*START, "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs terminals that hang up")
def test_a_terminal_that_hangs_up_stops_a_run_that_can_go_on(start: Start, tmp_path: Path) -> None:
    command = [*START, *RUN, "--epochs=300", "--out=run"]
    process = start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    while not (tmp_path / "run" / "checkpoints" / "last.pt").exists():
        assert process.poll() is None
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert b"`cilnorm resume run` goes on" in process.stderr.read()
    assert process.wait() == 129
    assert state(tmp_path / "run") == "interrupted"
