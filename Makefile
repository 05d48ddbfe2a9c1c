# Two commands: `make demo` and `make test`. Both make the environment first and may be run again at any time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := -m kvarto -p kvarto.protos -p kvarto.kernels -p kvarto.worker -p kvarto.cluster

.PHONY: demo test test-fast lint format env clean

demo: env
	$(BIN)/kvarto demo

test: lint
	$(BIN)/pytest

test-fast: env
	$(BIN)/pytest -m "not slow"

lint: env
	$(BIN)/ruff check .
	mkdir -p $(VENV)/typing && ln -sfn ../.. $(VENV)/typing/kvarto
	cd $(VENV)/typing && MYPYPATH=. ../bin/mypy --config-file ../../pyproject.toml $(PACKAGES)

format: env
	$(BIN)/ruff check --fix .

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py $(wildcard kernels/native/*.cpp kernels/native/*.h kernels/native/*.inc)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvarto needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "== torch (a CPU build where the index has one)"
	$(BIN)/pip install --progress-bar on torch==2.13.0
	@echo "== kvarto, its native kernels and the development tools"
	$(BIN)/pip install --progress-bar on -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/native/*.so
