# Everything a fresh machine needs: Python 3.11 or newer, and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
# Tests run file by file in two processes, of one thread each; PARALLEL= runs them one after the other.
PARALLEL ?= -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install train test test-all check pictures clean

help:  ## show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed  ## create .venv and install what constraints.txt pins

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 install")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

train: install  ## train on the embedded digits; ARGS="optim.epochs=3 drop_path.rate=0.2" is passed on
	$(BIN)/python train.py $(ARGS)

test: install  ## run the tests (a few minutes)
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-all: install  ## run the slow and exhaustive tests
	$(BIN)/python -m pytest $(PARALLEL) -m slow $(ARGS)

check: install  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

pictures: install  ## draw the pictures of README and docs again
	$(BIN)/python pictures.py

clean:  ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
