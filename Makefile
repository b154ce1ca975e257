# make demo | test | test-all | lint | bench; each sets up .venv first and repeats nothing that is already done.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
VENV_CUDA ?= .venv-cuda
JOBS ?= auto
# extra pip arguments for torch, for instance: make setup TORCH_PIP="--extra-index-url https://download.pytorch.org/whl/cpu"
TORCH_PIP ?=
PROMPT ?= Hello! Who are you?
TOKENS ?= 48

BIN := $(VENV)/bin
TORCH := $(VENV)/.torch-installed
READY := $(VENV)/.ready
CUDA_BIN := $(VENV_CUDA)/bin
CUDA_READY := $(VENV_CUDA)/.ready
NANO := build/nano

.PHONY: help setup demo test test-all test-cuda-cpu parity-nightly lint bench clean

help:
	@echo "make demo      make a small random model in the hub's format and let it generate tokens"
	@echo "make test      fast tests (under 10 minutes on 2 cores)"
	@echo "make test-all  every test"
	@echo "make parity-nightly  100,000 judged cases, mutants on 20 seeds, legal variants on 50"
	@echo "make test-cuda-cpu  Triton kernels under Triton's interpreter and compiled for sm_90a, without a GPU; in $(VENV_CUDA)"
	@echo "make lint      ruff and mypy"
	@echo "make bench     CPU timings beside transformers (long)"
	@echo "make setup     only the environment, in $(VENV)"

setup: $(READY)

# torch comes first and alone, so that its build (CPU or CUDA) is chosen by TORCH_PIP and by nothing else
$(TORCH): constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed: install the venv package of your system (Debian: apt install python3-venv)" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet $(TORCH_PIP) "$$(grep -E '^torch==' constraints-cpu.txt)"
	@touch $@

$(READY): $(TORCH) setup.cfg pyproject.toml constraints-cpu.txt
	$(BIN)/python -m pip install --quiet -c constraints-cpu.txt -e '.[test,dev]'
	$(BIN)/python -m backends.cpu_native --optional
	@touch $@

$(NANO)/model.safetensors.index.json: | $(READY)
	$(BIN)/v4 checkpoint make --config nano --seed 0 --overwrite --out $(NANO)

demo: $(READY) $(NANO)/model.safetensors.index.json
	@echo '$$ v4 generate --model $(NANO) --max-new-tokens $(TOKENS) --explain "$(PROMPT)"'
	@$(BIN)/v4 generate --model $(NANO) --max-new-tokens $(TOKENS) --explain "$(PROMPT)"

test: $(READY)
	$(BIN)/v4 parity --min-cases 3000 --mutant-seeds 0 --legal-seeds 0
	$(BIN)/python -m pytest -q -n $(JOBS)

test-all: $(READY)
	$(BIN)/python -m pytest -q -n $(JOBS) -m ""

$(CUDA_READY): constraints-cuda.txt setup.cfg
	@test -x $(CUDA_BIN)/python || $(PYTHON) -m venv $(VENV_CUDA)
	$(CUDA_BIN)/python -m pip install --quiet $(TORCH_PIP) "$$(grep -E '^torch==' constraints-cuda.txt)"
	$(CUDA_BIN)/python -m pip install --quiet -c constraints-cuda.txt triton numpy pyyaml safetensors tokenizers tqdm jinja2 pytest pytest-timeout pytest-xdist hypothesis
	@touch $@

test-cuda-cpu: $(CUDA_READY)
	$(CUDA_BIN)/python -m pytest -q -n $(JOBS) tests/cuda
	$(CUDA_BIN)/python -m tools.cuda_aot --markdown docs/cuda-kernels.md --check
	$(CUDA_BIN)/python -m tools.bench cuda --dry-run

parity-nightly: $(READY)
	$(BIN)/v4 parity --samples 520 --min-cases 100000 --mutant-seeds 20 --legal-seeds 50 --html build/parity.html --json build/parity.json --overwrite

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m tools.bench cpu

clean:
	rm -rf build .pytest_cache .ruff_cache .mypy_cache .hypothesis
