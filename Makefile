# Needs only make and Python 3.11 to 3.13. `make help` lists what there is.
PYTHON ?= python3
SYSTEM ?= systems/mw_cubic_64.yaml
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Every pip that comes with Python 3.11 or later can do this; -qq leaves only errors.
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install install-test estimate test slow lint types docs format build wheel-check wheel-test bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile
	@echo "  variables: PYTHON=$(PYTHON)  SYSTEM=$(SYSTEM)  ARGS=..."

install: $(VENV)/.installed  ## make .venv with freeflow in it

install-test: $(VENV)/.installed-test  ## the same, with what the tests and checks need

estimate: $(VENV)/.installed  ## free energy of SYSTEM; ARGS are passed on
	$(BIN)/freeflow estimate $(SYSTEM) $(ARGS)

test: $(VENV)/.installed-test  ## run the tests; ARGS are passed to pytest
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

slow: $(VENV)/.installed-test  ## run the slow tests
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.installed-test  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test  ## check types
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.installed  ## build the documentation into site/
	@$(PIP_INSTALL) -e '.[docs]'
	$(BIN)/mkdocs build --strict --quiet

format: $(VENV)/.installed-test  ## mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(VENV)/.installed  ## build the sdist and the wheel into dist/
	@$(PIP_INSTALL) build
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

wheel-check: build  ## run what the wheel holds, with the packages of .venv
	place=$$(mktemp -d) && $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $$place dist/freeflow-*.whl && \
	(cd $$place && export PYTHONPATH=$$place && python=$(CURDIR)/$(BIN)/python && $$python -m freeflow --version && \
	 $$python -m freeflow estimate mw_cubic_8 --checkpoint shipped --target-error 0.01 --quiet && \
	 $$python -c "import freeflow, pathlib; home = pathlib.Path(freeflow.__file__).parent; \
	 assert home.parent == pathlib.Path('$$place') and (home / 'py.typed').is_file()") && \
	rm -rf $$place

wheel-test: build  ## install the wheel and the sdist into empty environments and run them
	for package in dist/freeflow-*.whl dist/freeflow-*.tar.gz; do \
	  place=$$(mktemp -d) && $(PYTHON) -m venv $$place && \
	  $$place/bin/python -m pip install -qq --disable-pip-version-check --no-input $$package && \
	  (cd $$place && bin/freeflow --version && bin/freeflow validate mw_cubic_8 >/dev/null && \
	   bin/freeflow estimate mw_cubic_8 --checkpoint shipped --target-error 0.01 --quiet --no-cache && \
	   bin/python -c "import freeflow, pathlib; assert (pathlib.Path(freeflow.__file__).parent / 'py.typed').is_file()") && \
	  rm -rf $$place || exit 1; \
	done

bench: $(VENV)/.installed-bench  ## run the benchmark suite; ARGS are passed on (--quick, kernels, ...)
	$(BIN)/python -m benchmarks --table bench.md --json bench.json $(ARGS)

clean:  ## remove .venv, builds and caches
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; ok = (3, 11) <= v[:2] <= (3, 13); \
	sys.exit(0 if ok else "freeflow needs Python 3.11 to 3.13; $(PYTHON) is %d.%d. Try: make PYTHON=python3.12 ..." % v[:2])'
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing freeflow into $(VENV) (some minutes the first time)"
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/.installed
	@echo "Installing the test tools into $(VENV)"
	@$(PIP_INSTALL) -e '.[test]'
	@touch $@

$(VENV)/.installed-bench: pyproject.toml | $(VENV)/.installed-test
	@echo "Installing what freeflow is measured against into $(VENV)"
	@$(PIP_INSTALL) -e '.[bench]'
	@touch $@
