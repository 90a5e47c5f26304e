"""
Running statistics, task by task
================================

In evaluation a batch norm uses running averages of what it saw. How far do they lie from what the same layer measures
on the images of each task alone? Asked of the last norm of a small network, after three tasks with a replay buffer.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from small_stream import COLOURS, TASKS, images_of, learn, network
from torch import Tensor, nn

import cilnorm
from cilnorm.running import statistics_layers


def inputs_of(layer: nn.Module, net: nn.Module, images: Tensor) -> Tensor:
    """What a layer is given, (C, values of a channel); the layers before it normalise as in evaluation."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, given, returned: seen.append(given[0]))
    with torch.no_grad():
        net.eval()(images)
    handle.remove()
    return seen[0].transpose(0, 1).flatten(1)


# %%
# The distance of the running mean from the mean of a task's images, in standard deviations of the task, averaged over
# channels.

found = {}
for label, norm, options in (("BN", "bn", {}), ("TBBN", "tbbn", {"splits": "auto"})):
    torch.manual_seed(0)
    net = cilnorm.convert_norms(network(), norm, **options)
    learn(net)
    last = list(statistics_layers(net).values())[-1]
    found[label] = []
    for task in range(TASKS):
        x = inputs_of(last, net, images_of(task))
        found[label].append(((last.running_mean - x.mean(1)).abs() / x.std(1)).mean().item())
    print(f"{label:5}", *(f"{distance:.3f}" for distance in found[label]))

# %%
# Both networks were trained once, with one seed: the picture shows what can be asked, and answers nothing. ``cilnorm
# probe bn-bias RUN`` asks it of every layer of a finished run.

figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
places = np.arange(TASKS)
for shift, colour, (label, distances) in zip((-0.2, 0.2), COLOURS, found.items(), strict=False):
    axes.bar(places + shift, distances, width=0.38, color=colour, label=label)
axes.set(xticks=places, xticklabels=[f"task {task + 1}" for task in places], ylabel="|μ_run − μ_task| / σ_task")
axes.set_title("Running mean of the last norm against each task's images", fontsize=10)
axes.legend()
plt.show()
