"""Data sets, augmentation, sampling and mixing: every draw is a pure function of (seed, epoch, sample index)."""
