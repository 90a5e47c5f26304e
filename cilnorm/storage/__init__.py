"""A run on the disk: its folder, its log, its checkpoints, who may write there; all of it survives a crash."""
