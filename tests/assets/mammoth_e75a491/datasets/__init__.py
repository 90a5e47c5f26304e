import open_clip
import torch
from torch.utils.data import DataLoader

open_clip.create_model_and_transforms("ViT-B-16", pretrained="openai")


class Sequential:
    """Six classes in three tasks; images carry their label in the first value."""

    N_CLASSES, N_TASKS, N_CLASSES_PER_TASK = 6, 3, 2

    def __init__(self, setting):
        self.SETTING, self.c_task = setting, -1

    def get_offsets(self, task_idx=None):
        return 2 * task_idx, 2 * task_idx + 2

    def get_data_loaders(self):
        self.c_task += 1
        labels = torch.arange(2 * self.c_task, 2 * self.c_task + 2).repeat_interleave(9)
        images = torch.randn(len(labels), 3, 8, 8)
        images[:, 0, 0, 0] = labels.float()
        rows = [(image, label, image + 1) for image, label in zip(images, labels.tolist(), strict=True)]
        return DataLoader(rows, batch_size=8, shuffle=True), None


def get_dataset(args):
    return Sequential(args.setting)
