PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo study test lint format protos k8s-check dashboards clean

help: ## show this help
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  \033[1m%-10s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything in it (PYTHON=python3.12 to choose the interpreter)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Accord needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Install one and say: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' has no venv module. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV): once, some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## run the paper's loop on the world of shapes (ARGS="--set seed=1" to change the recipe)
	$(BIN)/accord demo $(ARGS)

study: $(STAMP) ## compare objectives over five seeds, some hours on two cores (it resumes; see docs/study.md)
	$(BIN)/accord study --study recipes/studies/sandbox.yaml $(ARGS)

test: $(STAMP) ## run the tests (ARGS="-m 'not slow'" to choose)
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP) ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP) ## put the code into its form
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

protos: $(STAMP) ## generate accord/v1 from protos/
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=. --grpc_python_out=. \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --mypy_out=. --mypy_grpc_out=. protos/accord/v1/*.proto

k8s-check: $(STAMP) ## build and check all manifests, images and rules, with no cluster and no engine
	$(BIN)/python -m pytest tests/k8s tests/docker $(ARGS)

dashboards: $(STAMP) ## write the Prometheus rules and Grafana dashboards from k8s/monitoring
	$(BIN)/python -m k8s.monitoring.generate

clean: ## remove the environment and the caches; runs/ stays
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
