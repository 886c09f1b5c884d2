# Everything a newcomer types. `make demo` and `make test` set the environment up by themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

DEMO      := runs/demo
DEMO_DATA := demo_data
GPU_OUT   := runs/gpu_check
# One rank per GPU, two at most (the demo deals its data to two streams); two ranks on a machine without a GPU.
RANKS = $(shell $(BIN)/python -c "import torch; print(min(torch.cuda.device_count(), 2) or 2)")

.PHONY: demo demo-seeds test fuzz soak gpu-check checks setup format clean

demo: setup
	python -m data.corpus synthetic --out $(DEMO_DATA) --samples 6000 --held-out 1024
	rm -rf $(DEMO)
	deepspeed --num_accelerators $(RANKS) engine/launch.py --config configs/demo.yaml \
	    --ds_config configs/deepspeed/zero3.json system.run_dir=$(DEMO)
	python -m evaluation.run $(DEMO) --tasks zero_shot,reconstruction
	python -m evaluation.summary $(DEMO)
	python -m profiling.report $(DEMO)

# The demo with the seed that ships and two others, each held against its bounds; half an hour.
demo-seeds: setup
	python -m pytest -m demo -s

test: checks
	python -m pytest -n 2 --dist loadfile --durations 30 -m "L0 or L1"

# 100,000 hostile inputs for each reader of what comes from outside: shards, indexes, captions, picture headers; minutes.
fuzz: setup
	python -m tests.fuzz

# Half an hour of training under random faults, then the same undisturbed, compared; docs/reliability.md.
soak: setup
	python -m tests.soak

# What was built for GPUs, shown to work on one; with the Python and the packages that are there, and no network.
gpu-check:
	$(PYTHON) -m profiling.gpu_check --out $(GPU_OUT)

checks: setup
	ruff format --check .
	ruff check .
	mypy
	python -m pytest -q tests/test_layering.py

format: setup
	ruff format .
	ruff check --fix .

setup: $(VENV)/installed

$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
