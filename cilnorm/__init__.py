"""Any normalisation layer with any class-incremental method on any backbone."""
