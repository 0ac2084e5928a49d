# Two commands: `make demo` and `make test`. Each makes its own environment first.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VERSIONS ?= tests/versions.txt
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-versions matrix zoo models benchmark lint clean

demo: $(VENV)/ready
	$(BIN)/python -m examples.demo.train

test: $(VENV)/ready
	$(BIN)/python -m pytest

# The same with the oldest and the newest releases that are declared, each in an environment of its own.
test-versions:
	$(MAKE) test VENV=.venv-oldest TORCH=torch==2.11.0 VERSIONS=tests/versions-oldest.txt
	$(MAKE) test VENV=.venv-newest TORCH=torch==2.14.1 VERSIONS=tests/versions-newest.txt

# Trainers, several processes, kinds of batches, every example, random cases of what always holds, and the cases of which
# `make test` takes a few: half an hour on two cores.
matrix: $(VENV)/ready
	$(BIN)/python -m pytest tests -m matrix --dist loadfile

# Every model type of transformers, slow: twenty minutes on two cores.
zoo: $(VENV)/ready
	$(BIN)/python -m pytest tests/zoo -m 'zoo or not zoo'

# The table of results, docs/models.md.
models: $(VENV)/ready
	$(BIN)/python -m tests.zoo.table

# Steps, compilation and teacher on this machine, one to three hours on two cores: runs/benchmarks/tables.md and pictures.
benchmark: $(VENV)/ready
	$(BIN)/python -m benchmarks

lint: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# torch goes in first and is then held where it is, so that no dependency replaces it by another build.
$(VENV)/ready: pyproject.toml $(VERSIONS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip freeze | grep '^torch==' > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --constraint $(VERSIONS) --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest runs
