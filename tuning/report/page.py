"""A study as one self-contained HTML page: the verdict first, then what it rests on, what was tried and what it cost.

It is made from the files of the study's folder alone, so it can be made again at any time, and from what a killed search
left behind.
"""

from pathlib import Path

from training.report.page import page_templates, save_page
from tuning.report.charts import error_chart, final_chart, race_chart, race_rounds
from tuning.report.importance import importances
from tuning.report.reading import read_study, value_in_words
from tuning.report.words import (
    STATES,
    axis_name,
    command,
    comparisons,
    curve_sentence,
    facts,
    importance_sentence,
    number,
    origin,
    race_sentence,
    roles,
    seed_rows,
    short_name,
    subtitle,
    verdict_sentence,
)

_TEMPLATES = page_templates(
    Path(__file__).parent / "templates",
    number=number,
    origin=origin,
    axis_name=axis_name,
    short_name=short_name,
    value=value_in_words,
    roles=roles,
)

MOST_SHOWN = 12
"""Rows of a table that stand on the page; longer ones are folded."""


def write_study_report(path: Path) -> Path:
    """Writes report.html from the files of a study's folder and returns its path.

    Args:
        path: The folder of the study.

    Raises:
        ConfigError: `path` is not a study's folder, or cannot be written to.
    """
    study = read_study(path)
    shares = importances(study)
    html = _TEMPLATES.get_template("study.html.j2").render(
        title=f"{study.name}: study",
        study=study,
        subtitle=subtitle(study),
        verdict=verdict_sentence(study),
        facts=facts(study),
        comparisons=comparisons(study),
        seed_rows=seed_rows(study),
        final=final_chart(study),
        errors=error_chart(study),
        curve_sentence=curve_sentence(study),
        race=race_chart(study),
        race_sentence=race_sentence(study, race_rounds(study)),
        shares=shares,
        importance_sentence=importance_sentence(study, shares),
        states=STATES,
        command=command(study),
        most_shown=MOST_SHOWN,
    )
    return save_page(study.folder.report, html)
