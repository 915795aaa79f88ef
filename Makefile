# Set up, check and run lighthouse-fx. `make help` lists the targets.
#
# PYTHON  the interpreter that the environment is made from
# VENV    the environment. `make VENV= TARGET` uses PYTHON as it is, which is for a machine that already has a (CUDA)
#         torch and no network: the package alone is installed, without dependencies and without downloads.
# ARGS    arguments of `make pretrain` and `make bench`, for example ARGS="--steps 50"
# TESTS   what pytest is given, for example TESTS="tests/unit/passes -k causal"
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
TESTS ?=
XDIST ?= -n 2 --dist loadgroup

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
STAMP := build/.system-setup
FRAMEWORKS :=
else
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
FRAMEWORKS := $(VENV)/frameworks/.installed
endif

# Two workers on two cores: one thread each, and Inductor compiles in the worker itself. No test reaches a model hub.
TEST_ENV := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 HF_HUB_OFFLINE=1
# mypy cannot map passes/ and kernels/ into the package by itself, so it is shown this tree of links.
STAGE := .mypy/stage

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup test sweep quick pytest pretrain models bench lint format typecheck check clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(STAMP) $(FRAMEWORKS) ## make the environment (again only when pyproject.toml or constraints.txt change)

ifneq ($(strip $(VENV)),)
$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

# Where they cannot be had, their tests skip, and the next call tries again. What is had has to work.
$(FRAMEWORKS): frameworks.txt | $(STAMP)
	@if $(PY) -m pip install --quiet --no-deps --upgrade --target $(@D) -r $<; then \
	  PYTHONPATH=$(@D) $(PY) -c 'import litgpt.pretrain, torchtitan.models.llama3' && touch $@; \
	else echo 'litgpt and torchtitan (frameworks.txt) could not be installed: the tests that train with them skip' >&2; fi
else
$(STAMP): pyproject.toml
	@$(PY) -c 'import torch, networkx, rich' || { \
	  echo 'VENV= needs torch, networkx and rich in $(PYTHON): install them there, or leave VENV set' >&2; exit 1; }
	PIP_BREAK_SYSTEM_PACKAGES=1 $(PY) -m pip install --quiet --no-index --no-deps --no-build-isolation -e .
	@mkdir -p $(@D) && touch $@
endif

check: lint typecheck ## ruff and mypy

lint: $(STAMP) ## ruff
	$(PY) -m ruff check .

format: $(STAMP) ## ruff's automatic repairs
	$(PY) -m ruff check --fix .

typecheck: $(STAMP) ## mypy --strict over the package as it is installed
	@rm -rf $(STAGE) && mkdir -p $(STAGE)/lighthouse_fx
	@ln -s $(CURDIR)/lighthouse_fx/* $(CURDIR)/passes $(CURDIR)/kernels $(STAGE)/lighthouse_fx/
	MYPYPATH=$(STAGE) $(PY) -m mypy --config-file pyproject.toml --cache-dir .mypy/cache -p lighthouse_fx

test: check pytest ## ruff, mypy and the tests, but for the sweeps

pytest: $(STAMP) $(FRAMEWORKS) ## the tests alone (on a machine without pytest-xdist: XDIST=)
	@$(TEST_ENV) $(PY) -m pytest $(XDIST) -m 'not sweep' $(TESTS)

sweep: $(STAMP) $(FRAMEWORKS) ## the tests that `make test` leaves out: all cases of what it samples, and whole runs
	@$(TEST_ENV) $(PY) -m pytest $(XDIST) -m sweep $(TESTS)

quick: $(STAMP) $(FRAMEWORKS) ## the tests that are not slow
	@$(TEST_ENV) $(PY) -m pytest $(XDIST) -m 'not slow and not sweep' $(TESTS)

pretrain: $(STAMP) ## the main job: pre-train a small model with Lighthouse and beside it densely
	$(PY) examples/pretrain.py $(ARGS)

models: $(STAMP) $(FRAMEWORKS) ## write docs/models.md anew: which attentions of which models are rewritten
	$(TEST_ENV) LIGHTHOUSE_WRITE_MODELS=1 $(PY) -m pytest tests/integration/test_models.py

bench: $(STAMP) ## time one attention layer beside dense attention, on a GPU
	$(PY) benchmarks/layer.py $(ARGS)

clean: ## remove what was built, but keep the environment
	rm -rf build dist *.egg-info .mypy .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find lighthouse_fx passes kernels tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +
