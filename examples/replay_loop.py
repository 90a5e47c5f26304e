"""Task-balanced batch norm in a training loop of one's own: a replay buffer, a frozen teacher, and evaluation.

    python examples/replay_loop.py

learns three tasks of five classes of the embedded data set and prints the accuracy on every task after each.
Two statements concern the norm: `convert_norms` puts the layers in, `rows` says what a batch is made of.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

import cilnorm

TASKS, NEW, EPOCHS, ROWS, KEPT = 3, 5, 8, 64, 20  # tasks, classes of each, epochs, rows of a batch, exemplars a class
MEAN, STD = 78.6, 51.0  # of the pixels, about


def network(classes: int) -> nn.Sequential:
    """A small network with plain batch norms, as anybody's."""
    layers: list[nn.Module] = []
    for width_in, width in ((3, 16), (16, 32), (32, 64)):
        convolution = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 3, 32, 32) and labels (N,) for training, then for tests."""
    data = cilnorm.registry.load().datasets["numerals"].build(train_per_class=80, test_per_class=20)
    train, test = ((images.float() - MEAN) / STD for images in (data.train_images, data.test_images))
    return train, data.train_labels, test, data.test_labels


def learn(net: nn.Module, teacher: nn.Module | None, task: int, images: Tensor, labels: Tensor) -> None:
    """Trains on images of this task and of the buffer, shuffled, with the teacher's logits for the old classes."""
    known = task * NEW
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels)).split(ROWS):
            x, y = images[rows], labels[rows]
            with cilnorm.rows(net, past=y < known, task=task):  # any order, any number of past rows
                logits = net(x)
            loss = cross_entropy(logits[:, : known + NEW], y)
            if teacher is not None:  # in evaluation mode, so it need not be told
                soft = teacher(x)[:, :known].softmax(1)
                loss = loss + kl_div(logits[:, :known].log_softmax(1), soft, reduction="batchmean")
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()


@torch.no_grad()
def accuracies(net: nn.Module, task: int, images: Tensor, labels: Tensor) -> list[float]:
    """Percent of the test images of each task so far, among all classes so far."""
    guesses = net.eval()(images)[:, : (task + 1) * NEW].argmax(1)
    right = (guesses == labels).float()
    return [100 * right[labels // NEW == index].mean().item() for index in range(task + 1)]


def main() -> None:
    """The stream of tasks."""
    torch.manual_seed(0)
    images, labels, test_images, test_labels = load()
    net = cilnorm.convert_norms(network(TASKS * NEW), "tbbn", splits="auto")
    buffer, teacher = torch.empty(0, dtype=torch.long), None
    for task in range(TASKS):
        current = (labels // NEW == task).nonzero().flatten()
        rows = torch.cat([current, buffer])
        learn(net.train(), teacher, task, images[rows], labels[rows])
        buffer = torch.cat([buffer, *(current[labels[current] == label][:KEPT] for label in labels[current].unique())])
        print(*(f"{value:5.1f}" for value in accuracies(net, task, test_images, test_labels)))
        teacher = copy.deepcopy(net).eval().requires_grad_(False)


if __name__ == "__main__":
    main()
