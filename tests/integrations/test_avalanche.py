"""CompositionPlugin in strategies of the real Avalanche, over random images that carry their label."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cilnorm
from cilnorm.integrations.avalanche import CompositionPlugin
from tests.integrations.loops import Witness, images_of, network, still_open

if importlib.util.find_spec("avalanche") is None:
    pytest.skip("avalanche-lib is not installed: pip install 'cilnorm[avalanche]'", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.scenarios import class_incremental_benchmark, split_online_stream
    from avalanche.benchmarks.scenarios.supervised import with_classes_timeline
    from avalanche.benchmarks.utils import _make_taskaware_tensor_classification_dataset
    from avalanche.training.plugins import AGEMPlugin, EvaluationPlugin, LwFPlugin, ReplayPlugin, SupervisedPlugin
    from avalanche.training.supervised import Naive

pytestmark = pytest.mark.slow
CLASSES, EACH = 6, 11  # three experiences of two classes; batches of 8 leave a last one of 6
ORDER = [3, 0, 5, 1, 4, 2]


def data(classes: list[int], each: int = EACH, seed: int = 0) -> Any:
    labels = torch.tensor(classes).repeat_interleave(each)
    return _make_taskaware_tensor_classification_dataset(images_of(labels, seed), labels, task_labels=0)


@pytest.fixture
def benchmark() -> Any:
    """Three experiences of two classes, which come in another order than their labels."""
    streams = {"train": data(list(range(CLASSES))), "test": data(list(range(CLASSES)), 3, seed=1)}
    return class_incremental_benchmark(streams, class_order=ORDER, num_experiences=3)


class ByOrder(Witness):
    """A witness that knows the order in which the classes are learned."""

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        images = args[0].clone()
        place = torch.tensor([ORDER.index(label) for label in range(CLASSES)])
        images[:, 0, 0, 0] = place[images[:, 0, 0, 0].round().long()].float()
        super().__call__(module, (images,))


def strategy(*plugins: Any, norm: str = "tbbn", model: nn.Module | None = None) -> tuple[Any, Witness]:
    options = {"splits": "auto"} if norm == "tbbn" else {}
    model = cilnorm.convert_norms(network(CLASSES), norm, **options) if model is None else model
    witness = ByOrder({0: 0, 1: 2, 2: 4})
    witness.attach(model)  # the hook goes in front of it
    made = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05), criterion=nn.CrossEntropyLoss(),
        train_mb_size=8, train_epochs=1, eval_mb_size=8, plugins=list(plugins), evaluator=EvaluationPlugin(),
    )  # fmt: skip
    return made, witness


def train(made: Any, benchmark: Any) -> None:
    for experience in benchmark.train_stream:
        made.train(experience)
        made.eval(benchmark.test_stream)
        assert not still_open(made.model)


@pytest.mark.parametrize("first", [True, False])
def test_replay_lwf_and_agem_are_told_every_pass(benchmark: Any, first: bool) -> None:
    others = [ReplayPlugin(mem_size=12), LwFPlugin(), AGEMPlugin(patterns_per_experience=6, sample_size=4)]
    plugins = [CompositionPlugin(), *others] if first else [*others, CompositionPlugin()]
    made, witness = strategy(*plugins)
    train(made, benchmark)
    assert [told[1:] for told in witness.passes if not told[0]] == [(8, 0), (8, 0), (6, 0)]
    for task in (1, 2):
        passes = [told for told in witness.passes if told[0] == task]
        # An iteration has AGEM's reference batch, the strategy's, and that of LwF's teacher, a copy in training mode.
        iterations = 3  # 22 images of the experience in batches of 8, the last one of 6
        assert len(passes) == 3 * iterations
        references, mixed, teacher = passes[::3], passes[1::3], passes[2::3]
        assert mixed == teacher
        assert {current for _, current, _ in references} == {0}
        assert all(past for _, _, past in mixed)
        assert mixed[-1][1] == 6


def test_replayed_rows_of_the_running_experience_are_current(benchmark: Any) -> None:
    class Repeat(SupervisedPlugin):
        """Puts the batch's first rows behind it once more."""

        def before_forward(self, strategy: Any, **kwargs: Any) -> None:
            strategy.mbatch = [torch.cat([part, part[:2]]) for part in strategy.mbatch]

    made, witness = strategy(Repeat(), CompositionPlugin())
    train(made, benchmark)
    assert witness.passes == [(task, rows, 0) for task in (0, 1, 2) for rows in (10, 10, 8)]


