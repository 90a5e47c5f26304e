"""Where a run's events go besides its own log, one file a place."""
