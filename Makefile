# make test    lint and tests             make demo    profile, atlas and benchmark of the bundled model
# make lint    format, types, imports     make bench   the full benchmark          make clean   remove what was built
#
# The first target run creates .venv (an existing one is used as it is) and installs restpoint into it.
# Variables: PYTHON (interpreter for a new .venv), PYTEST_ARGS, BENCH_ARGS, TORCH_CONSTRAINT (pip's option that pins
# torch; empty where nvidia-smi finds a GPU, so that the build of torch already there or the newest one is used).

PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
TORCH_CONSTRAINT ?= $(if $(filter 0,$(HAS_GPU)),-c constraints.txt,)

BIN := .venv/bin
STAMP := .venv/.restpoint-installed
DEMO := build/demo

.DELETE_ON_ERROR:
.PHONY: demo test lint pytest bench install clean

test: lint pytest

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

pytest: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

demo: $(STAMP)
	@mkdir -p $(DEMO)
	$(BIN)/restpoint fit --output $(DEMO)/profile --max-tokens 60000
	$(BIN)/restpoint analyze --max-tokens 10000 --output $(DEMO)/atlas
	$(BIN)/restpoint bench --quick --profile $(DEMO)/profile --plot $(DEMO)/bench.png --json $(DEMO)/bench.json

bench: $(STAMP)
	@mkdir -p build/bench
	$(BIN)/restpoint bench --plot build/bench/bench.png --json build/bench/bench.json $(BENCH_ARGS)

install: $(STAMP)

# torch first and by itself, so that nothing else decides which build of it is fetched.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH_CONSTRAINT) "torch>=2.6"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH_CONSTRAINT) -e ".[dev]"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "restpoint needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing)." \
	       "Name another interpreter: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache $(STAMP)
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
