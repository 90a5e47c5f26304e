"""A norm for cilnorm in a distribution of its own."""
