"""
A probe: statistics measured anew
=================================

How much of what was forgotten comes back if nothing but the running statistics changes? After three tasks they are
measured anew, on as many images of every class, and every weight stays as it is.
"""

import copy

import matplotlib.pyplot as plt
import numpy as np
import torch
from small_stream import COLOURS, TASKS, accuracies, buffer_after, learn, network, train_images

import cilnorm

torch.manual_seed(0)
net = network()  # with plain batch norms
before = learn(net)[-1]

# %%
# The buffer holds as many images of each class, so it can be measured on. A second probe asks all training images,
# which a learner no longer has.

probed = {"before": before}
for name, chosen in (("the buffer", train_images[buffer_after(TASKS)]), ("all images", train_images)):
    twin = copy.deepcopy(net)
    cilnorm.measure_statistics(twin, chosen[torch.randperm(len(chosen))].split(100))
    probed[f"measured on {name}"] = accuracies(twin, TASKS)
for name, row in probed.items():
    print(f"{name:24}", *(f"{value:5.1f}" for value in row))

# %%
# One run of one seed. On a finished run, ``cilnorm probe precise RUN`` and ``cilnorm probe bn-bias RUN`` do the like,
# and ``--set statistics.precise=class-balanced`` does it after every task.

figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
places = np.arange(TASKS)
for shift, colour, (name, row) in zip((-0.27, 0, 0.27), COLOURS, probed.items(), strict=True):
    axes.bar(places + shift, row, width=0.25, color=colour, label=name)
axes.set(xticks=places, xticklabels=[f"task {task + 1}" for task in places], ylabel="accuracy in %", ylim=(0, 100))
axes.legend()
plt.show()
