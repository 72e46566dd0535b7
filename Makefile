# worker-orcd: `make haiku` shows it working, `make test` proves it, `make help` lists the rest.
PYTHON ?= python3
BIN    := .venv/bin
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)

PART        ?= kernels models engine
TOGETHER    := --numprocesses 6 --dist worksteal
GPU_kernels := tests/kernels tests/backends tests/quant $(TOGETHER)
GPU_models  := tests/gpu $(TOGETHER)
GPU_engine  := tests/test_gpu.py --numprocesses 0# measures memory, so it has the card to itself

.PHONY: help .venv haiku test test-litellm soak check format test-gpu bench clean

help:                        ## list the targets
	@grep -E '^[.a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

.venv: $(BIN)/.installed     ## create .venv and install everything into it
$(BIN)/.installed: pyproject.toml constraints.txt
	@echo "Installing into .venv (a few minutes the first time) …"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

haiku: .venv                 ## start a worker on the embedded model and stream a haiku, twice
	@$(BIN)/worker-orcd haiku --device $(DEVICE)

test: export PYTHONDONTWRITEBYTECODE :=# it starts a hundred workers, which need not compile our modules again
test: .venv                  ## the whole suite; needs no GPU
	$(BIN)/python -m pytest -m "not gpu" --numprocesses auto --maxprocesses 8 --dist worksteal

test-litellm: .venv          ## LiteLLM against a worker, in an environment of its own
	@test -x .venv-litellm/bin/litellm || ($(PYTHON) -m venv .venv-litellm && .venv-litellm/bin/python -m pip install \
	  --quiet --disable-pip-version-check --constraint tests/clients/litellm.txt litellm mcp)
	.venv-litellm/bin/python tests/clients/drive_litellm.py

soak: .venv                  ## at length: the simulation of cache, scheduler and faults; the HTTP edge under fire
	$(BIN)/python -m tests.sim.soak
	$(BIN)/python -m tests.server.soak

check: .venv                 ## lint, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py

format: .venv                ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-gpu: .venv              ## what only a GPU can show; PART=kernels, models or engine is a third of it
	@$(BIN)/python -c "import torch; print(torch.cuda.get_device_name(0))"
	$(foreach part,$(PART),$(BIN)/python -m pytest -m gpu --timeout 300 $(or $(GPU_$(part)),$(error no part $(part))) &&) true

bench: .venv                 ## host time of a step, tokens/s over HTTP, speed of the embedded model
	$(BIN)/python benchmarks/bench_engine.py
	$(BIN)/python benchmarks/bench_serve.py --fake
	$(BIN)/python benchmarks/bench_engine.py --model haiku --device $(DEVICE)

clean:                       ## remove what was built or installed
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
