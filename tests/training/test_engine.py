"""Ways of executing a step, held to the eager one; what needs no GPU is tested with a capture that only remembers."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cilnorm.batch import Composition, Task
from cilnorm.experiment.runner import resume, run
from cilnorm.method import Method, Phase, Schedule
from cilnorm.norms import finish_norms
from cilnorm.registry import Registry, load
from cilnorm.spec import Spec, SpecError
from cilnorm.training.batches import EpochBatches, draw_batches
from cilnorm.training.engine import Engine
from cilnorm.training.epoch_plan import RowSource, plan_epoch
from cilnorm.training.fast_engines import CapturedEngine, CaptureRefused, CompiledEngine, engine_class
from cilnorm.training.pixels import Augmentation, Pixels
from cilnorm.training.precision import choose_precision, forward, matmul_precision
from cilnorm.training.protocol import Protocol
from cilnorm.training.randomness import generator
from cilnorm.training.stored import Stored

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SIZES = (3, 3)
TASK = Task(1, SIZES)
SCHEDULE = Schedule(epochs=3, lr=0.05, momentum=0.9, milestones=(1,), clip=5.0)


class Remembered(CapturedEngine):
    """The captured engine with a capture that calls the step again: everything around a CUDA graph, without one."""

    captures = 0

    def _captured(self, first_step: Callable[[], None], step: Callable[[], None]) -> Callable[[], Any]:
        for _ in range(3):
            first_step()
        type(self).captures += 1
        return step


class Unwilling(CapturedEngine):
    """A capture that fails halfway, as one does whose step waits for the device."""

    def _captured(self, first_step: Callable[[], None], step: Callable[[], None]) -> Callable[[], Any]:
        first_step()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def epochs(device: torch.device, rows: tuple[int, int] = (12, 4), count: int = 3) -> list[EpochBatches]:
    """Epochs of the second task: random images of six classes."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (120, 3, 8, 8), dtype=torch.uint8)
    pixels = Pixels(images.to(device), (0.5,) * 3, (0.3,) * 3, Augmentation(pad=1, crop="resized", flip=True))
    targets = torch.arange(6).repeat_interleave(20)
    parts = [RowSource(torch.arange(60, 120), rows[0], "current"), RowSource(torch.arange(0, 60, 3), rows[1], "past")]
    plans = [plan_epoch(parts, Composition(*rows, 1), Protocol(), 0, (1, 0), epoch) for epoch in range(count)]
    stored = Stored(parts[1].pool, {"logits": torch.randn(20, 3)})
    return [draw_batches(plan, pixels, targets, generator(0, "views", at), stored) for at, plan in enumerate(plans)]


def learner(
    made: type[Engine], registry: Registry, method: str, device: torch.device = CPU, norm: str = "tbbn", **named: Any
) -> Engine:
    """An engine at the start of the second task."""
    torch.manual_seed(0)
    how: Method = registry.methods[method].build()
    phase = Phase(gradient_noise=0.01 if method == "eeil" else 0.0)
    backbone = "tiny" if device.type == "cpu" else "resnet8"

    def build() -> nn.Module:
        body = registry.backbones[backbone].build(registry.norms[norm].build, signed_embedding=how.signed_embedding)
        return finish_norms(body, registry.norms[norm])

    net = how.network(build)
    net.grow(3)
    net = net.to(device)
    past = how.remember(net, Task(0, SIZES), lambda: iter([first_task_batch(device)]))
    net.grow(3)
    return made(net.to(device), how, TASK, phase, SCHEDULE, past, 0, **named)


def first_task_batch(device: torch.device) -> Any:
    batch = epochs(device, count=1)[0].batch(0)
    return type(batch)(batch.images, batch.targets % 3, Composition(16, 0, 0))


def learned(engine: Engine, feeds: list[EpochBatches]) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Terms of each epoch and the weights in the end."""
    terms = []
    for epoch, each in enumerate(feeds):
        engine.start_epoch(epoch)
        assert sum(1 for _ in engine.epoch(each)) == len(each)
        terms.append(engine.finish_epoch())
    return terms, {name: tensor.clone() for name, tensor in engine.net.state_dict().items()}


METHODS = ["ft", "eeil", "lucir", "podnet", "ssil", "afc", "wa", "er-ace", "der", "icarl", "der++", "bic"]


@pytest.mark.parametrize("method", METHODS)
def test_all_that_surrounds_a_capture_leaves_the_numbers_alone(registry: Registry, method: str) -> None:
    """Warm-up, its undoing, held rows, the step's own counter and the sums: the same bits as the eager engine."""
    terms, weights = learned(learner(Engine, registry, method), epochs(CPU))
    again, same = learned(learner(Remembered, registry, method), epochs(CPU))
    assert again == terms
    for name, tensor in weights.items():
        assert torch.equal(same[name], tensor), name


