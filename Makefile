# Everything happens in .venv; PYTHON makes it (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-unit test-integration test-gpu bench-gpu lint format typecheck check constraints image clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

install: $(STAMP)  ## Install torchport, its test and development tools into .venv

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "torchport needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: install  ## The whole way on real data: train, export, serve, load-test
	$(BIN)/torchport demo

test: install  ## All tests (unit and integration)
	$(BIN)/pytest

test-unit: install  ## Unit tests only
	$(BIN)/pytest tests/unit

test-integration: install  ## Tests with a real TorchServe only
	$(BIN)/pytest tests/integration

test-gpu: install  ## Tests on a CUDA GPU; skipped without one (docs/gpu.md)
	$(BIN)/pytest tests/gpu

bench-gpu: install  ## What one GPU does with an encoder and a CNN; BENCH_FLAGS="--budget 300 ..."
	$(BIN)/python tests/benchmarks/gpu_limits.py $(BENCH_FLAGS)

lint: install  ## Style and likely mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: install  ## Static types
	$(BIN)/mypy

check: lint typecheck test  ## What CI runs

constraints: install  ## Pin what .venv holds now into constraints.txt
	{ sed -n '/^#/p;/^[^#]/q' constraints.txt; \
	  $(BIN)/pip freeze --all --exclude pip --exclude-editable | sed 's/+[a-z0-9.]*$$//' | sort -f; \
	  sed -n '/^# where there is no/,$$p' constraints.txt; } > constraints.tmp
	mv constraints.tmp constraints.txt

image:  ## Build the serving image; IMAGE_FLAGS="--build-arg ..." (docs/docker.md)
	@if docker version >/dev/null 2>&1; then docker build -t torchport $(IMAGE_FLAGS) .; \
	 elif command -v podman >/dev/null; then podman build --format docker -t torchport $(IMAGE_FLAGS) .; \
	 elif command -v buildah >/dev/null; then buildah bud --format docker -t torchport $(IMAGE_FLAGS) .; \
	 else echo "building the image needs a running Docker, or Podman or Buildah"; exit 1; fi

clean:  ## Remove .venv and what the commands wrote
	rm -rf $(VENV) demo runs model_store reports *.egg-info
