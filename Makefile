# Everything starts here; each target is a line or two. `make demo` and `make test` install what they need.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.DEFAULT_GOAL := help
.PHONY: help install demo quick unit-model unit-rest test lint bench test-gpu test-layouts test-faults test-slurm

help:
	@echo "make demo | quick | test | lint | install | test-gpu | test-layouts | test-faults | test-slurm | bench"

install: $(INSTALLED)

# The stamp is newer than what it was made from: installed already means nothing to do.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -P examples/demo.py

# While you work: the linters, and the tests that start no process, on two cores. Under a minute.
quick:
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --output-sync --jobs=2 lint unit-model unit-rest

unit-model: $(INSTALLED)
	$(BIN)/python -P -m pytest -q tests/unit/test_model_*.py

unit-rest: $(INSTALLED)
	$(BIN)/python -P -m pytest -q tests/unit --ignore-glob='*/test_model_*'

test: lint
	$(BIN)/python -P -m pytest -q

lint: $(INSTALLED)
	$(BIN)/ruff check -q . && $(BIN)/ruff format --check -q .
	$(BIN)/mypy

test-gpu: $(INSTALLED)
	$(BIN)/python -P -m pytest -q -m gpu

test-layouts: $(INSTALLED)
	$(BIN)/python -P -m pytest -q -m slow tests/distributed

test-faults: $(INSTALLED)
	$(BIN)/python -P -m pytest -q -m faults tests

test-slurm: $(INSTALLED)
	tests/slurm/test.sh $(BIN)/python

bench: $(INSTALLED)
	for script in benchmarks/*.py; do $(BIN)/python -P "$$script"; done