def test_what_is_captured_again_and_what_is_not(registry: Registry) -> None:
    engine = learner(Remembered, registry, "ft")
    Remembered.captures = 0
    learned(engine, epochs(CPU))
    assert Remembered.captures == 1
    learned(engine, epochs(CPU, rows=(8, 8), count=2))
    assert Remembered.captures == 2
    learned(engine, epochs(CPU, count=1))
    assert Remembered.captures == 2


def test_an_optimiser_that_continues_keeps_its_momentum_through_the_warm_up(registry: Registry) -> None:
    """As after a resumption: an engine that starts with the state of another."""
    whole = learned(learner(Engine, registry, "ft"), epochs(CPU))[1]
    first = learner(Engine, registry, "ft")
    learned(first, epochs(CPU)[:1])
    second = learner(Remembered, registry, "ft")
    second.net.load_state_dict(first.net.state_dict())
    second.load_optimizer(copy.deepcopy(first.optimizer.state_dict()))
    for epoch, each in list(enumerate(epochs(CPU)))[1:]:
        second.start_epoch(epoch)
        for _ in second.epoch(each):
            pass
    for name, tensor in second.net.state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def test_an_epoch_that_was_begun_elsewhere_ends_with_the_same_sums(registry: Registry) -> None:
    """As after a resumption within an epoch: the terms of earlier steps survive the warm-up."""
    [feeds] = epochs(CPU, count=1)
    terms, weights = learned(learner(Engine, registry, "eeil"), [feeds])
    first = learner(Engine, registry, "eeil")
    first.start_epoch(0)
    for step, _ in enumerate(first.epoch(feeds), 1):
        if step == 2:
            break
    second = learner(Remembered, registry, "eeil")
    second.net.load_state_dict(first.net.state_dict())
    second.load_optimizer(copy.deepcopy(first.optimizer.state_dict()))
    second.start_epoch(0, 2, copy.deepcopy(first.sums))
    assert sum(1 for _ in second.epoch(feeds, 2)) == len(feeds) - 2
    assert second.finish_epoch() == terms[0]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in second.net.state_dict().items())


def test_a_capture_that_fails_is_told_and_changes_nothing(registry: Registry) -> None:
    terms, weights = learned(learner(Engine, registry, "lucir"), epochs(CPU))
    with pytest.warns(
        RuntimeWarning, match=r"can't be captured \(operation not permitted .*\); going on eagerly"
    ) as told:
        again, same = learned(learner(Unwilling, registry, "lucir"), epochs(CPU))
    assert len(told) == 1
    assert again == terms
    assert all(torch.equal(same[name], tensor) for name, tensor in weights.items())


class FakeCuda:
    """What torch keeps of a capture, and how it is left behind where ``capture_end`` raises; works on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream: Any = "main"
        self.served: list[Any] = []  # pools that the allocator serves
        self.capturing = self.generator_captured = self.waited = False
        monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
        for name, value in {
            "device": lambda device: nullcontext(),
            "current_device": lambda: 0,
            "current_stream": lambda: SimpleNamespace(name=self.stream, wait_stream=self.wait),
            "set_stream": lambda stream: setattr(self, "stream", stream.name),
            "Stream": lambda: SimpleNamespace(name="side", wait_stream=lambda stream: None),
            "stream": self.on_stream,
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": lambda mode: None,
            "CUDAGraph": lambda: SimpleNamespace(reset=lambda: None, replay=lambda: None),
            "graph_pool_handle": lambda: (0, 7),
            "graph": self.graph,
            "default_generators": (self,),
            "synchronize": lambda: None,
            "empty_cache": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda device, pool: self.served.remove(pool), False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: None, False)

    def wait(self, stream: Any) -> None:
        self.waited = True

    @contextmanager
    def on_stream(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, stream.name
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def graph(self, graph: Any, pool: Any) -> Iterator[None]:
        self.stream, self.capturing, self.generator_captured = "capture", True, True
        self.served.append(pool)
        try:
            yield
        except BaseException:
            self.capturing = False
            raise RuntimeError("capture invalidated")  # noqa: B904, by capture_end, before anything is put back
        raise AssertionError("a step without a GPU is not captured")

    def clone_state(self) -> FakeCuda:
        return copy.copy(self)

    def graphsafe_get_state(self) -> bool:
        return self.generator_captured

    def graphsafe_set_state(self, captured: bool) -> None:
        self.generator_captured = captured


class CompilationError(Exception):
    """As Triton raises: no RuntimeError."""


@pytest.mark.parametrize(
    ("during", "error", "text"),
    [
        ("capture", RuntimeError("operation not permitted"), "operation not permitted"),
        ("capture", CompilationError("at 1:2: no"), "CompilationError: at 1:2: no"),
        ("warm-up", CompilationError("at 1:2: no\nmore"), "CompilationError: at 1:2: no"),
        ("warm-up", ZeroDivisionError(), "ZeroDivisionError"),
    ],
)
def test_a_refused_capture_leaves_torch_as_it_was(
    registry: Registry, during: str, error: Exception, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Allocator, stream and generator; whatever was raised, the phase goes on eagerly to the same numbers."""
    terms, weights = learned(learner(Engine, registry, "lucir"), epochs(CPU))
    cuda = FakeCuda(monkeypatch)
    engine = learner(CapturedEngine, registry, "lucir")
    plain = engine.update

    def update(batch: Any) -> None:
        plain(batch)
        if cuda.capturing or (during == "warm-up" and cuda.stream == "side"):
            raise error

    monkeypatch.setattr(engine, "update", update)
    with pytest.warns(CaptureRefused, match=re.escape(f"this step can't be captured ({text}); going on")) as told:
        again, same = learned(engine, epochs(CPU))
    assert len(told) == 1
    assert (cuda.stream, cuda.served, cuda.generator_captured) == ("main", [], False)
    assert cuda.waited
    assert again == terms
    assert all(torch.equal(same[name], tensor) for name, tensor in weights.items())


