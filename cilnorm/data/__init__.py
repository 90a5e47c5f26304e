"""Image files, decoded once into a memory-mapped file that runs share."""
