"""The kit catches plugins that are broken on purpose, one promise each, and says how to mend them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import cilnorm_norms.batch
from cilnorm import registry as registries
from cilnorm import testing
from cilnorm.batch import Batch, CompositionAware, Task
from cilnorm.cli import app as cli
from cilnorm.experiment import runner
from cilnorm.experiment.runner import run
from cilnorm.hookspecs import Backbone, Dataset, Logger, Norm, hookimpl
from cilnorm.hookspecs import Method as MethodRecord
from cilnorm.images import DatasetError, ImageSet
from cilnorm.method import Method, Past, Phase, Step
from cilnorm.network import Network
from cilnorm.rows_aware import RowsAware
from cilnorm.spec import SpecError
from cilnorm.testing import collection, toys
from cilnorm.testing.backbone_checks import backbone_checks
from cilnorm.testing.dataset_checks import dataset_checks
from cilnorm.testing.logger_checks import logger_checks
from cilnorm.testing.method_checks import method_checks
from cilnorm.testing.norm_checks import norm_checks
from tests import fake

pytestmark = pytest.mark.slow


def verdict(checks: Iterable[testing.Check], promise: str) -> str:
    """What the check of that promise says; empty if it is kept."""
    (check,) = [each for each in checks if each.promise == promise]
    try:
        check()
    except testing.Broken as error:
        return str(error)
    return ""


# Norms


class Changed(nn.BatchNorm2d):
    """A batch norm that subclasses break."""


class NoAffine(Changed):
    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True, **named: Any):
        super().__init__(num_features, eps, momentum, True, **named)


class Pooled(Changed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean((2, 3))


class InBatches(Changed):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, True)


class Detached(Changed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 0.5 * x.mean((0, 2, 3), keepdim=True).detach()) * x.detach().std()


class Hidden(Changed):
    seen = 0.0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = float(x.detach().mean())
        return super().forward(x) + self.seen


class Branching(Changed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean() > 0 else -x)


class Doubled(Changed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()


class Unfinished(CompositionAware, nn.BatchNorm2d):
    """Takes a composition and never asks for it."""

    def compose(self, composition: Any) -> None:
        pass


class Idle(Changed):
    """Whose scale learns only where the images do."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if x.requires_grad else self.weight.detach()
        return F.batch_norm(x, self.running_mean, self.running_var, weight, self.bias, self.training)


class Relaid(Changed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).contiguous()


class Narrow(Changed):
    """Sums in the type of its images."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        centred = x - x.mean((0, 2, 3), keepdim=True)
        return centred / (centred.square().mean((0, 2, 3), keepdim=True) + self.eps).sqrt()


class RoundedTwice(Changed):
    """Its statistics are float32, and what follows is not."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        y = F.batch_norm(wide, self.running_mean, self.running_var, None, None, self.training).to(x.dtype)
        return y * self.weight.to(x.dtype)[:, None, None] + self.bias.to(x.dtype)[:, None, None]


class Remembering(Changed):
    """Goes backward with what the last pass left in the layer."""

    def forward(self, x: Tensor) -> Tensor:
        self.scale = x.detach().std()
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * self.scale)
        return y


class Numbering(Unfinished):
    """Reads the number of the task in its forward pass."""

    def compose(self, composition: Any) -> None:
        self.task = composition.task

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.task)


class InPlaces(RowsAware, nn.BatchNorm2d):
    """Knows every row, and takes the first twelve for the current ones."""

    needs_rows = True

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.take(x)
            x = x - x[:12].mean((0, 2, 3), keepdim=True)
        return super().forward(x)


class Apart(cilnorm_norms.batch.BatchNorm2d):
    """Looks at the rows of one process, whatever it is told."""

    def ranks(self) -> None:
        return None


class OwnAverages(cilnorm_norms.batch.BatchNorm2d):
    """Normalises by the statistics of all processes, and keeps those of its own rows."""

    def forward(self, x: Tensor) -> Tensor:
        self.mine = x.detach().mean((0, 2, 3))
        return super().forward(x)

    def track(self, mean: Tensor, var: Tensor) -> None:
        super().track(self.mine, var)


class Centred(nn.Module):
    """Subtracts the mean of the rows at hand, and has no way to know of others."""

    def __init__(self, num_features: int, **named: Any):
        super().__init__()
        self.register_buffer("average", torch.zeros(num_features, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3), keepdim=True)[0] if self.training else self.average
        if self.training:
            self.average.lerp_(mean.detach(), 0.1)
        return x - mean


