from torch.nn import functional as F

from models.utils.continual_model import ContinualModel


class Model(ContinualModel):
    """A buffer that keeps no labels, but tasks."""

    def observe(self, inputs, labels, not_aug_inputs, epoch=None):
        outputs = self.net(inputs)
        loss = self.loss(outputs, labels)
        if not self.buffer.is_empty():
            buf_inputs, buf_logits, _ = self.buffer.get_data(4)
            loss = loss + F.mse_loss(self.net(buf_inputs), buf_logits)
        loss.backward()
        self.buffer.add_data(examples=not_aug_inputs, logits=outputs.data, task_labels=labels * 0 + self.current_task)
        return 0.0
