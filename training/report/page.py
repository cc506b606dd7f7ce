"""A run as one self-contained HTML page, and runs side by side.

A page is made from files alone (config.yaml, environment.json, metrics.csv, summary.json, drop_path.csv), so it can be
made again anywhere, and from what a killed run left behind. Accuracies are percentages; `seconds` counts from the
run's start.
"""

from collections.abc import Sequence
from pathlib import Path

import jinja2

from files.durable import CheckpointError, save_text
from files.errors import ConfigError
from training.report.charts import compare_charts, rates_chart, run_charts, schedule_chart
from training.report.runs import read_run
from training.report.words import (
    drop_path_settings,
    drop_path_verdict,
    format_count,
    format_duration,
    format_percent,
    format_rate,
    format_share,
    in_words,
    run_facts,
    run_origin,
    run_verdict,
)
from training.run_folder import RunFolder

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --paper: #fff; --card: #f5f6f8; --ink: #1b1f24; --soft: #59626e; --line: #dbe0e6;
  --pale: #bcc6d2;
  --s0: #2563eb; --s1: #d9480f; --s2: #0f8a5f; --s3: #a21caf;
  --s4: #0e7490; --s5: #a16207; --s6: #64748b; --s7: #be123c }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --card: #1d2126; --ink: #e7eaee; --soft: #a2acb8; --line: #363d46;
    --pale: #4d5763;
    --s0: #6ea8fe; --s1: #ff9f5a; --s2: #4ade9b; --s3: #e58bf5;
    --s4: #5fd3e8; --s5: #f5c04a; --s6: #a9b4c2; --s7: #ff8095 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1.25rem clamp(0.9rem, 3vw, 2.5rem) 3rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere }
h2 { margin: 2.2rem 0 0.7rem; font-size: 1.15rem }
p { margin: 0.4rem 0 0.8rem; max-width: 48rem }
.soft, figcaption { color: var(--soft) }
.verdict { font-size: 1.1rem; margin: 0.6rem 0 1.1rem }
.note { border-left: 3px solid var(--s1); padding-left: 0.7rem }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: 0.6rem; margin: 0 }
.facts div { background: var(--card); border-radius: 8px; padding: 0.55rem 0.8rem }
.facts dt { color: var(--soft); font-size: 0.84rem }
.facts dd { margin: 0; font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums }
.origin { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: 0.25rem 1.2rem; margin: 0 }
.origin dt { color: var(--soft) }
.origin dd { margin: 0; overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.4rem 2rem;
  align-items: start }
