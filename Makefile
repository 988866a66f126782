.DEFAULT_GOAL := help
PY := .venv/bin/python
.PHONY: help install lint test

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

.venv/.installed: pyproject.toml
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install -q -e '.[dev]'
	touch $@

install: .venv/.installed  ## make .venv and install

lint: .venv/.installed  ## ruff and pyright
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

test: .venv/.installed  ## the tests
	$(PY) -m pytest
