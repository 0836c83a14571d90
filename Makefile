PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test test-slow test-gpu check

demo: .venv/installed
	.venv/bin/pixeldecoder demo

test: .venv/installed-test check
	.venv/bin/pytest

test-slow: .venv/installed-test
	.venv/bin/pytest -m slow

test-gpu: .venv/installed-test
	.venv/bin/pytest -m gpu

check: .venv/installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(PIP) --editable '.[test]'
	touch $@
