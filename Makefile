# Every target sets up what it needs: `make run` and `make test` work on a fresh machine with Python >= 3.11 and PyPI.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n 2

.PHONY: run desk venv test check bench clean

run: venv  ## train configs/quickstart.py on the embedded corpus: a few minutes on two CPU cores
	$(BIN)/python -m moe_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

desk: venv  ## train configs/desk.py: up to 45 minutes on two CPU cores
	$(BIN)/python -m moe_jax.train --config=configs/desk.py --workdir=runs/desk

test: venv  ## all tests, on CPU
	$(PYTEST)

check: venv  ## lint
	$(BIN)/ruff check .

bench: venv  ## each dispatcher's time and FLOPs beside a dense FFN of the same activated FLOPs
	$(BIN)/python -m experiments.bench.run

venv: .venv/installed  ## .venv with the package and its test extra, and nothing else

.venv/installed: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "PYTHON=$(PYTHON) is older than 3.11: call make with PYTHON=/path/to/python3.11 or newer" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

clean:  ## everything that the other targets made, except runs/
	rm -rf .venv *.egg-info .pytest_cache .ruff_cache
