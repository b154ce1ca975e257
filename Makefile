# make demo | test | test-all | test-ascend | lint | bench; each sets up .venv first and repeats nothing that is already done.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
CUDA_VENV ?= .venv-cuda
JOBS ?= auto
# extra pip arguments for torch, for instance: make setup TORCH_PIP="--extra-index-url https://download.pytorch.org/whl/cpu"
TORCH_PIP ?=
# chips that test-ascend pretends, each in a process of its own
SOCS ?= a2 a3 950
PROMPT ?= Hello! Who are you?
TOKENS ?= 48

BIN := $(VENV)/bin
TORCH := $(VENV)/.torch-installed
READY := $(VENV)/.ready
CUDA_BIN := $(CUDA_VENV)/bin
CUDA_READY := $(CUDA_VENV)/.ready
NANO := build/nano
TRAINED := models/nano
ASCEND_VENV ?= .venv-ascend
ASCEND_BIN := $(ASCEND_VENV)/bin
ASCEND_TORCH := $(ASCEND_VENV)/.torch-installed
ASCEND_READY := $(ASCEND_VENV)/.ready

.PHONY: help setup demo demo-random test test-all test-ascend test-ascend-device test-cuda-cpu parity-nightly lint bench clean

help:
	@echo "make demo      the trained nano model: a story, an answer from 4,600 tokens back, the table of ops"
	@echo "make demo-random  a random model in the hub's format, made here, generates tokens"
	@echo "make test      fast tests (under 10 minutes on 2 cores)"
	@echo "make test-all  every test"
	@echo "make test-ascend  the ascend backend against torch_npu on a CPU, for three chips (own environment, no NPU needed)"
	@echo "make test-ascend-device  the same tests on the NPU of this machine"
	@echo "make parity-nightly  100,000 judged cases, mutants on 20 seeds, legal variants on 50"
	@echo "make test-cuda-cpu  Triton kernels under Triton's interpreter and compiled for sm_90a, without a GPU; in $(CUDA_VENV)"
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

# the trained model where the repository has it
ifneq ($(wildcard $(TRAINED)/config.json),)
demo: $(READY)
	$(BIN)/python -m tools.nano demo --model $(TRAINED)
else
demo: demo-random
endif

demo-random: $(READY) $(NANO)/model.safetensors.index.json
	@echo '$$ v4 generate --model $(NANO) --max-new-tokens $(TOKENS) --explain "$(PROMPT)"'
	@$(BIN)/v4 generate --model $(NANO) --max-new-tokens $(TOKENS) --explain "$(PROMPT)"

test: $(READY)
	$(BIN)/v4 parity --min-cases 3000 --mutant-seeds 0 --legal-seeds 0
	$(BIN)/python -m pytest -q -n $(JOBS)

test-all: $(READY)
	$(BIN)/python -m pytest -q -n $(JOBS) -m ""

# torch_npu stops `import torch` where CANN is absent, so it never enters the main environment
$(ASCEND_TORCH): constraints-cpu.txt
	@test -x $(ASCEND_BIN)/python || $(PYTHON) -m venv $(ASCEND_VENV) || { echo "python3 -m venv failed: install the venv package of your system (Debian: apt install python3-venv)" >&2; exit 2; }
	$(ASCEND_BIN)/python -m pip install --quiet $(TORCH_PIP) "$$(grep -E '^torch==' constraints-cpu.txt)"
	@touch $@

$(ASCEND_READY): $(ASCEND_TORCH) setup.cfg pyproject.toml constraints-ascend.txt
	$(ASCEND_BIN)/python -m pip install --quiet -c constraints-ascend.txt torch_npu -e '.[test,dev]'
	@touch $@

# l1 and l2 for all chips in one go, then device npu for each chip, then this project's own op with both of its halves
test-ascend: $(ASCEND_READY)
	$(ASCEND_BIN)/python -m tools.npu_standin build
	TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(ASCEND_BIN)/python -m backends.ascend
	$(ASCEND_BIN)/python -m pytest -q -n $(JOBS) tests/ascend
	@for soc in $(SOCS); do \
		echo "device npu, pretended on $$soc"; \
		V4_TEST_LEVEL=l3 V4_TEST_SOC=$$soc $(ASCEND_BIN)/python -m pytest -q -n $(JOBS) tests/ascend || exit 1; \
		V4_TEST_OWN=1 V4_TEST_LEVEL=l3 V4_TEST_SOC=$$soc $(ASCEND_BIN)/python -m pytest -q -n 0 tests/ascend/test_own_op_device.py || exit 1; \
	done

# on a machine with an NPU, in an environment that has torch_npu: nothing is pretended
test-ascend-device:
	V4_TEST_DEVICE=npu $(PYTHON) -m pytest -q tests/ascend

$(CUDA_READY): constraints-cuda.txt setup.cfg
	@test -x $(CUDA_BIN)/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_BIN)/python -m pip install --quiet $(TORCH_PIP) "$$(grep -E '^torch==' constraints-cuda.txt)"
	$(CUDA_BIN)/python -m pip install --quiet -c constraints-cuda.txt triton numpy pyyaml safetensors tokenizers tqdm jinja2 pytest pytest-timeout pytest-xdist hypothesis
	@touch $@

test-cuda-cpu: $(CUDA_READY)
	$(CUDA_BIN)/python -m pytest -q -n $(JOBS) tests/cuda
	$(CUDA_BIN)/python -m tools.cuda_aot --markdown docs/cuda-kernels.md --check
	$(CUDA_BIN)/python -m tools.bench cuda --dry-run

parity-nightly: $(READY)
	$(BIN)/v4 parity --jobs 0 --samples 520 --min-cases 100000 --mutant-seeds 20 --legal-seeds 50 --html build/parity.html --json build/parity.json --overwrite

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m tools.bench cpu

clean:
	rm -rf build .pytest_cache .ruff_cache .mypy_cache .hypothesis
