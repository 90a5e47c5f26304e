"""cilnorm's norms in training loops that others wrote: Avalanche, PyCIL, Mammoth. ``docs/frameworks.md`` has commands.

Each integration answers one question before every forward pass in training: which task is each row of? It goes by the
labels of the images, never by their places in the batch, and raises where a label is not known.
"""