def test_a_warning_that_is_an_error_still_leaves_the_weights_as_they_were(registry: Registry) -> None:
    engine = learner(Unwilling, registry, "ft")
    before = copy.deepcopy(engine.net.state_dict())
    engine.start_epoch(0)
    steps = engine.epoch(epochs(CPU, count=1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureRefused)
        with pytest.raises(CaptureRefused):
            next(steps)
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.net.state_dict().items())


def test_a_step_of_a_feed_by_number_and_by_tensor() -> None:
    each = epochs(CPU, count=1)[0]
    for number, batch in enumerate(each):
        by_tensor = each.batch(torch.tensor([number]))
        assert torch.equal(batch.images, by_tensor.images)
        assert torch.equal(batch.targets, by_tensor.targets)
        assert torch.equal(each.targets[number], batch.targets)


def test_a_held_epoch_takes_over_another_in_the_same_memory() -> None:
    one, other = epochs(CPU, count=2)
    held = one.clone()
    address = held.views.top.data_ptr()
    held.copy_(other)
    assert held.views.top.data_ptr() == address
    assert torch.equal(held.batch(2).images, other.batch(2).images)
    assert not torch.equal(held.indices, one.indices)
    assert not torch.equal(one.indices, other.indices)


def test_a_rate_that_is_a_tensor_moves_weights_as_a_number_does() -> None:
    """What the engine does on a GPU, done on the CPU: a fused update that follows the tensor."""
    moved = []
    for rate in (0.1, torch.tensor(0.1)):
        weight = nn.Parameter(torch.ones(5))
        optimizer = torch.optim.SGD([weight], lr=rate, momentum=0.9, weight_decay=1e-4, fused=True)
        for factor in (1.0, 0.1):
            if isinstance(rate, Tensor):
                rate.fill_(0.1 * factor)
            else:
                optimizer.param_groups[0]["lr"] = 0.1 * factor
            weight.grad = torch.arange(5.0)
            optimizer.step()
        moved.append(weight.detach())
    torch.testing.assert_close(*moved, rtol=1e-6, atol=0)


def test_which_engine_a_device_gets(tiny: Callable[..., Spec], registry: Registry, tmp_path: Path) -> None:
    cuda = torch.device("cuda", 0)
    assert engine_class("auto", CPU) is engine_class("eager", cuda) is Engine
    assert engine_class("auto", cuda) is engine_class("graph", cuda) is CapturedEngine
    assert engine_class("compile", CPU) is CompiledEngine
    with pytest.raises(SpecError, match="engine graph needs a CUDA device, not cpu; take auto, eager or compile"):
        run(tiny(engine="graph"), tmp_path / "run", device="cpu", registry=registry)
    assert not (tmp_path / "run").exists()
    assert tiny(engine="eager").key == tiny().key
    assert tiny(precision="bf16").key != tiny().key