def test_what_a_norm_adds_to_the_loss_is_added(benchmark: Any) -> None:
    seen = []

    class Look(SupervisedPlugin):
        def after_backward(self, strategy: Any, **kwargs: Any) -> None:
            seen.append((strategy.loss - nn.functional.cross_entropy(strategy.mb_output, strategy.mb_y)).item())

    made, _ = strategy(ReplayPlugin(mem_size=12), CompositionPlugin(), Look(), norm="adab2n")
    train(made, benchmark)
    assert all(abs(term) < 1e-6 for term in seen[:3])
    assert all(term > 1e-6 for term in seen[3:])


def test_domain_incremental_streams_are_refused() -> None:
    made, _ = strategy(CompositionPlugin())
    domains = with_classes_timeline(benchmark_from_datasets(train=[data([0, 1]), data([0, 1], seed=1)]))
    first, second = domains.train_stream
    made.train(first)
    with pytest.raises(ValueError, match="brings class 0 again"):
        made.train(second)

    made, _ = strategy(CompositionPlugin())
    nameless = benchmark_from_datasets(train=[data([0, 1]), data([2, 3])])
    with pytest.raises(ValueError, match="does not say its classes"):
        made.train(next(iter(nameless.train_stream)))


def test_an_experience_may_be_trained_twice_and_in_parts(benchmark: Any) -> None:
    plugin = CompositionPlugin()
    made, _ = strategy(plugin)
    made.train(benchmark.train_stream[0])
    made.train(benchmark.train_stream[0])
    assert plugin.classes.tasks == [[0, 3]]
    with pytest.raises(ValueError, match="brings class 0 again"):
        made.train([benchmark.train_stream[1], benchmark.train_stream[0]])

    plugin = CompositionPlugin()
    made, _ = strategy(plugin)
    for part in split_online_stream(benchmark.train_stream, experience_size=8):
        made.train(part)
    assert plugin.classes.tasks == [[0, 3], [1, 5], [2, 4]]


def test_images_that_no_batch_held_are_refused(benchmark: Any) -> None:
    class Own(SupervisedPlugin):
        noted: CompositionPlugin | None = None

        def before_backward(self, strategy: Any, **kwargs: Any) -> None:
            labels = strategy.mb_y
            images = strategy.mb_x + 0.25
            if self.noted:
                self.noted.note(images, labels)
            strategy.loss = strategy.loss + strategy.model(images).square().mean()

    plugin, own = CompositionPlugin(), Own()
    made, _ = strategy(plugin, own)
    with pytest.raises(RuntimeError, match="8 of 8 rows are images that no batch held"):
        made.train(benchmark.train_stream[0])
    own.noted = plugin
    made.train(benchmark.train_stream[0])


def test_a_saved_strategy_goes_on(benchmark: Any) -> None:
    others = [ReplayPlugin(mem_size=12), AGEMPlugin(patterns_per_experience=6, sample_size=4), CompositionPlugin()]
    made, _ = strategy(*others)
    made.train(benchmark.train_stream[0])
    model, plugin = pickle.loads(pickle.dumps((made.model, others[2])))
    loaded, witness = strategy(ReplayPlugin(mem_size=12), plugin, model=model)
    with pytest.raises(ValueError, match="brings class 0 again"):
        loaded.train(benchmark.train_stream[0])
    loaded.train(benchmark.train_stream[1])
    assert plugin.classes.tasks == [[0, 3], [1, 5]]
    assert {told[0] for told in witness.passes} == {1}
    assert copy.deepcopy(plugin).classes.tasks == plugin.classes.tasks


def test_without_the_plugin_training_raises(benchmark: Any) -> None:
    made, _ = strategy()
    with pytest.raises(RuntimeError, match="does not know what the batch is made of"):
        made.train(benchmark.train_stream[0])
