"""One epoch: which images stand in which batch, how they look, and how a step is executed. Knows no Spec."""
