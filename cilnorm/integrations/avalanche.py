"""Avalanche: a plugin that tells the norms of a strategy's model what each batch is made of.

    cilnorm.convert_norms(model, "tbbn", splits="auto")
    Naive(model=model, ..., plugins=[ReplayPlugin(mem_size=2000), CompositionPlugin()])

Written for avalanche-lib 0.6 (``pip install "cilnorm[avalanche]"``). Its place among the plugins does not matter.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cilnorm.integrations.labelled_images import LabelledImages
from cilnorm.integrations.telling_hook import LearnedClasses, TellingHook

try:
    from avalanche.training.plugins import SupervisedPlugin
except ImportError:
    SupervisedPlugin = object

__all__ = ["CompositionPlugin"]


class CompositionPlugin(SupervisedPlugin):
    """Tells the model before every forward pass in training which rows belong to earlier experiences.

    It goes by the labels, so replayed rows of the running experience count as current, and a batch may have any number
    of rows. Copies of the model are told as well; evaluation needs no telling. What a norm adds to the loss is added to
    ``strategy.loss``. AGEM's reference batches are known; other plugins that pass images of their own through the
    model in training raise, unless ``note`` is called for these images before.

    Attributes:
        classes: the classes of each experience so far, by Avalanche's labels.

    Raises:
        ImportError: avalanche-lib is not installed.
        ValueError: in training: an experience that brings a class again (domain-incremental), or without classes.
        RuntimeError: in training: images whose labels are not known.
    """

    def __init__(self) -> None:
        if SupervisedPlugin is object:
            raise ImportError("CompositionPlugin needs Avalanche: pip install 'cilnorm[avalanche]'")
        super().__init__()
        self.classes = LearnedClasses()
        self._last: Any = None  # which experience is learned
        self._start()

    def _start(self) -> None:
        self._images = LabelledImages(keep=8)
        self._terms: dict[str, Tensor] = {}
        self._term: Tensor | None = None
        self.hook = TellingHook("Avalanche", self._images, lambda: self.classes, add_terms=self._terms.update)

    def note(self, images: Tensor, labels: Tensor) -> None:
        """Says the labels (N,) of images (N, C, H, W) that will pass through the model in this iteration."""
        self._images.note(images, labels)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Learns which classes are new."""
        self._begin(strategy.experience)
        self.hook.attach(strategy.model)
        for plugin in strategy.plugins:
            if hasattr(type(plugin), "sample_from_memory"):
                plugin.sample_from_memory = _Sampling(plugin, self._images)

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Notes the batch for plugins that use it before the strategy does."""
        self.note(strategy.mb_x, strategy.mb_y)

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        """Notes the batch, which plugins may have changed."""
        self.note(strategy.mb_x, strategy.mb_y)
        self._terms.clear()

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        """Takes what the norms add to the loss, before a teacher's pass adds its own."""
        self._term = sum(self._terms.values()) if self._terms else None  # type: ignore[assignment]

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Adds that to the loss."""
        if self._term is not None:
            strategy.loss = strategy.loss + self._term
            self._term = None

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Forgets the batch."""
        self._images.forget()

    def _begin(self, experience: Any) -> None:
        if hasattr(experience, "origin_experience"):  # a part of an experience, from an online stream
            experience = experience.origin_experience
        classes = getattr(experience, "classes_in_this_experience", None)
        if classes is None:
            raise ValueError("the experience does not say its classes, so a label does not say the task of a row")
        key = (experience.origin_stream, experience.current_experience)
        if self._last is None or key[0] is not self._last[0] or key[1] != self._last[1]:
            self.classes.begin(int(label) for label in classes)
            self._last = key

    def __getstate__(self) -> dict[str, Any]:
        return {"classes": self.classes, "_last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


class _Sampling:
    """``sample_from_memory`` of AGEM, whose batches are noted."""

    def __init__(self, plugin: Any, images: LabelledImages) -> None:
        self.plugin, self.images = plugin, images

    def __call__(self) -> Any:
        batch = type(self.plugin).sample_from_memory(self.plugin)
        self.images.note_parts(batch)
        return batch
