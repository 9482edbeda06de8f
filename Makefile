# One virtual environment, .venv, serves every target; it is built on first use and again when a lock changes.
#
#   make demo [DATA=<folder>] [COLUMNS=<file>] [RUN=<folder>] [PRESET=<name>] [TASK=retrieval|ranking] [SEED=<n>]
#   make test | lint | bench
#
# Variables:
#   PYTHON       the Python that makes .venv: 3.11 or newer
#   LOCK         cpu (default) or cuda: which lock of requirements/ is installed
#   TORCH_INDEX  one more package index to find torch in. `TORCH_INDEX=https://download.pytorch.org/whl/cpu` brings the CPU
#                build (200 MB); without it pip takes what its own index has, on PyPI the CUDA build (some 3 GB): both work.
PYTHON ?= python3
LOCK ?= cpu
TORCH_INDEX ?=

DATA ?=
COLUMNS ?=
RUN ?=
PRESET ?=
TASK ?= retrieval
SEED ?= 0

VENV := .venv
BIN := $(VENV)/bin
LOCK_FILE := requirements/$(LOCK).txt
# Stamps carry a hash: of the lock for the packages, of pyproject.toml for this package.
digest = $(shell cat $(1) | cksum | tr ' ' '-')
LOCK_STAMP := $(VENV)/packages-$(LOCK)-$(call digest,$(LOCK_FILE))
PACKAGE_STAMP := $(VENV)/mufasa_rec-$(call digest,pyproject.toml)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench .venv

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed '/^Stamps/,$$d'

.venv: $(PACKAGE_STAMP)

$(LOCK_STAMP): | $(LOCK_FILE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PYTHON=$(PYTHON) is %d.%d, the locks need 3.11 or newer. Remedy: make PYTHON=python3.11" % sys.version_info[:2])'
	@echo "Installing $(LOCK_FILE) into $(VENV)"
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --constraint $(LOCK_FILE) torch==2.13.0 setuptools
	$(PIP) install --quiet --no-deps --requirement $(LOCK_FILE)
	@touch $@

$(PACKAGE_STAMP): $(LOCK_STAMP) | pyproject.toml
	$(PIP) install --quiet --no-deps --no-build-isolation --no-index --editable .
	@rm -f $(VENV)/mufasa_rec-* && touch $@

demo: .venv
	@$(BIN)/python -m torchx_apps.demo --data "$(DATA)" --columns "$(COLUMNS)" --run "$(RUN)" --preset "$(PRESET)" --task "$(TASK)" --seed "$(SEED)"

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -q --numprocesses 2 --dist worksteal

bench: .venv
	$(BIN)/python -m torchx_apps.benchmark all
