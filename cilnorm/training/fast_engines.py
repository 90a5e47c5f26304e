"""Faster ways to execute a step: captured once as a CUDA graph and replayed, or with the backbone compiled.

Both do what the eager engine does; where one of them can't, it says so and goes on eagerly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cilnorm.batch import Batch, CompositionAware
from cilnorm.training.batches import EpochBatches
from cilnorm.training.engine import Engine
from cilnorm.training.epoch_plan import VaryingComposition

__all__ = ["CaptureRefused", "CapturedEngine", "CompiledEngine", "EngineName", "engine_class"]

EngineName = Literal["auto", "eager", "graph", "compile"]
WARM_UP = 3  # steps before the capture: kernels are chosen and compiled, and buffers made, outside it


class CaptureRefused(RuntimeWarning):
    """A step could not be captured and is taken eagerly; the message says why."""


def engine_class(name: EngineName, device: torch.device, processes: int = 1) -> type[Engine]:
    """The engine of that name; ``auto`` replays a graph on a CUDA device and is eager elsewhere.

    Args:
        processes: that share the run. A graph is of one process so far: ``auto`` is eager where there are several.

    Raises:
        ValueError: graphs are asked for where there is no CUDA device, or are several processes.
    """
    if name == "graph" and device.type != "cuda":
        raise ValueError(f"engine graph needs a CUDA device, not {device}; take auto, eager or compile")
    if name == "graph" and processes > 1:
        raise ValueError(f"engine graph is for one process, {processes} share this run; take auto, eager or compile")
    if name == "auto":
        name = "graph" if device.type == "cuda" and processes == 1 else "eager"
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

    feed: EpochBatches
    at: Tensor
    replay: Callable[[], Any]

    def load(self, feed: EpochBatches, first: int) -> Iterator[None]:
        """Takes over an epoch; each time that it yields, the graph may be replayed for the next step."""
        self.feed.copy_(feed)
        self.at.fill_(first)
        yield from self.feed.stage(feed, first)


class CapturedEngine(Engine):
    """Replays one CUDA graph a step: augmentation, teacher, forward, loss, backward, clipping and update.

    A graph belongs to a composition and to the shape of an epoch, and to the phase, since every phase has its own
    engine. The graph reads the epoch from its own buffers and counts the steps itself, so a step is one launch; where
    images are streamed, a copy into the buffer that holds the step's images comes before it.

    Shuffled batches have one graph as well, in which layers know rows by their tasks instead of their numbers; where a
    layer or a loss must know the numbers, the capture is refused. A shorter last batch is taken eagerly.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._recordings: dict[Any, _Recording] = {}
        self._refused = False

    def epoch(self, feed: EpochBatches, first: int = 0) -> Iterator[None]:
        recording = self._recorded(feed)
        if recording is None:
            yield from super().epoch(feed, first)
            return
        for _ in recording.load(feed, first):
            self.draw_noise()
            recording.replay()
            yield
        yield from super().epoch(feed, max(first, feed.full))

    def _recorded(self, feed: EpochBatches) -> _Recording | None:
        """The graph for such an epoch, captured if there is none yet; None once a capture failed."""
        key = feed.composition, feed.indices.shape
        if not feed.full:
            return None
        if not isinstance(feed.composition, VaryingComposition):
            self.net.observe(feed.composition)
        if key not in self._recordings and not self._refused:
            before, reason = _Snapshot(self), ""
            try:
                self._recordings[key] = self._record(feed)
            except Exception as error:  # of CUDA or of a compiler; what is the step's own comes up again
                self._refused, reason = True, _reason(error)
            before.restore()
            if self._refused:
                text = f"this step can't be captured ({reason}); going on eagerly"
                warnings.warn(text, CaptureRefused, stacklevel=2)
        return self._recordings.get(key) if not self._refused else None

    def _record(self, feed: EpochBatches) -> _Recording:
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
            try:
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UP):
                        first_step()
                    _without_waiting(first_step)
            finally:  # what is undone after a failure must not overtake what the warm-up still does
                torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            _capture(graph, step)
        return graph.replay


def _capture(graph: Any, step: Callable[[], None]) -> None:
    """Captures a step; where that fails, puts torch back into the state before.

    ``torch.cuda.graph`` leaves by ``CUDAGraph.capture_end``, and where that raises, as it does once a capture is
    invalid, nothing after it happens: the side stream stays current, the allocator goes on serving the graph's pool
    (and returns nothing that other streams have used), and the device's generator counts as captured, so that the next
    random number outside a capture is an internal error.
    """
    device, stream, pool = torch.cuda.current_device(), torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    generator = torch.cuda.default_generators[device]
    state = generator.clone_state()  # a copy that no graph knows
    cause: Exception | None = None
    try:
        with torch.cuda.graph(graph, pool=pool):
            try:
                step()
            except Exception as error:
                cause = error
                raise
    except BaseException:
        torch.cuda.set_stream(stream)
        with suppress(RuntimeError):
            graph.reset()  # in newer versions of torch this ends and releases the pool
        _end_pool(device, pool)
        generator.graphsafe_set_state(state.graphsafe_get_state())
        with suppress(RuntimeError):  # an error of the capture that CUDA reports late
            torch.cuda.synchronize()
        torch.cuda.empty_cache()
        if cause is not None:
            raise cause from None  # ``capture_end`` says no more than that something went wrong
        raise


def _end_pool(device: int, pool: Any) -> None:
    """Lets the allocator forget a graph's pool, if it still serves it; there is no public function for that."""
    names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")  # the second is that of torch 2.6
    end = next((found for found in (getattr(torch._C, name, None) for name in names) if found), None)
    release = getattr(torch._C, "_cuda_releasePool", None)
    if end and release:
        with suppress(RuntimeError):  # it serves the pool no more
            end(device, pool)
            release(device, pool)


def _reason(error: Exception) -> str:
    """The first line of what went wrong; with its class, where that says more than that something did."""
    line = next(iter(str(error).strip().splitlines()), "")
    kind = type(error).__name__
    return line if line and isinstance(error, RuntimeError) else f"{kind}: {line}" if line else kind


def _without_waiting(step: Callable[[], None]) -> None:
    """Takes a step; raises RuntimeError where it waits for the device, which a capture would not survive as cleanly."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype; it is only asked to say no
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


class CompiledEngine(Engine):
    """The eager engine with the backbone compiled by ``torch.compile``, anew for every phase.

    The head grows and is left as it is. Compiled code knows a composition's numbers, and torch keeps eight versions
    of a function, so what earlier phases compiled is thrown away. With shuffled batches, whose numbers differ from step
    to step, a backbone with such layers is left as it is.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        torch.compiler.reset()
        self.net.backbone.compile()
        self._tried = False

    def epoch(self, feed: EpochBatches, first: int = 0) -> Iterator[None]:
        aware = any(isinstance(module, CompositionAware) for module in self.net.backbone.modules())
        if isinstance(feed.composition, VaryingComposition) and aware and not self._tried:
            self._tried, self.net.backbone._compiled_call_impl = True, None
            text = "shuffled batches differ in how many rows are current, so the backbone isn't compiled"
            warnings.warn(f"{text}; going on eagerly", RuntimeWarning, stacklevel=2)
        return super().epoch(feed, first)

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
            text = f"the backbone can't be compiled ({_reason(error)}); going on eagerly"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
            super().update(batch)
