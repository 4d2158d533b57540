# Every target sets up what it needs: `make run` and `make test` work on a fresh machine with Python >= 3.11 and PyPI.
PYTHON ?= python3
BIN := .venv/bin
LIBTPU := .venv/libtpu
# The tests of a file stay in one process, which keeps what they trace and compile.
TESTS := -m pytest -n 2 --dist loadfile --no-loadscope-reorder
PYTEST := PYTHONPATH=$(LIBTPU) $(BIN)/python $(TESTS)

# EXTRA=cuda or EXTRA=tpu installs JAX for these devices, too, as in `make run EXTRA=cuda`.
EXTRA ?=

.DEFAULT_GOAL := help
.PHONY: help run desk venv test test-all test-reference coverage mutation demo-multiprocess paper-scale check bench bench-train bench-generate docs docs-check fuzz soak faults memory clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##/\1:/p' $(MAKEFILE_LIST) | awk -F ': *' '{ name = $$1; sub(/^[^:]*: */, ""); printf "%-18s %s\n", name, $$0 }'

run: venv  ## train configs/quickstart.py on the embedded corpus: a few minutes on two CPU cores
	$(BIN)/python -m moe_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

desk: venv  ## train configs/desk.py: up to 45 minutes on two CPU cores
	$(BIN)/python -m moe_jax.train --config=configs/desk.py --workdir=runs/desk

test: venv $(LIBTPU)/asked  ## all tests, on CPU
	$(PYTEST)

test-all: venv $(LIBTPU)/asked  ## those, and a step of every variant of every paper's config, shrunk
	$(PYTEST) -m ''

test-reference: .venv-reference/installed  ## routers against published implementations: downloads torch (gigabytes)
	.venv-reference/bin/python -m pytest -m reference

# One process: of two, the data of one were lost.
coverage: venv $(LIBTPU)/asked  ## which lines of moe_jax/ the tests execute
	$(BIN)/python -m coverage erase
	PYTHONPATH=$(LIBTPU) $(BIN)/python -m coverage run -m pytest
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --sort=cover

mutation: venv  ## 200 small changes of routing, dispatch, step and checkpoints, which tests must notice
	$(BIN)/python -m experiments mutation run --write

demo-multiprocess: venv  ## the quickstart's first steps on 1, 2 and 4 processes of this machine, a checkpoint that changes hands, a process that is killed
	$(BIN)/python -m experiments multiprocess run

paper-scale: .venv-dryrun/installed  ## docs/paper_scale.md: the papers' models compiled for machines of the papers' size
	.venv-dryrun/bin/python -m experiments paper_scale run

check: venv  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: venv  ## each dispatcher beside a dense FFN of the same activated FLOPs, and what each router costs
	$(BIN)/python -m experiments bench dispatchers
	$(BIN)/python -m experiments bench routing

bench-train: .venv-reference/installed  ## a training step beside transformers, with the same weights: downloads torch (gigabytes)
	.venv-reference/bin/python -m experiments bench train

bench-generate: .venv-reference/installed  ## greedy decoding beside transformers, with the same weights: downloads torch (gigabytes)
	.venv-reference/bin/python -m experiments bench generation

docs: .venv-docs/installed  ## the site of docs/, the studies and the Python API in site/, every link checked
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict

docs-check: venv  ## the commands of README and tutorials, executed with two steps each: about half an hour on two CPU cores
	$(BIN)/python tests/docs_commands.py

venv: .venv/installed$(EXTRA:%=-%)  ## .venv with the package and its test extra, and nothing else

.venv/installed: setup.py
	$(call install,.venv,test)

.venv/installed-%: .venv/installed
	$(call install,.venv,$*)

# The TPU's compiler, of the version that jax asks for, where only tests look: elsewhere JAX would search for TPUs with it.
$(LIBTPU)/asked: .venv/installed
	@echo "installing the compiler for TPUs into $(LIBTPU), for tests; this takes some minutes"
	@mkdir -p $(LIBTPU)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(LIBTPU) "$$($(BIN)/python -c \
	  'from importlib.metadata import requires as r; print(next(x.split(";")[0] for x in r("jax") if x.startswith("libtpu")))')" \
	  || echo "no TPU compiler for this machine: its tests are skipped" >&2
	@touch $@

# The TPU's compiler comes with the extra, the GPU's without the libraries that a GPU would need.
.venv-dryrun/installed: setup.py
	$(call install,.venv-dryrun,dryrun)
	@V=$$(.venv-dryrun/bin/python -c 'import jax; print(jax.__version__)'); \
	  .venv-dryrun/bin/python -m pip install --quiet --disable-pip-version-check --no-deps jax-cuda12-plugin==$$V \
	  jax-cuda12-pjrt==$$V nvidia-cuda-nvcc-cu12 || echo "no GPU compiler for jax $$V: rows of GPUs are left out" >&2
	@touch $@

.venv-docs/installed: setup.py
	$(call install,.venv-docs,docs)

.venv-reference/installed: setup.py
	$(call install,.venv-reference,$(REFERENCE))

# $(call install,folder,extras): an environment there with the package and those extras. `call` splits at commas, which is
# why two extras are a variable.
REFERENCE := test,reference
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "PYTHON=$(PYTHON) is older than 3.11: call make with PYTHON=/path/to/python3.11 or newer" >&2; exit 2; }
	@echo "installing moe_jax[$(2)] and what it needs into $(1), from PyPI; this takes some minutes"
	@$(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[$(2)]'
	@touch $@
endef

fuzz: venv  ## 2,000 mutated configs and command lines and 500 mutated files of a run: about 20 minutes on two CPU cores
	$(BIN)/python -m experiments reliability fuzz --write

soak: venv  ## 100 small runs, each killed up to five times: about half an hour on two CPU cores
	$(BIN)/python -m experiments reliability soak --write

faults: venv  ## faults of disks, files, numbers and commands injected into a small run: a few minutes
	$(BIN)/python -m experiments reliability faults --write

memory: venv  ## 20,000 steps of a small run, whose memory must not grow: some minutes
	$(BIN)/python -m experiments reliability memory --write

clean:  ## everything that the other targets made, except runs/
	rm -rf .venv .venv-docs .venv-dryrun .venv-reference site *.egg-info .pytest_cache .ruff_cache
