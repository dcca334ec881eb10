# Everything sets itself up: each target installs what it needs into .venv first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install demo demo-quick test test-slow torture lint format gpu gpu-test gpu-kernels gpu-sampler gpu-learner clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "bcr needs Python 3.11 or newer; run: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The whole argument; demo-quick is the base against BCR alone.
demo: $(INSTALLED)
	$(BIN)/python -m bcr.demo

demo-quick: $(INSTALLED)
	$(BIN)/python -m bcr.demo output=outputs/demo-quick parts=[bcr]

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# kill -9 at 20 random moments of a training run, which must end like an undisturbed one; with RANKS=2 of ranks under torchrun.
torture: $(INSTALLED)
	PYTHONPATH=kernels:. $(BIN)/python -m $(if $(RANKS),tests.parallel.torture 20 $(RANKS),tests.runtime.torture 20)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# On a machine with an NVIDIA GPU, with the torch and triton that are installed there. By estimate some ten minutes on an H100, 1 to 4 for each
# part. What a bench prints last, one JSON object, is added to RESULTS. `make -k gpu` goes on with the other parts where one fails.
RESULTS ?= outputs/gpu.jsonl
LOAD := repeats=1 shortest=100 longest=512 groups=32 budget=512 peer_batch=256
THERE := PYTHONPATH=kernels:. $(PYTHON) -m
KEPT = | tee $(RESULTS).text && tail -n 1 $(RESULTS).text >> $(RESULTS)

gpu: gpu-test gpu-kernels gpu-sampler gpu-learner

gpu-test:
	$(THERE) pytest tests/gpu

gpu-kernels gpu-sampler gpu-learner: SHELL := /bin/bash
gpu-kernels gpu-sampler gpu-learner: .SHELLFLAGS := -o pipefail -c

gpu-kernels:
	@mkdir -p $(dir $(RESULTS))
	$(THERE) bench.linear_logprob --case 8192,1536,151936 --case 32768,2560,151936 $(KEPT)
	$(THERE) bench.policy_loss --case 8192,1536,151936 $(KEPT)
	$(THERE) bench.linear_sample $(KEPT)
	$(THERE) bench.paged_attention $(KEPT)

gpu-sampler:
	@mkdir -p $(dir $(RESULTS))
	$(THERE) bench.sampler device=cuda shape=qwen3-0.6b requests=256 $(LOAD) $(KEPT)
	$(THERE) bench.sampler device=cuda shape=qwen2-1.5b requests=256 peers=0 $(LOAD) $(KEPT)
	$(THERE) bench.sampler device=cuda shape=qwen3-4b requests=0 peers=0 $(LOAD) $(KEPT)

gpu-learner:
	@mkdir -p $(dir $(RESULTS))
	$(THERE) bench.train_step learner $(KEPT)

clean:
	rm -rf .venv outputs build dist *.egg-info kernels/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