figure { margin: 0; min-width: 0 }
figure svg { display: block; width: 100%; height: auto; max-width: 46rem }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif !important }
figcaption { font-size: 0.92rem; margin-bottom: 0.3rem }
.scroll { overflow-x: auto }
.run { white-space: nowrap }
.settings { min-width: 18rem }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 0.26rem 0.9rem 0.26rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top }
th { color: var(--soft); font-weight: 500; white-space: nowrap }
.number { text-align: right; white-space: nowrap }
details { background: var(--card); border-radius: 8px; padding: 0.6rem 0.9rem; margin-top: 0.8rem }
summary { cursor: pointer; font-weight: 600 }
pre { margin: 0.6rem 0 0; overflow-x: auto; font: 0.86rem/1.45 ui-monospace, Menlo, Consolas, monospace }
@media (max-width: 40rem) { .origin { grid-template-columns: 1fr } .origin dd { margin-bottom: 0.5rem } }
code { font: 0.9em ui-monospace, Menlo, Consolas, monospace }
.key { width: 2rem; height: 0.8rem; margin-right: 0.5rem; vertical-align: middle }
</style>
</head>
<body>
{% block body %}{% endblock %}
</body>
</html>
"""

_CHARTS = """{% macro chart(caption, svg) -%}
<figure role="img" aria-label="{{ caption }}"><figcaption>{{ caption }}</figcaption>{{ svg }}</figure>
{%- endmacro %}
{% macro charts(figures) -%}
<div class="charts">{% for caption, svg in figures %}{{ chart(caption, svg) }}{% endfor %}</div>
{%- endmacro %}"""

_RUN = """{% extends "page" %}{% from "charts" import chart, charts %}{% block body %}
<h1>{{ run.name }}</h1>
<div class="soft">{{ subtitle }}</div>
<p class="verdict">{{ verdict }}</p>
{% for note in run.notes %}<p class="note">{{ note }}</p>
{% endfor %}
<dl class="facts">
{% for name, value in facts %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
<h2>Made with</h2>
<dl class="origin">
{% for name, value in origin %}
<dt>{{ name }}</dt><dd>{% if name == "Command" %}<code>{{ value }}</code>{% else %}{{ value }}{% endif %}</dd>
{% endfor %}
</dl>
<h2>Curves</h2>
{% if curves %}{{ charts(curves) }}{% else %}<p class="soft">metrics.csv holds no epoch yet.</p>{% endif %}
<h2>Stochastic depth</h2>
<p class="soft">Settings: {{ settings }}.</p>
{% if rates %}
<div class="charts">
{{ chart(*rates) }}
{% if planned %}{{ chart(*planned) }}{% endif %}
<div><p>{{ depth_verdict }}</p>
<details><summary>Table of {{ run.blocks | length }} blocks</summary><div class="scroll"><table>
<thead><tr><th class="number">Block</th><th>Name</th><th>Mode</th><th class="number">Nominal</th>
<th class="number">Realised</th><th class="number">Computed</th></tr></thead>
<tbody>
{% for block in run.blocks %}
<tr><td class="number">{{ block.block }}</td><td>{{ block.name }}</td><td>{{ block.mode }}</td>
<td class="number">{{ block.nominal | rate }}</td><td class="number">{{ block.realised | rate }}</td>
<td class="number">{{ (1 - block.skipped) | share }}</td></tr>
{% endfor %}
</tbody></table></div></details></div>
</div>
{% else %}<p class="soft">drop_path.csv holds no block yet.</p>{% endif %}
<h2>Configuration</h2>
<details><summary>config.yaml, resolved</summary><pre>{{ run.config_text }}</pre></details>
{% endblock %}"""

_COMPARE = """{% extends "page" %}{% from "charts" import charts %}{% block body %}
<h1>{{ title }}</h1>
{% for run in runs %}{% for note in run.notes %}<p class="note">{{ run.name }}: {{ note }}</p>
{% endfor %}{% endfor %}
<div class="scroll"><table>
<thead><tr><th>Run</th><th class="number">Best top-1</th><th class="number">Final top-1</th>
<th class="number">Epochs</th>
<th class="number">Time</th><th class="number">Images/s</th><th>Drop path</th></tr></thead>
<tbody>
{% for run in runs %}
<tr><td class="run"><svg class="key" viewBox="0 0 32 12" aria-hidden="true"><line x1="0" y1="6" x2="32" y2="6" \
stroke="var(--s{{ loop.index0 % 8 }})" stroke-width="3" stroke-dasharray="{{ dashes[loop.index0 // 8 % 4] }}"/></svg>\
{{ labels[loop.index0] }}{% if not run.finished %} <span class="soft">(not finished)</span>{% endif %}</td>
<td class="number">{{ run.best_top1 | percent }}</td><td class="number">{{ run.final_top1 | percent }}</td>
<td class="number">{{ run.epochs }}</td><td class="number">{{ run.seconds | duration }}</td>
<td class="number">{{ run.images_per_second | count }}</td><td class="settings">{{ run | settings }}</td></tr>
{% endfor %}
</tbody></table></div>
<h2>Curves</h2>
{{ charts(curves) }}
{% endblock %}"""

_TEMPLATES = jinja2.Environment(
    loader=jinja2.DictLoader({"page": _PAGE, "charts": _CHARTS, "run": _RUN, "compare": _COMPARE}),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
)
_TEMPLATES.filters |= {
    "rate": format_rate,
    "share": format_share,
    "percent": format_percent,
    "duration": format_duration,
    "count": format_count,
    "settings": drop_path_settings,
}


def write_report(run: Path) -> Path:
    """Writes run/report.html from the files of the run folder and returns its path.

    Files that are missing or were cut off cost their part of the page and a note, never the page.

    Raises:
        ConfigError: `run` is not a run folder, or cannot be written to.
    """
    data = read_run(run)
    model, dataset = data.setting("model", "name"), data.setting("data", "dataset")
    html = _TEMPLATES.get_template("run").render(
        title=f"{data.name}: {format_percent(data.final_top1)} top-1",
        run=data,
        subtitle=f"{in_words(model)} on {in_words(dataset)}",
        verdict=run_verdict(data),
        facts=run_facts(data),
        origin=run_origin(data),
        curves=run_charts(data) if data.epochs else [],
        settings=drop_path_settings(data),
        depth_verdict=drop_path_verdict(data.blocks),
        rates=rates_chart(data.blocks) if data.blocks else (),
        planned=schedule_chart(data),
    )
    return save_page(RunFolder(run).report, html)


def write_comparison(runs: Sequence[Path], output: Path) -> Path:
    """Writes one page that overlays the validation curves of several runs and returns its path.

    Raises:
        ConfigError: One of `runs` is not a run folder, or `output` cannot be written.
    """
    data = [read_run(run) for run in runs]
    names = [run.name for run in data]
    html = _TEMPLATES.get_template("compare").render(
        title=f"{len(data)} runs compared" if len(data) != 1 else names[0],
        runs=data,
        # folders of one name are told apart by their paths
        labels=[str(run.path) if names.count(run.name) > 1 else run.name for run in data],
        dashes=("none", "7 3", "2 3", "8 3 2 3"),
        curves=compare_charts(data),
    )
    return save_page(output, html)


def save_page(path: Path, text: str) -> Path:
    """Writes a page so that a reader never meets half of it, and returns its path.

    Raises:
        ConfigError: It cannot be written.
    """
    try:
        save_text(path, text)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    return path