class Refusing(cilnorm_norms.batch.BatchNorm2d):
    def synchronise(self, process_group: Any = None) -> None:
        raise ValueError("no group of mine")


class Forgiving(nn.GroupNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__(1, num_features, eps, affine, device=device, dtype=dtype)


NORMS: list[tuple[type[nn.Module], dict[str, Any], str, str]] = [
    (NoAffine, {}, "signature", "make them only if affine is true"),
    (Pooled, {}, "shape_and_type", "a norm keeps shape and type"),
    (InBatches, {}, "evaluation_by_row", "use running statistics, or the image's own"),
    (Detached, {}, "gradients", "detach nothing that depends on x"),
    (Hidden, {}, "state_round_trip", "keep all that evaluation needs in parameters and buffers"),
    (Doubled, {}, "autocast", "keep x.dtype"),
    (Unfinished, {}, "claims", "derive from cilnorm.batch.CompositionAware; say what is so"),
    (Unfinished, {"composition_aware": True}, "untold", "raise, or results are wrong in silence"),
    (nn.BatchNorm2d, {"composition_aware": True}, "claims", "do not derive from cilnorm.batch.CompositionAware"),
    (nn.BatchNorm2d, {}, "checkpointing", "look at cilnorm.rows_aware.recomputing()"),
    (Branching, {}, "compiled", "read no value of a tensor"),
    (Idle, {}, "learns_alone", "weight gets no gradient where the images need none"),
    (Relaid, {}, "channels_last", "keep the memory format of x"),
    (Narrow, {}, "half_types", "compute in float32 inside and return the input's type"),
    (RoundedTwice, {}, "half_rounding", "off by more than one rounding of the exact one"),
    (Remembering, {}, "two_forwards", "keep what the backward pass needs with the pass"),
    (Numbering, {"composition_aware": True}, "evaluation_by_row", "look at it in training only"),
    (Numbering, {"composition_aware": True}, "compiled_for_ten_tasks", "reduce the composition to few numbers"),
    (InPlaces, {"needs_rows": True}, "rows_in_any_order", "go by `self.take(x).rows`"),
    (Apart, {}, "two_processes", "give the layer synchronise(group=None), from which on training sums"),
    (OwnAverages, {}, "two_processes", "or say one_process=True in the record: buffer running_mean differs"),
    (Centred, {}, "two_processes", "or say one_process=True in the record: output differs"),
    (Refusing, {}, "two_processes", "in one of two processes it raised ValueError: no group of mine"),
]


@pytest.mark.parametrize(
    ("build", "claims", "promise", "mend"), NORMS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_broken_norm_is_caught(build: type[nn.Module], claims: dict[str, Any], promise: str, mend: str) -> None:
    if promise == "compiled_for_ten_tasks" and torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 makes one graph for all numbers that a module holds, so this is not broken there")
    text = verdict(norm_checks(Norm("broken", build, **claims)), promise)
    assert mend in text
    assert text.startswith(f"norm broken, {promise.replace('_', ' ')}: ")
    assert text.endswith("See cilnorm.hookspecs.Norm.")


def test_a_norm_that_needs_nothing_is_whole() -> None:
    testing.check_norm(Norm("layer", Forgiving))


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (Norm("of-torch", nn.BatchNorm2d), "BatchNorm2d has no synchronise(group)"),
        (Norm("centred", Centred, one_process=True), "its record says one_process"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_norm_of_one_process_is_left_out_as_the_engine_refuses_it(record: Norm, why: str) -> None:
    (check,) = [each for each in norm_checks(record) if each.promise == "two_processes"]
    with pytest.raises(testing.NotChecked, match=f"a run of several processes is refused: {re.escape(why)}"):
        check()


# Methods


@dataclass(frozen=True)
class Plain(Method):
    """Cross-entropy.

    Attributes:
        strength (λ): of the term.
    """

    strength: float = 1.0

    def loss(self, step: Step) -> dict[str, Tensor]:
        return {"ce": self.strength * F.cross_entropy(step.out.logits, step.batch.targets)}


@dataclass(frozen=True)
class Silent(Plain):
    unsaid: float = 1.0


@dataclass(frozen=True)
class Reading(Plain):
    def loss(self, step: Step) -> dict[str, Tensor]:
        (loss,) = super().loss(step).values()
        return {"ce": loss if loss.item() < 1e9 else loss * 2}


@dataclass(frozen=True)
class PerRow(Plain):
    def loss(self, step: Step) -> dict[str, Tensor]:
        return {"ce": F.cross_entropy(step.out.logits, step.batch.targets, reduction="none")}


@dataclass(frozen=True)
class Endless(Plain):
    def loss(self, step: Step) -> dict[str, Tensor]:
        return {"ce": super().loss(step)["ce"] / torch.zeros(())}


@dataclass(frozen=True)
class Keeping(Plain):
    def remember(self, net: Network, task: Task, batches: Callable[[], Iterable[Batch]]) -> Past | None:
        return Past(net)


@dataclass(frozen=True)
class Leaking(Plain):
    def remember(self, net: Network, task: Task, batches: Callable[[], Iterable[Batch]]) -> Past | None:
        return Past(copy.deepcopy(net).eval())

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms = super().loss(step)
        if step.past is not None:
            terms["distil"] = step.past.net(step.batch.images).logits.square().mean()
        return terms


@dataclass(frozen=True)
class Meddling(Plain):
    def loss(self, step: Step) -> dict[str, Tensor]:
        terms = super().loss(step)
        with torch.no_grad():
            next(iter(step.net.parameters())).mul_(0.9)
        return terms


@dataclass(frozen=True)
class Thawing(Plain):
    """Trains its head, and moves the rest by itself."""

    def parameters(self, net: Network, phase: Phase) -> Iterator[nn.Parameter]:
        return net.head.parameters()

    def loss(self, step: Step) -> dict[str, Tensor]:
        with torch.no_grad():
            next(iter(step.net.backbone.parameters())).mul_(0.9)
        return super().loss(step)


@dataclass(frozen=True)
class Restless(Plain):
    """Asks the past in training mode, so that its running statistics move."""

    def remember(self, net: Network, task: Task, batches: Callable[[], Iterable[Batch]]) -> Past | None:
        return Past(copy.deepcopy(net).eval().requires_grad_(False))

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms = super().loss(step)
        if step.past is not None:
            step.past.net.train().observe(step.batch.composition)
            terms["distil"] = F.mse_loss(step.out.embedding, step.past.net(step.batch.images).embedding)
            step.past.net.eval()
        return terms


@dataclass(frozen=True)
class Misspelt(Plain):
    released = {"strenght": 2.0}  # noqa: RUF012


class Loose(Plain):
    """No dataclass of its own, and an argument without a default."""

    def __init__(self, strength: float) -> None:
        object.__setattr__(self, "strength", strength)


METHODS: list[tuple[Any, str, str]] = [
    (Silent, "options_are_told", "give the docstring an entry each"),
    (Reading, "nothing_is_read_back", "use torch.where"),
    (PerRow, "terms_are_named_numbers", "a term is one number"),
    (Endless, "terms_are_named_numbers", "terms must be finite"),
    (Keeping, "nothing_flows_into_the_past", "keep copy.deepcopy(net)"),
    (Leaking, "nothing_flows_into_the_past", "call .requires_grad_(False) on the copy"),
    (Thawing, "two_tasks", "moved, which parameters() does not give"),
    (Restless, "two_tasks", "training reaches ['backbone.bn1.running_mean'] of the past"),
    (Meddling, "what_stands_still_stands_still", "leave updates to the optimiser"),
    (Misspelt, "released_names_fields", "which are no fields of it nor `protocol.FIELD`"),
    (Loose, "is_a_method", "every option needs a default"),
    (dict, "is_a_method", "build must be a class derived from this one"),
]


@pytest.mark.parametrize(("build", "promise", "mend"), METHODS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_method_is_caught(build: Any, promise: str, mend: str) -> None:
    assert mend in verdict(method_checks(MethodRecord("broken", build)), promise)


@dataclass(frozen=True)
class Counting(Plain):
    """Its loss depends on how often it was asked, which no checkpoint knows."""

    asked = SimpleNamespace(times=0)

    def loss(self, step: Step) -> dict[str, Tensor]:
        self.asked.times += 1
        return {"ce": super().loss(step)["ce"] * (1 + 0.1 * self.asked.times)}


def test_a_method_that_does_not_resume_is_caught() -> None:
    text = verdict(method_checks(MethodRecord("broken", Counting)), "resumed_to_the_bit")
    assert "keep what a task needs in Past.tensors" in text


def test_a_whole_method_passes() -> None:
    testing.check_method(MethodRecord("plain", Plain))


# Backbones


class Shallow(fake.Tiny):
    """What subclasses break."""


class NoMaps(Shallow):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images)[0], []


class Bare(Shallow):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images)[0]


class OwnNorm(Shallow):
    def __init__(self, norm: Any, signed_embedding: bool = False) -> None:
        super().__init__(nn.BatchNorm2d, signed_embedding)


class AlwaysSigned(Shallow):
    def __init__(self, norm: Any, signed_embedding: bool = False) -> None:
        super().__init__(norm, True)


class NeverSigned(Shallow):
    def __init__(self, norm: Any, signed_embedding: bool = False) -> None:
        super().__init__(norm, False)


class AfterReLU(Shallow):
    def forward(self, images: Tensor) -> Any:
        embedding, maps = super().forward(images)
        return embedding, [F.relu(each) for each in maps]


class Copied(Shallow):
    def forward(self, images: Tensor) -> Any:
        embedding, maps = super().forward(images)
        return embedding, [each.detach() for each in maps]


class Nameless(Shallow):
    dim = "8"  # type: ignore[assignment]

    def __init__(self, norm: Any, signed_embedding: bool = False) -> None:
        type(self).dim = 8
        super().__init__(norm, signed_embedding)
        type(self).dim = "8"  # type: ignore[assignment]


BACKBONES: list[tuple[type[nn.Module], str, str]] = [
    (NoMaps, "embedding_and_maps", "return the output of each stage"),
    (Bare, "embedding_and_maps", "return (embedding, maps)"),
    (Copied, "maps_are_its_own", "return the maps themselves, not detached copies"),
    (Nameless, "embedding_and_maps", "`dim` must be the embedding's width"),
    (OwnNorm, "only_the_given_norm", "build every norm by norm(channels)"),
    (AlwaysSigned, "signed_embedding", "a ReLU is missing"),
    (NeverSigned, "signed_embedding", "leave out the last ReLU"),
    (AfterReLU, "maps_are_before_relu", "give it before its last ReLU"),
]


@pytest.mark.parametrize(("build", "promise", "mend"), BACKBONES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_backbone_is_caught(build: type[nn.Module], promise: str, mend: str) -> None:
    assert mend in verdict(backbone_checks(Backbone("broken", build)), promise)


def test_a_whole_backbone_passes() -> None:
    testing.check_backbone(Backbone("tiny", fake.Tiny))


# Data sets


def changed(**fields: Any) -> Callable[[Path | None], ImageSet]:
    return lambda root: replace(toys.images(root), **fields)


def lost(root: Path | None) -> ImageSet:
    raise FileNotFoundError("images.npy")


def unseeded(root: Path | None) -> ImageSet:
    whole = toys.images(root)
    return replace(whole, train_images=torch.randint(0, 256, whole.train_images.shape, dtype=torch.uint8))


DATASETS: list[tuple[Any, str, str]] = [
    (changed(train_images=toys.images(None).train_images.float()), "types_and_counts", "make them uint8"),
    (changed(test_labels=toys.images(None).test_labels + 1), "types_and_counts", "test labels run from 1 to 4"),
    (changed(class_names=("a", "b", "c", "d", "e")), "types_and_counts", "the class [4] has no train image"),
    (changed(mean=(120.0, 120.0, 120.0)), "types_and_counts", "it is of images scaled to [0, 1]"),
    (changed(digest=""), "digest", "64 hexadecimal digits"),
    (unseeded, "digest", "seed what is drawn"),
    (lost, "missing", "raise cilnorm.images.DatasetError with the layout"),
]


@pytest.mark.parametrize(("build", "promise", "mend"), DATASETS, ids=[f"{at}" for at in range(len(DATASETS))])
def test_a_broken_data_set_is_caught(build: Any, promise: str, mend: str) -> None:
    assert mend in verdict(dataset_checks(Dataset("broken", build)), promise)


@pytest.mark.parametrize("careful", [True, False])
def test_a_data_set_that_takes_damage_for_images_is_caught(careful: bool, tmp_path: Path) -> None:
    whole = toys.images(None).train_images.numpy().tobytes()
    (tmp_path / "images.bin").write_bytes(whole)

    def build(root: Path | None) -> ImageSet:
        assert root is not None
        if careful and (root / "images.bin").stat().st_size != len(whole):
            raise DatasetError(f"{root}/images.bin is damaged")
        return toys.images(root)

    text = verdict(dataset_checks(Dataset("files", build, found=lambda root: True), tmp_path), "damaged")
    assert ("" if careful else "a file cut in half was taken for whole") in text
    assert bool(text) is not careful


# Refused before training


def test_a_backbone_without_maps_is_refused_where_a_method_compares_them(tmp_path: Path) -> None:
    registry = toys.registry_with("backbone", Backbone("flat", NoMaps))
    for method in ("podnet", "afc"):
        spec = toys.toy_spec(registry, method=method, backbone="flat")
        with pytest.raises(SpecError, match=f"{method} compares stage maps, and the backbone flat gives none"):
            run(spec, tmp_path / method, device="cpu", registry=registry)
        assert not (tmp_path / method).exists()


def test_a_data_set_without_a_digest_is_refused(tmp_path: Path) -> None:
    registry = toys.registry_with("dataset", Dataset("undigested", changed(digest="")))
    spec = toys.toy_spec(registry, dataset="undigested")
    with pytest.raises(DatasetError, match="the data set undigested has no digest"):
        run(spec, tmp_path / "run", device="cpu", registry=registry)
    assert not (tmp_path / "run").exists()


# Loggers


def writing(folder: Path) -> Callable[[dict[str, Any]], None]:
    def write(event: dict[str, Any]) -> None:
        (folder / "mine.txt").write_text(event["event"])

    return write


def choosy(folder: Path) -> Callable[[dict[str, Any]], None]:
    def look(event: dict[str, Any]) -> None:
        event["task"]

    return look


def test_a_logger_that_takes_not_every_event_is_caught() -> None:
    assert "it can't take the event 'run'" in verdict(logger_checks(Logger("broken", choosy)), "takes_events")


def test_a_logger_says_what_it_writes() -> None:
    text = verdict(logger_checks(Logger("broken", writing)), "says_what_it_writes")
    assert "it wrote ['mine.txt']; add a pattern" in text
    testing.check_logger(Logger("whole", writing, files=("mine.txt",)))


# All of them


def test_checks_draw_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would take most of a check's time."""
    drawn: list[Any] = []
    monkeypatch.setattr(runner, "draw_figures", lambda *told: drawn.append(told))
    checks = [
        *logger_checks(Logger("mine", writing, files=("mine.txt",))),
        *method_checks(MethodRecord("plain", Plain)),
        *norm_checks(Norm("layer", Forgiving)),
    ]
    for check in checks:
        if check.promise in ("says_what_it_writes", "resumed_to_the_bit", "trains"):
            check()
    assert not drawn


# From outside


class Stranger:
    """A plugin of a distribution: one norm that is whole and one that is not."""

    @staticmethod
    @hookimpl
    def cilnorm_norms() -> list[Norm]:
        return [Norm("whole", Forgiving), Norm("pooled", Pooled)]


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    known = registries.load()
    norms = replace(known.norms, records={**known.norms.records, **{r.name: r for r in Stranger.cilnorm_norms()}})
    plugin = registries.Plugin("mine", "cilnorm-mine 1.0", (("norm", "whole"), ("norm", "pooled")))
    broken = registries.Plugin("other", "cilnorm-other 1.0", error="ImportError: no module named nothing")
    made = replace(known, norms=norms, plugins=(*known.plugins, plugin, broken))
    monkeypatch.setattr(registries, "load", lambda *arguments, **named: made)


@pytest.mark.usefixtures("stranger")
def test_a_distribution_is_checked_from_the_command_line() -> None:
    result = CliRunner().invoke(cli.app, ["check", "CILNORM_MINE", "--quick"])
    assert result.exit_code == 1
    assert "ok      norm whole, gradients" in result.output
    assert "BROKEN  norm pooled, shape and type" in result.output
    assert CliRunner().invoke(cli.app, ["check", "cilnorm-mine", "--quick", "--name", "whole"]).exit_code == 0


@pytest.mark.usefixtures("stranger")
def test_what_can_not_be_checked_is_said() -> None:
    for name, said in (("cilnorm-mein", "did you mean 'cilnorm-mine'?"), ("cilnorm-other", "no module named nothing")):
        result = CliRunner().invoke(cli.app, ["check", name])
        assert result.exit_code == 2
        assert said in result.output


@pytest.mark.usefixtures("stranger")
def test_one_line_is_a_test_of_pytest() -> None:
    test_plugin = testing.plugin_checks("cilnorm-mine", slow=False)
    (mark,) = test_plugin.pytestmark  # type: ignore[attr-defined]
    assert "norm-whole-gradients" in mark.kwargs["ids"]
    by_label = {check.label: check for check in mark.args[1]}
    test_plugin(by_label["norm-whole-gradients"])
    with pytest.raises(testing.Broken, match="a norm keeps shape and type"):
        test_plugin(by_label["norm-pooled-shape_and_type"])


def test_what_is_not_here_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = next(iter(dataset_checks(Dataset("absent", lost, found=lambda root: False))))
    monkeypatch.setattr(collection, "checks_of", lambda *arguments, **named: [absent])
    with pytest.raises(pytest.skip.Exception, match="name their folder with --data-root"):
        testing.plugin_checks("cilnorm-mine")(absent)
