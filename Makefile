# Commands for users and developers. `make demo` and `make test` set up the environment if there is none.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

DEMO      := runs/demo
DEMO_DATA := demo_data
GPU_OUT   := runs/gpu_check
# One rank per GPU, two at most (the demo has two sample streams); two ranks on a machine without a GPU.
RANKS = $(shell $(BIN)/python -c "import torch; print(min(torch.cuda.device_count(), 2) or 2)")

.PHONY: demo demo-seeds test test-all fuzz soak gpu-check checks pins setup format clean

demo: setup
	python -m data.corpus synthetic --out $(DEMO_DATA) --samples 6000 --held-out 1024
	rm -rf $(DEMO)
	deepspeed --num_accelerators $(RANKS) engine/launch.py --config configs/demo.yaml \
	    --ds_config configs/deepspeed/zero3.json system.run_dir=$(DEMO)
	python -m evaluation.run $(DEMO) --tasks zero_shot,reconstruction
	python -m evaluation.summary $(DEMO)
	python -m profiling.report $(DEMO)

# The demo with its own seed and two others, each checked against the bounds of its preset.
demo-seeds: setup
	python -m pytest -m demo -s

# Tests of seconds to a minute each; `test-all` adds those of minutes (tier L2).
test: checks
	python -m pytest -n 2 --dist loadfile --durations 30 -m "(L0 or L1) and not L2"

test-all: checks
	python -m pytest -n 2 --dist loadfile --durations 30 -m "L0 or L1 or L2"

# Fuzz every reader of outside data (shards, indexes, captions, image headers) with 100,000 hostile inputs; minutes.
fuzz: setup
	python -m tests.fuzz

# Train for half an hour under random faults and compare with an undisturbed run; docs/reliability.md.
soak: setup
	python -m tests.soak

# Check the GPU paths on one GPU, with the installed Python and packages, without a network.
gpu-check:
	$(PYTHON) -m profiling.gpu_check --out $(GPU_OUT)

checks: setup
	ruff format --check .
	ruff check .
	mypy
	python -m pytest -q tests/test_layering.py
	python -m tests.resolution

# Rewrite constraints.txt: one set of versions for all supported Pythons and extras.
pins: setup
	python -m tests.resolution --update

format: setup
	ruff format .
	ruff check --fix .

setup: $(VENV)/installed

# torch first, in the build that fits the machine: without a GPU the CPU build (200 MB) instead of PyPI's, which brings
# 3 GB of CUDA libraries. It may come from an index that pip is configured with, or from where uv finds torch's builds;
# where neither has it, the second install takes PyPI's.
TORCH := $(shell grep '^torch==' constraints.txt)
PIP   := $(BIN)/pip --disable-pip-version-check
UV    := UV_HTTP_TIMEOUT=15 UV_HTTP_RETRIES=0 $(BIN)/uv pip install --python $(BIN)/python --no-config
HAS_GPU := { test -e /dev/nvidiactl || nvidia-smi -L; } > /dev/null 2>&1

$(VENV)/installed: setup.py constraints.txt
	@echo "== set-up 1/3: virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@echo "== set-up 2/3: torch, in the build for this machine"
	@if $(HAS_GPU); then false; else echo "== torch: asking pip's index for the CPU build" \
	    && $(PIP) install --quiet --dry-run --no-deps "$(TORCH)+cpu" > $(VENV)/no_cpu_build 2>&1 \
	    && $(PIP) install -c constraints.txt "$(TORCH)+cpu"; fi \
	    && echo "== torch: the CPU build, from pip's index" \
	|| { echo "== torch: asking uv for the build for this machine" \
	    && $(PIP) install --quiet -c constraints.txt uv && $(UV) --torch-backend auto -c constraints.txt "$(TORCH)"; } \
	|| echo "== torch: no build for this machine alone is within reach (the error above); PyPI's serves every machine"
	@echo "== set-up 3/3: everything else"
	$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@
	@echo "== set-up done. To type commands yourself: source $(VENV)/bin/activate"

clean:
	rm -rf $(VENV) build *.egg-info
