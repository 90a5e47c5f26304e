"""Class-incremental methods, one file a method."""
