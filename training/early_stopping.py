"""Early stopping. What it remembers is part of `Progress`, and so of every checkpoint."""

import math
from collections.abc import Mapping

from files.words import counted
from training.distributed import World
from training.recipe import EarlyStoppingSection
from training.state import Progress


def note_epoch(section: EarlyStoppingSection, progress: Progress, metrics: Mapping[str, float], world: World) -> None:
    """Compares the metrics of an epoch with the best so far. Every process calls it, and all come to the same."""
    if section.patience is None:
        return
    value, best = metrics[section.metric], progress.best_metric
    if math.isfinite(value) and (best is None or section.sign * (value - best) > section.min_delta):
        progress.best_metric, progress.bad_epochs = value, 0
    else:
        progress.bad_epochs += 1
    if world.any(progress.bad_epochs >= section.patience):
        progress.bad_epochs = max(progress.bad_epochs, section.patience)


def stop_reason(section: EarlyStoppingSection, progress: Progress) -> str | None:
    """Why a run that is there ends early, in words; None where it goes on."""
    if section.patience is None or progress.bad_epochs < section.patience:
        return None
    epochs = counted(progress.bad_epochs, "epoch")
    best = "finite" if progress.best_metric is None else f"better than {progress.best_metric:.6g}"
    return f"stopped early after epoch {progress.epoch}: {section.metric} has not been {best} for {epochs}"
