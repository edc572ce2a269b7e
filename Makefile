PYTHON ?= python3
PY := .venv/bin/python
RUNS := runs/demo

.PHONY: setup demo test lint bench

setup: .venv/ready

# Rebuilt only when requirements.txt changes; `ready` is written last, so an interrupted install starts again.
.venv/ready: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

test: setup
	$(PY) -m pytest

lint: setup
	.venv/bin/ruff check . && .venv/bin/ruff format --check .
