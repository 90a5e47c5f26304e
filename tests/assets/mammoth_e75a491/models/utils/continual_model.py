import torch
from datasets import get_dataset  # noqa: F401  (as Mammoth does; its data sets come in with it)
from torch import nn
from utils.buffer import Buffer


class ContinualModel(nn.Module):
    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__()
        self.net, self.loss, self.args, self.dataset = backbone, loss, args, dataset
        self.SETTING, self._current_task, self.buffer = dataset.SETTING, 0, Buffer(100)
        self.opt = torch.optim.SGD(self.net.parameters(), lr=0.01)

    @property
    def current_task(self):
        return self._current_task

    def get_offsets(self, task):
        return self.dataset.get_offsets(task)

    def meta_begin_task(self, dataset):
        pass

    def meta_end_task(self, dataset):
        self._current_task += 1

    def meta_observe(self, *args, **kwargs):
        return self.observe(*args, **kwargs)
