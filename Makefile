# Bare `make` lists what there is. Every target works from a fresh clone: the environment is made when it is missing.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LINE ?=
OPTIONS ?=
WORKERS ?= 2

# Without a GPU the CUDA build of torch would be several GB for nothing: ask the CPU index for the same version, unless
# the environment already names its own source of wheels.
ifeq ($(shell command -v nvidia-smi)$(PIP_FIND_LINKS)$(PIP_INDEX_URL)$(PIP_EXTRA_INDEX_URL),)
TORCH_SOURCE := --extra-index-url https://download.pytorch.org/whl/cpu
endif

.PHONY: help install demo test check format clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

install: $(STAMP) ## make .venv with everything, at the pinned versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Flawline needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH_SOURCE) -c constraints.txt -e '.[service,client,openvino,training,demo,dev]'
	@touch $@

demo: $(STAMP) ## the main job on real frames: fit, evaluate, export, serve, inspect (LINE=folder for your own, OPTIONS=… more)
	$(BIN)/flawline demo $(if $(LINE),--line "$(LINE)") $(OPTIONS)

# Compiled sources are kept here even where the environment says not to: the tests start a hundred processes.
test: $(STAMP) ## every test
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: $(STAMP) ## format, lint, strict types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/architecture

format: $(STAMP) ## format the sources and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what the demo and the tools wrote, and the environment; your bundles and runs stay
	rm -rf $(VENV) demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
