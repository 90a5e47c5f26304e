"""The machinery of task-balanced batch norm: the pass with its gradient, kernels, rows in any order, a slow check."""
