# Two commands matter: `make demo` and `make test`. Both install what they need into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types imports proto tests benchmarks docs clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.demo ## Stream answers from the real server at several sharing depths
	@$(BIN)/kvfold demo

test: lint types imports proto tests ## Lint, types, import rules, proto lint, tests

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

proto: $(VENV)/.dev
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code

tests: $(VENV)/.dev
	$(BIN)/pytest

format: $(VENV)/.dev ## Format the code and sort the imports
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/buf format --write

docs: $(VENV)/.dev ## Write docs/api.md from the proto files
	$(BIN)/python docs/api_generator.py

benchmarks: $(VENV)/.benchmarks ## Measure beside other engines, on a quiet machine (an hour); TRACE=FILE.csv adds a replay
	for name in vllm vllm-limited generate continuous; do $(BIN)/python benchmarks/compare.py $$name || exit; done
	$(if $(TRACE),$(BIN)/python benchmarks/compare.py trace --trace $(TRACE))
	$(BIN)/python benchmarks/floor.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/attention_kernel.py --json benchmarks/results/attention_kernel.json

clean: ## Remove what the other targets made
	rm -rf $(VENV) generated build dist

# torch comes first and pinned: without the pin, pip takes the newest build for other hardware, several gigabytes of it.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "kvfold needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "The venv module is missing; on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@touch $@

INPUTS := pyproject.toml constraints.txt hatch_build.py $(shell find proto server/kvfold_server/kv/native -name '*.proto' -o -name '*.cpp' -o -name '*.h' -o -name build.py)

$(VENV)/.demo: $(VENV)/.python $(INPUTS)
	$(PIP) install --constraint constraints.txt --editable '.[server]'
	@touch $@

$(VENV)/.dev: $(VENV)/.python $(INPUTS)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.benchmarks: $(VENV)/.python $(INPUTS)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[benchmarks]'
	@touch $@ $(VENV)/.demo
