"""The report of a run; imported only when one is written: it needs matplotlib and jinja2."""
