"""
The accuracy matrix of a run
============================

A run leaves a matrix: row t holds the accuracies on tasks 1 to t after learning task t, in percent, among all classes
seen by then. Everything that is reported is a mean over a part of it.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import cilnorm

# Three tasks of three classes, some seconds each. From the command line:
# cilnorm run --norm tbbn --tasks 3 --set classes=9 --epochs 5
spec = cilnorm.resolve("quick", norm="tbbn", tasks=3, classes=9, epochs=5)
with tempfile.TemporaryDirectory() as folder:
    result = cilnorm.run(spec, Path(folder) / "run", device="cpu")

for task, row in enumerate(result.matrix, start=1):
    print(f"after task {task}:", *(f"{value:5.1f}" for value in row))

# %%
# The matrix
# ----------
# The diagonal is what was learned (A_l is its mean), the last row what is left (A_f). Down a column a task is
# forgotten.

count = len(result.matrix)
matrix = np.full((count, count), np.nan)
for index, row in enumerate(result.matrix):
    matrix[index, : len(row)] = row

figure, axes = plt.subplots(figsize=(4.6, 4), layout="constrained")
image = axes.imshow(matrix, cmap="Blues", vmin=0, vmax=100)
for (row, column), value in np.ndenumerate(matrix):
    if not np.isnan(value):
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", color="white" if value > 55 else "black")
ticks = range(count)
axes.set(xticks=ticks, yticks=ticks, xticklabels=[f"task {t + 1}" for t in ticks])
axes.set_yticklabels([f"after {t + 1}" for t in ticks])
figure.colorbar(image, label="accuracy in %", shrink=0.8)
plt.show()

# %%
# What the summary says
# ---------------------
# F is what was forgotten of each task's best accuracy, a mean over all tasks; A_a the mean over the rows' means.
# Tasks are of one size here, so plain means do.

best, final = np.nanmax(matrix, axis=0), matrix[-1]
print(f"A_f {final.mean():.2f}  A_l {np.diag(matrix).mean():.2f}  F {(best - final).mean():.2f}", end="  ")
print(f"A_a {np.nanmean(matrix, axis=1).mean():.2f}")
print({name: result.summary[name] for name in ("A_f", "A_l", "F", "A_a")})
