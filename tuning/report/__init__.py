"""The report of a study; imported only when one is written: it needs matplotlib and jinja2."""
