"""Runs whose network grows: whatever is done to a run is done to these too, and ends with the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from cilnorm.experiment.assembly import assemble
from cilnorm.experiment.runner import Result, resume, run
from cilnorm.registry import Registry
from cilnorm.results.export import export
from cilnorm.results.probe import bn_bias
from cilnorm.spec import Spec
from cilnorm.storage.checkpoint import Checkpoints
from cilnorm.training.fast_engines import CompiledEngine
from tests.training.test_engine import Remembered

pytestmark = pytest.mark.slow

Tiny = Callable[..., Spec]
METHODS = ("der", "foster")
ENGINE = "cilnorm.experiment.runner.engine_class"


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = Checkpoints(folder / "checkpoints", {}).newest()["net"]
    return found


def assert_same(one: Result, other: Result) -> None:
    assert one.matrix == other.matrix
    assert weights(one.folder).keys() == weights(other.folder).keys()
    for name, tensor in weights(one.folder).items():
        assert torch.equal(tensor, weights(other.folder)[name]), name
    assert one.summary.get("by_view") == other.summary.get("by_view")


@pytest.fixture(params=METHODS)
def grown(request: pytest.FixtureRequest, tiny: Tiny, registry: Registry, tmp_path: Path) -> tuple[Spec, Result]:
    """A finished run of two tasks."""
    spec = tiny(method=request.param, norm="tbbn", tasks=2, classes=4)
    return spec, run(spec, tmp_path / "whole", device="cpu", registry=registry)


@pytest.mark.parametrize(("kind", "number"), [("step", 5), ("epoch", 2), ("step", 10), ("epoch", 5), ("accuracy", 1)])
@pytest.mark.parametrize("method", METHODS)
def test_it_goes_on_to_the_same_bits(
    method: str, kind: str, number: int, tiny: Tiny, registry: Registry, tmp_path: Path
) -> None:
    """Stopped in either task, between and within epochs."""
    spec, met = tiny(method=method, norm="tbbn", tasks=2, classes=4), 0

    def stop(event: dict[str, Any]) -> None:
        nonlocal met
        met += event["event"] == kind
        if event["event"] == kind and met == number:
            raise KeyboardInterrupt

    whole = run(spec, tmp_path / "whole", device="cpu", registry=registry)
    with pytest.raises(KeyboardInterrupt):
        run(spec, tmp_path / "cut", device="cpu", registry=registry, watch=[stop], checkpoint_every=1e-9)
    assert_same(resume(tmp_path / "cut", device="cpu", registry=registry), whole)


def test_captured_steps_give_the_same_bits(
    grown: tuple[Spec, Result], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, whole = grown
    monkeypatch.setattr(ENGINE, lambda *_: Remembered)
    assert_same(run(spec, tmp_path / "captured", device="cpu", registry=registry), whole)


def test_compiled_steps_learn_the_same(
    grown: tuple[Spec, Result], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, whole = grown
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled(module, backend=backend))
    monkeypatch.setattr(ENGINE, lambda *_: CompiledEngine)
    again = run(spec, tmp_path / "compiled", device="cpu", registry=registry)
    torch.compiler.reset()
    phases = 1 + len(registry.methods[spec.method].build(**spec.method_options).phases(assembled(spec, registry)[1]))
    assert len(graphs) >= phases
    for name, tensor in weights(whole.folder).items():
        torch.testing.assert_close(weights(again.folder)[name], tensor, rtol=1e-3, atol=1e-4)


def assembled(spec: Spec, registry: Registry) -> tuple[Any, Any]:
    """The network, filled from nothing, and the second task."""
    parts = assemble(spec, registry, torch.device("cpu"))
    return parts, parts.stream.tasks[1]


def test_the_probe_tunes_every_extractor_that_is_used(grown: tuple[Spec, Result], registry: Registry) -> None:
    spec, whole = grown
    probe = bn_bias(whole.folder, epochs=1, device="cpu", registry=registry)
    assert probe.accuracy["before"] == whole.matrix[-1]
    assert list(probe.accuracy) == ["before", "statistics", "affine", "both"]
    used = {"der": (0, 1), "foster": (2,)}[spec.method]
    assert {row["layer"] for row in probe.layers} == {f"backbone.extractors.{at}.norm" for at in used}
    assert all(row["mean"] < 100 for row in probe.layers)


def test_statistics_measured_anew_are_those_of_what_learned(
    grown: tuple[Spec, Result], tiny: Tiny, registry: Registry, tmp_path: Path
) -> None:
    spec, _ = grown
    again = tiny(method=spec.method, norm="bn", tasks=2, classes=4, precise="class-balanced")
    plain = tiny(method=spec.method, norm="bn", tasks=2, classes=4)
    folders = [run(s, tmp_path / s.key, device="cpu", registry=registry).folder for s in (plain, again)]
    first = {name: tensor for name, tensor in weights(folders[0]).items() if "running_mean" in name}
    moved = {name for name, tensor in first.items() if not torch.equal(tensor, weights(folders[1])[name])}
    assert moved == first.keys()  # the first extractor's after the first task, its successor's after the second


def test_an_export_has_every_extractor(grown: tuple[Spec, Result], registry: Registry, tmp_path: Path) -> None:
    spec, whole = grown
    weights_file, card_file = export(whole.folder, tmp_path / "out", registry)
    exported, card = safetensors.torch.load_file(weights_file), json.loads(card_file.read_text())
    parts, _ = assembled(spec, registry)
    Checkpoints.of(whole.folder / "checkpoints", spec, parts.images.digest).read(parts.net, parts.stream.tasks)
    assert exported.keys() == parts.net.state_dict().keys()
    assert card["backbone"]["extractors"] == len(parts.net.backbone.extractors)
    images = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        out = parts.net.eval()(images)
        affine = exported["head.blocks.0.weight"], exported["head.blocks.0.bias"]
        torch.testing.assert_close(out.logits, nn.functional.linear(out.embedding, *affine))
    assert card["backbone"]["embedding"] == out.embedding.shape[1]
