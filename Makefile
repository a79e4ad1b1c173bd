# Every command that a person runs. The first one makes .venv; later ones start at once.

PYTHON ?= python3
WORKERS ?= 2
LAB_ARGS ?=
PIP_ARGS ?=
NAMES ?=
LESSONS ?= 0 1 2 3 4 5 6 7 8
BENCH_ARGS ?=

BIN := .venv/bin
READY := .venv/.ready
PEERS := .peers/.ready
CODERS := .peers-coders/.ready
# The tests that hold numbers to a tolerance: other processors and threads round otherwise.
NUMERIC = $(shell grep -lwE 'allclose|assert_close|isclose|approx|near|agrees' tests/test_*.py tests/*/test_*.py)
FIRST := $(firstword $(sort $(wildcard notebooks/*.ipynb)))
# In a container the only user is often root, whom Jupyter turns away unless told.
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)

# An environment is made anew when its .ready is not the checksum of what it is made of.
READY_OF := requirements.txt pyproject.toml
PEERS_OF := benchmarks/requirements.txt
CODERS_OF := benchmarks/requirements-coders.txt
stale = $(shell [ "$$(cat $(2) | cksum)" = "$$(cat $(1) 2>/dev/null)" ] || echo $(1))

.PHONY: help lab test lint unit numeric notebook-tests model downstream notebooks bench exercises doctor
.PHONY: $(call stale,$(READY),$(READY_OF)) $(call stale,$(PEERS),$(PEERS_OF)) \
  $(call stale,$(CODERS),$(CODERS_OF))
.DEFAULT_GOAL := help

help:  ## show these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "This course needs Python 3.11 or newer, and '$(PYTHON)' is not: make lab PYTHON=python3.12"; exit 1; }
	@echo "Making .venv (once; torch is the large part, so this may take some minutes)."
	@$(PYTHON) -m venv .venv && rm -f $@
	@echo "1 of 3: torch"
	@$(PIP) "$$(grep -E '^torch==' requirements.txt)"
	@echo "2 of 3: JupyterLab, transformers and the rest"
	@$(PIP) --requirement requirements.txt
	@echo "3 of 3: the helpers of this course"
	@$(PIP) --editable . --no-deps --no-build-isolation
	@cat $(READY_OF) | cksum >$@

# Threads that wait sleep: where they spin, a lesson beside other work takes many times as long.
lab: export OMP_WAIT_POLICY ?= PASSIVE
lab: $(READY)  ## open the first lesson in JupyterLab (LAB_ARGS="--no-browser --port=8899")
	@$(BIN)/python -m jupyterlab --LabApp.app_settings_dir="$(CURDIR)/config/lab" \
	  --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/$(FIRST) $(AS_ROOT) $(LAB_ARGS)

test: lint unit notebook-tests exercises  ## lint, unit tests, every notebook, every exercise

lint: $(READY)  ## style, the import rule, the core's types
	@$(BIN)/python -m ruff check --quiet .
	@$(BIN)/python -m ruff format --check --quiet .
	@mkdir -p .cache
	@$(BIN)/lint-imports --no-logo --no-cache >.cache/imports.txt || { cat .cache/imports.txt; exit 1; }
	@$(BIN)/basedpyright --pythonpath $(BIN)/python --level error >.cache/types.txt || \
	  { cat .cache/types.txt; exit 1; }

unit: export OMP_NUM_THREADS = 1
unit: export HF_HUB_OFFLINE = 1
unit: $(READY)
	@$(BIN)/python -m pytest -q -n $(WORKERS) tests

numeric: export HF_HUB_OFFLINE = 1
numeric: $(READY)  ## only tests that compare numbers: set ATEN_CPU_CAPABILITY, OMP_NUM_THREADS
	@$(BIN)/python -m pytest -q -n $(WORKERS) $(NUMERIC)

notebook-tests: export OMP_NUM_THREADS = 1
notebook-tests: export HF_HUB_OFFLINE = 1
notebook-tests: export MI_PROGRESS = $(CURDIR)/.cache/progress.json
notebook-tests: $(READY) unit
	@mkdir -p .cache && rm -f .cache/progress.json
	@$(BIN)/python -m pytest -q --nbval-lax --nbval-current-env --nbval-cell-timeout 300 \
	  -n $(WORKERS) --dist loadscope --junitxml=.cache/notebooks.xml notebooks
	@$(BIN)/python tests/notebook_times.py .cache/notebooks.xml

exercises: $(READY)  ## prove every exercise: reference, stub, wrong answers
	@$(BIN)/python -m mi_helpers exercises

notebooks: $(READY)  ## run the notebooks again and save them clean (NAMES="00 03")
	@$(BIN)/python -m mi_helpers notebooks $(NAMES)

downstream: export OMP_NUM_THREADS = $(WORKERS)
downstream: $(READY)  ## make all that hangs on tiny-gemma again: coders, transcoders, ledger, notebooks
	@$(BIN)/python -m mi_helpers make-sae
	@$(BIN)/python -m mi_helpers make-transcoders
	@$(BIN)/python -m mi_helpers claims --measure $(LESSONS)
	@$(BIN)/python -m mi_helpers claims --page
	@$(BIN)/python -m mi_helpers notebooks
	@$(BIN)/python -m mi_helpers manifest --write

model: $(READY)  ## train tiny-gemma again
	@$(BIN)/python -m mi_helpers train-model

$(PEERS):
	@echo "Making .peers (once): TransformerLens and nnsight, to compare with."
	@$(PYTHON) -m venv .peers && rm -f $@
	@.peers/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
	  "$$(grep -E '^torch==' $(PEERS_OF))"
	@.peers/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --requirement $(PEERS_OF)
	@cat $(PEERS_OF) | cksum >$@

$(CODERS):
	@echo "Making .peers-coders (once): SAELens, dictionary_learning and sparsify, to compare with."
	@$(PYTHON) -m venv .peers-coders && rm -f $@
	@.peers-coders/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
	  "$$(grep -E '^torch==' $(CODERS_OF))"
	@.peers-coders/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
	  --no-deps --requirement $(CODERS_OF)
	@cat $(CODERS_OF) | cksum >$@

bench: $(READY) $(PEERS) $(CODERS)  ## time sliders, patching and coders against other libraries (BENCH_ARGS=--gemma)
	@$(BIN)/python -m benchmarks.run
	@.peers/bin/python -m benchmarks.patching $(BENCH_ARGS)
	@.peers-coders/bin/python -m benchmarks.coders

doctor: $(READY)  ## say what works on this machine
	@$(BIN)/python -m mi_helpers doctor
