"""How much each parameter mattered: shares of the variance of scores, by Optuna's fANOVA over the trials."""

import math
import warnings
from typing import Any

from tuning.report.reading import Study, is_number, value_in_words

FEWEST_TRIALS = 10
"""Scored, below which a ranking is a guess."""

TREES, DEPTH = 32, 8
"""Of the forest: full-grown trees say the same and take minutes for 1,000 trials."""


def importances(study: Study) -> dict[str, float]:
    """Share of each parameter, the largest first, together 1; empty where there is nothing to rank or too little to tell.

    Trials count by the mean of their scores.
    """
    keys = study.parameters
    trials = [t for t in study.scored if all(key in t.parameters for key in keys)]
    if len(keys) < 2 or len(trials) < FEWEST_TRIALS or len({t.mean for t in trials}) < 2:
        return {}
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    of: dict[str, BaseDistribution] = {}
    columns: dict[str, list[Any]] = {}
    for key in keys:
        values = [t.parameters[key] for t in trials]
        if all(map(is_number, values)):
            low, high = float(min(values)), float(max(values))
            of[key] = FloatDistribution(low, high, log=bool(study.setting("space", key, "log")) and low > 0)
            columns[key] = [float(value) for value in values]
        else:
            columns[key] = [value_in_words(value) for value in values]
            of[key] = CategoricalDistribution(sorted(set(columns[key])))
    known = optuna.create_study(direction="minimize" if study.lower_is_better else "maximize")
    for i, trial in enumerate(trials):
        parameters = {key: columns[key][i] for key in keys}
        known.add_trial(optuna.create_trial(params=parameters, distributions=of, value=trial.mean))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some evaluators are called experimental
        evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=TREES, max_depth=DEPTH, seed=0)
        found = optuna.importance.get_param_importances(known, evaluator=evaluator)
    shares = {key: float(value) for key, value in found.items()}
    return shares if all(map(math.isfinite, shares.values())) else {}
