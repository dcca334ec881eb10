# Everything sets itself up: each target installs what it needs into .venv first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install demo demo-quick test test-slow torture lint format gpu clean

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

# On a machine with an NVIDIA GPU, with the torch and triton that are installed there.
LOAD := requests=256 shortest=100 longest=1024 groups=32 budget=1024 peer_batch=256
gpu:
	PYTHONPATH=kernels:. $(PYTHON) -m pytest tests/gpu
	PYTHONPATH=kernels:. $(PYTHON) -m bench.linear_logprob
	PYTHONPATH=kernels:. $(PYTHON) -m bench.policy_loss
	PYTHONPATH=kernels:. $(PYTHON) -m bench.linear_sample
	PYTHONPATH=kernels:. $(PYTHON) -m bench.paged_attention
	PYTHONPATH=kernels:. $(PYTHON) -m bench.sampler device=cuda shape=qwen3-0.6b $(LOAD)
	PYTHONPATH=kernels:. $(PYTHON) -m bench.sampler device=cuda shape=qwen2-1.5b $(LOAD)
	PYTHONPATH=kernels:. $(PYTHON) -m bench.sampler device=cuda shape=qwen3-4b $(LOAD)
	PYTHONPATH=kernels:. $(PYTHON) -m bench.train_step learner

clean:
	rm -rf .venv outputs build dist *.egg-info kernels/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
