"""Faster ways to execute a step: captured once as a CUDA graph and replayed, or with the backbone compiled.

Both do what the eager engine does; where one of them can't, it says so and goes on eagerly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cilnorm.batch import Batch
from cilnorm.engine import Engine
from cilnorm.feed import Feed

__all__ = ["CapturedEngine", "CompiledEngine", "EngineName", "engine_class"]

EngineName = Literal["auto", "eager", "graph", "compile"]
WARM_UP = 3  # steps before the capture: kernels are chosen and compiled, and buffers made, outside it


def engine_class(name: EngineName, device: torch.device) -> type[Engine]:
    """The engine of that name; ``auto`` replays a graph on a CUDA device and is eager elsewhere.

    Raises:
        ValueError: graphs are asked for where there is no CUDA device.
    """
    if name == "graph" and device.type != "cuda":
        raise ValueError(f"engine graph needs a CUDA device, not {device}; take auto, eager or compile")
    if name == "auto":
        name = "graph" if device.type == "cuda" else "eager"
    return {"eager": Engine, "graph": CapturedEngine, "compile": CompiledEngine}[name]


class _Snapshot:
    """All that a step moves, as it was; restored in place, since a graph knows addresses and not names."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._net = {name: tensor.clone() for name, tensor in engine.net.state_dict().items()}
        self._momenta = {at: tensor.clone() for at, tensor in self._buffers().items()}
        self._sums = {name: tensor.clone() for name, tensor in engine.sums.items()}

    def _buffers(self) -> dict[int, Tensor]:
        buffers = ((at, self._engine.optimizer.state.get(p, {})) for at, p in enumerate(self._engine.parameters))
        return {at: state["momentum_buffer"] for at, state in buffers if state.get("momentum_buffer") is not None}

    def restore(self) -> None:
        with torch.no_grad():
            for name, tensor in self._engine.net.state_dict().items():
                tensor.copy_(self._net[name])
            for at, buffer in self._buffers().items():
                # A buffer of zeros is none: m · 0 + g is what a first step makes of its gradient.
                buffer.copy_(self._momenta[at]) if at in self._momenta else buffer.zero_()
            for name, total in self._engine.sums.items():
                total.copy_(self._sums[name]) if name in self._sums else total.zero_()


@dataclass(frozen=True, eq=False)
class _Recording:
    """A captured step, the epoch that it reads, and the number (1,) of the step that comes next."""

    feed: Feed
    at: Tensor
    replay: Callable[[], Any]

    def load(self, feed: Feed, first: int) -> None:
        self.feed.copy_(feed)
        self.at.fill_(first)


class CapturedEngine(Engine):
    """Replays one CUDA graph a step: augmentation, teacher, forward, loss, backward, clipping and update.

    A graph belongs to a composition and to the shape of an epoch, and to the phase, since every phase has its own
    engine. The graph reads the epoch from its own buffers and counts the steps itself, so a step is one launch.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._recordings: dict[Any, _Recording] = {}
        self._refused = False

    def epoch(self, feed: Feed, first: int = 0) -> Iterator[None]:
        recording = self._recorded(feed)
        if recording is None:
            yield from super().epoch(feed, first)
            return
        recording.load(feed, first)
        for _ in range(first, len(feed)):
            self.draw_noise()
            recording.replay()
            yield

    def _recorded(self, feed: Feed) -> _Recording | None:
        """The graph for such an epoch, captured if there is none yet; None once a capture failed."""
        key = feed.composition, feed.indices.shape
        self.net.observe(feed.composition)
        if key not in self._recordings and not self._refused:
            before = _Snapshot(self)
            try:
                self._recordings[key] = self._record(feed)
            except RuntimeError as error:
                self._refused = True
                reason = (str(error) or type(error).__name__).splitlines()[0]
                warnings.warn(f"this step can't be captured ({reason}); going on eagerly", RuntimeWarning, stacklevel=2)
            before.restore()
        return self._recordings.get(key) if not self._refused else None

    def _record(self, feed: Feed) -> _Recording:
        held, at = feed.clone(), torch.zeros(1, dtype=torch.long, device=self.device)

        def step() -> None:
            self.update(held.batch(at))
            at.add_(1)

        def first_step() -> None:
            at.zero_()
            step()

        return _Recording(held, at, self._captured(first_step, step))

    def _captured(self, first_step: Callable[[], None], step: Callable[[], None]) -> Callable[[], Any]:
        """Warms up with ``first_step``, then captures ``step``; what it returns replays it."""
        with torch.random.fork_rng(devices=[self.device]), torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    first_step()
                _without_waiting(first_step)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
        return graph.replay


def _without_waiting(step: Callable[[], None]) -> None:
    """Takes a step; raises RuntimeError where it waits for the device, which a capture would not survive as cleanly."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


class CompiledEngine(Engine):
    """The eager engine with the backbone compiled by ``torch.compile``, anew for every phase.

    The head grows and is left as it is. Compiled code knows a composition's numbers, and torch keeps eight versions
    of a function, so what earlier phases compiled is thrown away.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        torch.compiler.reset()
        self.net.backbone.compile()
        self._tried = False

    def update(self, batch: Batch) -> None:
        if self._tried:
            super().update(batch)
            return
        self._tried = True
        before = _Snapshot(self)
        try:
            super().update(batch)
        except Exception as error:  # whatever a compiler raises; what is not its fault comes up again below
            before.restore()
            self.net.backbone._compiled_call_impl = None
            reason = (str(error) or type(error).__name__).splitlines()[0]
            warnings.warn(f"the backbone can't be compiled ({reason}); going on eagerly", RuntimeWarning, stacklevel=2)
            super().update(batch)
