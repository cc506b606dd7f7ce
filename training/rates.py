"""rates.csv: how often stochastic depth was asked to drop and how often it did, epoch by epoch.

Counters are read and nothing is drawn. They count from the start of the run and are part of each checkpoint, so that a row
does not depend on where the run was interrupted; an epoch's own rate is the difference of two rows.
"""

import math

from stochastic_depth.graft import is_applied, role_of
from stochastic_depth.setting import StochasticDepth

RATE_COLUMNS = ("epoch", "nominal_rate", "drawn", "dropped", "computed")
"""Of rates.csv: the rate asked for, on average over branches and over the steps of the epoch; then, since the start of the
run and summed over branches, samples drawn for, dropped, and computed. Of the main process."""


def rates_row(depth: StochasticDepth, *, epoch: int, steps_per_epoch: int) -> dict[str, float]:
    """The row of an epoch that has just ended.

    Args:
        depth: Of the run.
        epoch: 0-based.
        steps_per_epoch: Optimizer steps.
    """
    modules = [
        module
        for block in depth.blocks
        for module in block.drop_paths.values()
        if is_applied(module) and role_of(module) != "silent"
    ]
    steps = range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
    multiplier = math.fsum(depth.schedule(step) for step in steps) / steps_per_epoch
    nominal = math.fsum(module.drop_prob for module in modules) / max(len(modules), 1)
    return {
        "epoch": epoch + 1,
        "nominal_rate": nominal * multiplier,
        "drawn": sum(module.samples_seen for module in modules),
        "dropped": sum(module.samples_dropped for module in modules),
        "computed": sum(module.samples_computed for module in modules),
    }
