"""Feature extractors, one file a family."""
