from torch import optim
from torch.nn import functional as F
from torch.utils.data import DataLoader
from utils.inc_net import IncrementalNet, detached


class Replay:
    def __init__(self, args):
        self.args = args
        self._cur_task, self._known_classes, self._total_classes = -1, 0, 0
        self._network, self._old_network, self._memory = IncrementalNet(args, False), None, []

    def after_task(self):
        self._old_network = self._network.copy()  # in training mode, unlike PyCIL's
        self._known_classes = self._total_classes

    def incremental_train(self, data_manager):
        self._cur_task += 1
        self._total_classes = self._known_classes + data_manager.get_task_size(self._cur_task)
        self._network.update_fc(self._total_classes)
        dataset = data_manager.get_dataset(range(self._known_classes, self._total_classes), self._memory)
        loader = DataLoader(dataset, batch_size=8, shuffle=True, num_workers=0)
        optimizer = optim.SGD(self._network.parameters(), lr=0.01)
        self._network.train()
        for _, inputs, targets in loader:
            if self.args.get("shifts"):
                inputs = inputs + 0.1
            logits = self._network(inputs.clone())["logits"]
            loss = F.cross_entropy(logits, targets)
            if self._old_network is not None:
                loss = loss + detached(self._old_network(inputs)["logits"]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self._memory = [(image, label) for _, image, label in dataset[::3]]
