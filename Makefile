# make quickstart   the complete pipeline on a trained demo CLIP, a few minutes, no network
# make test         the tests that every change has to pass
# make test-all     every test, the slow ones too
# make check        formatting, lint, types, import rules

PYTHON ?= python3
BIN := .venv/bin
# Tests run in this many processes with one thread each; a file's tests stay in one process.
TEST_PROCESSES ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile
INSTALLED := .venv/.installed

.PHONY: quickstart test test-all check

quickstart: $(INSTALLED)
	$(BIN)/dgmr-tp run quickstart

test: $(INSTALLED) check
	$(PYTEST) -m "not slow"

test-all: test
	$(PYTEST) -m slow

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dgmr-tp needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[all,dev]'
	touch $@
