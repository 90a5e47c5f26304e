"""
The stream that the examples share
==================================

Three tasks of four textures at 16 pixels, a small network, a replay buffer, and a plain loop: seconds on one core.
``examples/replay_loop.py`` is the same with a teacher, to begin a project of one's own with.
"""

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

import cilnorm

TASKS, NEW, EPOCHS, ROWS, KEPT = 3, 4, 20, 64, 10  # tasks, classes of each, epochs, rows of a batch, exemplars a class
COLOURS = ("#0072b2", "#d55e00", "#009e73")  # apart for any colour vision


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 3, 16, 16) and labels (N,), numbered in the order of learning, for training, then for tests."""
    data = cilnorm.registry.load().datasets["textures"].build(train_per_class=80, test_per_class=25)
    classes = torch.randperm(100, generator=torch.Generator().manual_seed(0))[: TASKS * NEW]
    mean, std = (torch.tensor(each)[:, None, None] for each in (data.mean, data.std))
    found: list[Tensor] = []
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        rows, places = (labels[:, None] == classes).nonzero(as_tuple=True)
        found += [avg_pool2d((images[rows] / 255 - mean) / std, 2), places]
    return found[0], found[1], found[2], found[3]


train_images, train_labels, test_images, test_labels = load()


def network() -> nn.Sequential:
    """A small network with plain batch norms."""
    layers: list[nn.Module] = []
    for width_in, width in ((3, 16), (16, 32), (32, 64)):
        convolution = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4, TASKS * NEW))


def images_of(*tasks: int) -> Tensor:
    """The training images of some tasks."""
    return train_images[torch.isin(train_labels // NEW, torch.tensor(tasks))]


def buffer_after(tasks: int) -> Tensor:
    """The images (N,) that are kept after so many tasks, by their places: the first of each class."""
    kept = [(train_labels == label).nonzero().flatten()[:KEPT] for label in range(tasks * NEW)]
    return torch.cat(kept) if kept else torch.empty(0, dtype=torch.long)


def train(net: nn.Module, known: int, images: Tensor, labels: Tensor) -> None:
    """Cross-entropy over all classes so far, on shuffled current and stored images; norms are told which are past."""
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels)).split(ROWS):
            with cilnorm.rows(net, past=labels[rows] < known, task=known // NEW):
                logits = net(images[rows])
            loss = cross_entropy(logits[:, : known + NEW], labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()


@torch.no_grad()
def accuracies(net: nn.Module, tasks: int) -> list[float]:
    """Percent of the test images of each of the first tasks, among all classes of these."""
    right = (net.eval()(test_images)[:, : tasks * NEW].argmax(1) == test_labels).float()
    return [100 * right[test_labels // NEW == task].mean().item() for task in range(tasks)]


def learn(net: nn.Module) -> list[list[float]]:
    """Learns the three tasks; returns the accuracies after each."""
    matrix = []
    for task in range(TASKS):
        current = (train_labels // NEW == task).nonzero().flatten()
        rows = torch.cat([current, buffer_after(task)])
        train(net.train(), task * NEW, train_images[rows], train_labels[rows])
        matrix.append(accuracies(net, task + 1))
    return matrix


# %%
# An image of each class, a row a task.

if __name__ == "__main__":
    figure, grid = plt.subplots(TASKS, NEW, figsize=(3.6, 2.8), layout="constrained")
    for label, axes in enumerate(grid.flat):
        image = train_images[train_labels == label][0]
        axes.imshow(((image - image.min()) / (image.max() - image.min())).permute(1, 2, 0))
        axes.set_axis_off()
    plt.show()
