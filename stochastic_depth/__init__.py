"""Stochastic depth of a whole model, ours or anybody's: `set_drop_path`, `drop_path_report`, `verify_skip`."""

from stochastic_depth.proof import verify_skip
from stochastic_depth.report import DropPathReport, drop_path_report
from stochastic_depth.setting import StochasticDepth, set_drop_path

__all__ = ["DropPathReport", "StochasticDepth", "drop_path_report", "set_drop_path", "verify_skip"]
