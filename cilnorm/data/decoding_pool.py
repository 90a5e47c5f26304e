"""Blocks of image files decoded by several processes at a time, with a bar that shows how far they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from typing import Any

from cilnorm.data.decoding import decode_block
from cilnorm.images import DatasetError

__all__ = ["decoded"]

FEW = 256  # files that this process decodes faster than others start
PROCESSES = 16


def decoded(blocks: Mapping[int, Mapping[str, Any]], images: int, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each block with what ``decode_block`` said of it, in the order in which they are done.

    Args:
        blocks: arguments of ``decode_block``, as JSON takes them.
        images: in all, of which the blocks may be the rest; with ``name`` for the bar.

    Raises:
        DatasetError: a file can't be read, or a process was brought down.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(f"decoding {name}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    left = sum(len(block["files"]) for block in blocks.values())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=images, completed=images - left)
        for at, answer in _alone(blocks) if left <= FEW else _together(blocks):
            progress.advance(bar, len(blocks[at]["files"]))
            yield at, answer


def _alone(blocks: Mapping[int, Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    for at, block in blocks.items():
        try:
            yield at, decode_block(**block)
        except OSError as error:
            raise DatasetError(f"{error.filename or block['target']}: {error.strerror or error}") from error


def _together(blocks: Mapping[int, Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    count = min(PROCESSES, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    command = [sys.executable, "-m", "cilnorm.data.decoding"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(min(count, len(blocks)))]  # type: ignore[call-overload]
    idle: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()
    for process in processes:
        idle.put(process)
    pool = ThreadPoolExecutor(len(processes))
    try:
        waiting = {pool.submit(_asked, idle, block): at for at, block in blocks.items()}
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
            process.communicate()


def _asked(idle: SimpleQueue[subprocess.Popen[str]], block: Mapping[str, Any]) -> dict[str, Any]:
    """What one of the idle processes makes of a block."""
    process = idle.get()
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(block) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline() or '{"error": ""}')
    except OSError:
        answer = {"error": ""}
    finally:
        idle.put(process)
    if "error" in answer:
        files = block["files"]
        gone = f"a decoding process ended while at work between {files[0]} and {files[-1]} of {block['root']}"
        raise DatasetError(answer["error"] or gone)
    return dict(answer)
