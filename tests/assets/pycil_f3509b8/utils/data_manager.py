import torch


class DataManager:
    """Six classes of images that carry their label in the first value; the classes are already in their order."""

    def __init__(self, dataset_name, shuffle, seed, init_cls, increment, aug=1):
        self._increments = [init_cls, increment, 6 - init_cls - increment]

    @property
    def nb_tasks(self):
        return len(self._increments)

    def get_task_size(self, task):
        return self._increments[task]

    def get_dataset(self, indices, appendent=()):
        labels = torch.tensor([label for label in indices for _ in range(9)])
        images = torch.randn(len(labels), 3, 8, 8)
        images[:, 0, 0, 0] = labels.float()
        rows = list(zip(images, labels.tolist(), strict=True)) + list(appendent)
        return [(number, image, label) for number, (image, label) in enumerate(rows)]
