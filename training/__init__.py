"""The training run: config, data, optimizer, loop, checkpoints, report."""
