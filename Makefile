# What CI and a person both call. Each target installs what it needs into $(VENV) first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The torch build tested here. On Linux PyPI's own build brings CUDA along: set TORCH to the build you want.
TORCH ?= torch==2.13.0
JOBS ?= 3
export HF_HUB_OFFLINE ?= 1

.PHONY: help demo test test-oldest lint bench clean

help:
	@echo "make demo         compress a real model on real data; ends with a verified bundle in runs/demo"
	@echo "make test         run the tests"
	@echo "make test-oldest  run them with the oldest versions of everything that is needed"
	@echo "make lint         check style, types and the direction of imports"
	@echo "make bench        reproduce the numbers of the README (long)"
	@echo "make clean        remove the virtual environments and caches"

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[demo,bench]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/distill demo

# All tests of a file in one process: what they share is made once.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

$(VENV)-oldest/.dev: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint tests/oldest.txt "$(TORCH)" --editable ".[dev]"
	@touch $@

test-oldest: $(VENV)-oldest/.dev
	$(VENV)-oldest/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	TORCH="$(TORCH)" $(BIN)/python benchmarks/run_all.py

clean:
	rm -rf $(VENV) $(VENV)-oldest .mypy_cache .ruff_cache .pytest_cache .hypothesis
