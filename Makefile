# Everything runs in .venv, which is made from pyproject.toml and constraints.txt when either has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: help env demo test lint fix bench docs clean

help:
	@echo "make demo   embed real images, search them, probe them"
	@echo "make test   run the tests"
	@echo "make lint   check style and types"
	@echo "make fix    mend style where that is safe"
	@echo "make docs   write docs/cli.md anew from --help"
	@echo "make bench  time embedkit on this machine"
	@echo "make clean  remove the environment and what the demo wrote"

env: $(READY)

# torch comes first and alone, so that no other package's wish for it picks a build of several gigabytes.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

fix: $(READY)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

docs: $(READY)
	$(BIN)/python docs/generate.py

bench: $(READY)
	$(BIN)/python benchmarks/extract_rate.py

clean:
	rm -rf $(VENV) demo-output
