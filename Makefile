# Every command that a person runs. The first one makes .venv; later ones start at once.

PYTHON ?= python3
WORKERS ?= 2
LAB_ARGS ?=
PIP_ARGS ?=
NAMES ?=
LESSONS ?= $(sort $(foreach path,$(wildcard notebooks/??_*.ipynb),$(firstword $(subst _, ,$(notdir $(path))))))
BENCH_ARGS ?=
# Where the learner's own copies of the lessons are.
WORK ?= work
# Which build of torch: cpu, pip (as plain pip has it), or another that uv knows, such as cu126.
TORCH ?= $(if $(filter Linux,$(shell uname -s)),$(if $(shell nvidia-smi -L 2>/dev/null),pip,cpu),pip)

BIN := .venv/bin
READY := .venv/.ready
PEERS := .peers/.ready
CODERS := .peers-coders/.ready
# The tests that hold numbers to a tolerance: other processors and threads round otherwise.
NUMERIC = $(shell grep -lwE 'allclose|assert_close|isclose|approx|near|agrees' tests/test_*.py tests/*/test_*.py)
FIRST := $(firstword $(sort $(wildcard notebooks/*.ipynb)))
# In a container the only user is often root, whom Jupyter turns away unless told.
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)
QUIET := --quiet --disable-pip-version-check $(PIP_ARGS)
PIP := $(BIN)/python -m pip install $(QUIET)
MINE := $(patsubst ~/%,$(HOME)/%,$(WORK))

# An environment is made anew when its .ready is not the checksum of what it is made of.
READY_OF := requirements.txt pyproject.toml
PEERS_OF := benchmarks/requirements.txt
CODERS_OF := benchmarks/requirements-coders.txt
stale = $(shell [ "$$(cat $(2) | cksum)" = "$$(cat $(1) 2>/dev/null)" ] || echo $(1))

.PHONY: help lab fresh test lint unit numeric notebook-tests model downstream notebooks bench
.PHONY: exercises doctor
.PHONY: $(call stale,$(READY),$(READY_OF)) $(call stale,$(PEERS),$(PEERS_OF)) \
  $(call stale,$(CODERS),$(CODERS_OF))
.DEFAULT_GOAL := help

help:  ## show these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "This course needs Python 3.11 or newer, and '$(PYTHON)' is not: make lab PYTHON=python3.12"; exit 1; }
	@echo "Making .venv, once: this takes some minutes, and downloads what is not there yet."
	@$(PYTHON) -m venv .venv && rm -f $@
	@echo "1 of 3: torch"
	@sh config/torch.sh $(BIN)/python requirements.txt $(TORCH) $(QUIET)
	@echo "2 of 3: JupyterLab, transformers and the rest (0.2 GB)"
	@$(PIP) --requirement requirements.txt
	@echo "3 of 3: the helpers of this course"
	@$(PIP) --editable . --no-deps --no-build-isolation
	@cat $(READY_OF) | cksum >$@

# Threads that wait sleep: where they spin, a lesson beside other work takes many times as long.
lab: export OMP_WAIT_POLICY ?= PASSIVE
# The lessons do not run in this folder: a model's folder is named from here.
ifneq ($(wildcard $(MI_MODEL)/config.json),)
lab: export MI_MODEL := $(abspath $(MI_MODEL))
endif
lab: $(READY)  ## open your copy of the first lesson (LAB_ARGS="--no-browser --port=8899")
	@$(BIN)/python -m mi_helpers lessons --folder "$(MINE)"
	@$(BIN)/python -m jupyterlab --LabApp.app_settings_dir="$(CURDIR)/config/lab" \
	  --ServerApp.root_dir="$(MINE)" --LabApp.default_url=/lab/tree/$(notdir $(FIRST)) $(AS_ROOT) $(LAB_ARGS)

fresh: $(READY)  ## a clean copy of a lesson, yours kept beside it (NAMES=03)
	@$(BIN)/python -m mi_helpers lessons --folder "$(MINE)" --fresh $(NAMES)

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
notebook-tests: export MI_STATIC = 1
notebook-tests: export MI_PROGRESS = $(CURDIR)/.cache/progress.json
notebook-tests: $(READY) unit
	@mkdir -p .cache && rm -f .cache/progress.json
	@$(BIN)/python -m pytest -q --nbval-lax --nbval-current-env --nbval-cell-timeout 300 \
	  -n $(WORKERS) --dist loadscope --junitxml=.cache/notebooks.xml notebooks
	@$(BIN)/python tests/notebook_times.py .cache/notebooks.xml

exercises: export OMP_NUM_THREADS = 1
exercises: $(READY)  ## prove every exercise: reference, stub, wrong answers, mutants
	@printf '%s\n' $(LESSONS) | xargs -n 1 -P $(WORKERS) $(BIN)/python -m mi_helpers exercises --lessons

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
	@sh config/torch.sh .peers/bin/python $(PEERS_OF) $(TORCH) $(QUIET)
	@.peers/bin/python -m pip install $(QUIET) --requirement $(PEERS_OF)
	@cat $(PEERS_OF) | cksum >$@

$(CODERS):
	@echo "Making .peers-coders (once): SAELens, dictionary_learning and sparsify, to compare with."
	@$(PYTHON) -m venv .peers-coders && rm -f $@
	@sh config/torch.sh .peers-coders/bin/python $(CODERS_OF) $(TORCH) $(QUIET)
	@.peers-coders/bin/python -m pip install $(QUIET) --no-deps --requirement $(CODERS_OF)
	@cat $(CODERS_OF) | cksum >$@

bench: $(READY) $(PEERS) $(CODERS)  ## time sliders, patching and coders against other libraries (BENCH_ARGS=--gemma)
	@$(BIN)/python -m benchmarks.run
	@.peers/bin/python -m benchmarks.patching $(BENCH_ARGS)
	@.peers-coders/bin/python -m benchmarks.coders

doctor: $(READY)  ## say what works on this machine
	@$(BIN)/python -m mi_helpers doctor
