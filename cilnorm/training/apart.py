"""What is said where the processes of a run come apart, and by which of them."""

from __future__ import annotations

import os
import socket

from torch import distributed

from cilnorm.values import SpecError

__all__ = ["ENDED", "SpecRefusedElsewhere", "ToldElsewhere", "in_short", "lost_others", "told_elsewhere"]

ENDED, SILENT = "another process of the run ended", "another process of the run did not answer in time"


class ToldElsewhere(RuntimeError):
    """Another process of the run failed, and says why itself.

    Attributes:
        told: so this one has nothing to say.
        status: what the process should exit with.
    """

    told = True

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class SpecRefusedElsewhere(ToldElsewhere, SpecError):
    """Another process found that a spec can't be run; whoever goes on with another spec does so in every process."""


def lost_others(error: BaseException) -> str:
    """Why the processes of a run came apart, in words, if that is what an error says: empty if it is another one."""
    text = " ".join(str(error).split())
    kinds = (distributed.DistError,) if hasattr(distributed, "DistError") else ()
    if not (isinstance(error, kinds) or (isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text))):
        return ""
    if "imed out" in text or "imeout" in text:
        return SILENT
    return ENDED


def in_short(error: Exception) -> tuple[bool, str, int]:
    """Whether an error is about the spec, what it says and where, and the status that the process should exit with."""
    text = f"on {socket.gethostname()}, process {os.getpid()}: {error}"
    return isinstance(error, SpecError), text, int(getattr(error, "status", 1))


def told_elsewhere(short: tuple[bool, str, int]) -> ToldElsewhere:
    """What a process raises of another one's error."""
    about_spec, text, status = short
    return SpecRefusedElsewhere(text, status) if about_spec else ToldElsewhere(text, status)