def test_a_run_with_captured_steps_resumes_to_the_same_numbers(
    tiny: Callable[..., Spec], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the runner, with a method that has a teacher and two phases."""
    whole = run(tiny(method="two-phases", norm="tbbn"), tmp_path / "eager", device="cpu", registry=registry)
    monkeypatch.setattr("cilnorm.experiment.runner.engine_class", lambda *_: Remembered)

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "epoch" and (event["task"], event["epoch"]) == (2, 1):
            raise KeyboardInterrupt

    spec = tiny(method="two-phases", norm="tbbn")
    with pytest.raises(KeyboardInterrupt):
        run(spec, tmp_path / "stopped", device="cpu", registry=registry, watch=[stop])
    assert resume(tmp_path / "stopped", device="cpu", registry=registry).matrix == whole.matrix


@pytest.fixture
def _forget_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_forget_compiled")
def test_a_compiled_backbone_learns_the_same(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: whole(module, backend=backend))
    terms = learned(learner(Engine, registry, "ft"), epochs(CPU, count=1))[0]
    engine = learner(CompiledEngine, registry, "ft")
    again = learned(engine, epochs(CPU, count=1))[0]
    assert len(compiled) == 1
    for one, other in zip(terms, again, strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    assert copy.deepcopy(engine.net.backbone)._compiled_call_impl is None


@pytest.mark.usefixtures("_forget_compiled")
def test_a_backbone_that_can_not_be_compiled_is_told_and_learns_eagerly(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: whole(module, backend=backend))
    terms, weights = learned(learner(Engine, registry, "ft"), epochs(CPU, count=1))
    with pytest.warns(RuntimeWarning, match="the backbone can't be compiled .*; going on eagerly"):
        again, same = learned(learner(CompiledEngine, registry, "ft"), epochs(CPU, count=1))
    assert again == terms
    assert all(torch.equal(same[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_near_and_reaches_no_loss(registry: Registry, method: str) -> None:
    exact = learned(learner(Engine, registry, method, precision="fp32"), epochs(CPU, count=1))[0][0]
    engine = learner(Engine, registry, method, precision="bf16")
    rough = learned(engine, epochs(CPU, count=1))[0][0]
    assert rough != exact
    assert rough == pytest.approx(exact, rel=0.1, abs=0.02)
    assert all(parameter.dtype == torch.float32 for parameter in engine.net.parameters())
    out = forward(engine.net, torch.randn(16, 3, 8, 8), "bf16")
    assert {tensor.dtype for tensor in (out.logits, out.scores, out.embedding, *out.maps)} == {torch.float32}


def test_precisions() -> None:
    assert choose_precision("auto", CPU) == "fp32"
    assert choose_precision("bf16", CPU) == "bf16"
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    for precision, allowed in (("fp32", False), ("tf32", True), ("bf16", True)):
        with matmul_precision(precision):  # type: ignore[arg-type]
            assert (matmul.allow_tf32, cudnn.allow_tf32) == (allowed, allowed)
    assert (matmul.allow_tf32, cudnn.allow_tf32) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", ["bn", "tbbn"])
def test_a_graph_learns_what_the_eager_engine_learns(
    registry: Registry, method: str, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses of 40 epochs of five steps to 1e-4, captured without complaint."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    cuda = torch.device("cuda", 0)
    with matmul_precision("fp32"):
        terms = learned(learner(Engine, registry, method, cuda, norm), epochs(cuda, count=40))[0]
        engine = learner(CapturedEngine, registry, method, cuda, norm)
        again = learned(engine, epochs(cuda, count=40))[0]
    assert len(engine._recordings) == 1
    for one, other in zip(terms, again, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("norm", sorted(load().norms))
def test_a_step_of_every_norm_is_captured(registry: Registry, norm: str) -> None:
    """Without a refusal, and with what the eager engine learns in three epochs."""
    cuda = torch.device("cuda", 0)
    with matmul_precision("fp32"):
        terms = learned(learner(Engine, registry, "ft", cuda, norm), epochs(cuda, count=3))[0]
        engine = learner(CapturedEngine, registry, "ft", cuda, norm)
        again = learned(engine, epochs(cuda, count=3))[0]
    assert not engine._refused
    assert len(engine._recordings) == 1
    for one, other in zip(terms, again, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-3)


def test_double_precision_is_that_of_the_whole_run(
    tiny: Callable[..., Spec], registry: Registry, tmp_path: Path
) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "epoch" and (event["task"], event["epoch"]) == (2, 1):
            raise KeyboardInterrupt

    spec = tiny(method="two-phases", norm="tbbn", precision="fp64")
    whole = run(spec, tmp_path / "whole", device="cpu", registry=registry)
    with pytest.raises(KeyboardInterrupt):
        run(spec, tmp_path / "stopped", device="cpu", registry=registry, watch=[stop])
    resume(tmp_path / "stopped", device="cpu", registry=registry)
    one, other = (
        torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["net"]
        for folder in (whole.folder, tmp_path / "stopped")
    )
    assert {tensor.dtype for tensor in one.values()} == {torch.float64, torch.long}
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
    assert torch.get_default_dtype() == torch.float32
