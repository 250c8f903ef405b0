# Every wish is one command; each installs what it needs first. Plain `make` lists them.

VENV := .venv
BIN := $(VENV)/bin
# Expanded only when the environment is made.
PYTHON ?= $(shell for candidate in python3.11 python3 "$$HOME"/.pyenv/versions/3.11.*/bin/python; do \
	"$$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null \
	&& { echo "$$candidate"; break; }; done)
PACKAGES := $(VENV)/.packages
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest
BENCHMARKS := $(wildcard $(addprefix benchmarks/,index_maps.py loader.py step_time.py launch.py ledger_overhead.py save.py verify_at_load.py reshape.py convert_hf.py sharded_data.py))
# What codespell reads as well as the code.
PROSE := README.md ARCHITECTURE.md CONTRIBUTING.md CHANGELOG.md SECURITY.md docs

.DEFAULT_GOAL := help
.PHONY: help setup setup-apex demo test test-fast test-matrix test-kill test-cluster check format docs bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(STAMP) ## make .venv and install everything pinned

$(PACKAGES): $(wildcard requirements/*.txt)
	@test -n '$(PYTHON)' || { echo 'Python 3.11 not found; name it: make setup PYTHON=/path/to/python3.11' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet -r requirements/requirements-dev.txt
	@touch $@

$(STAMP): $(PACKAGES) setup.py pyproject.toml $(wildcard megatron/stream/*.cpp)
	$(BIN)/pip install --disable-pip-version-check --quiet --no-build-isolation --no-deps -e .
	@touch $@

setup-apex: $(STAMP) ## add NVIDIA's apex (needs CUDA)
	$(BIN)/pip install --no-build-isolation --no-cache-dir -r requirements/requirements-apex.txt
	$(BIN)/python tools/dev/check_apex.py

demo: $(STAMP) ## train on real text with 4 processes, kill, resume, compare
	$(BIN)/python tools/demo/run_demo.py

test: $(STAMP) ## unit, property, golden, multi-process and launcher tests
	$(PYTEST)

test-fast: $(STAMP) ## what needs neither ranks nor a launcher
	$(PYTEST) -m 'not distributed and not launcher and not matrix and not kill and not cluster and not cluster_ci'

test-matrix: $(STAMP) ## the long matrices that `make test` samples
	$(PYTEST) -m matrix

test-kill: $(STAMP) ## kill runs at every instant of a save, and compare
	$(PYTEST) -m kill

test-cluster: $(STAMP) ## preempt, cut off and kill jobs on a SLURM test-bed (root; 30 min)
	$(PYTEST) -m 'cluster or cluster_ci' -v tests/cluster

check: $(STAMP) ## format, lint, types, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell megatron tools tests/*/*.py tests/*.py $(PROSE)

format: $(STAMP) ## rewrite files the way `check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP) ## regenerate the documents made from code
	$(BIN)/python tools/dev/gen_config_docs.py

bench: $(STAMP) ## measure against the plain alternatives, one ratio a line
	for script in $(BENCHMARKS); do $(BIN)/python "$$script" || exit 1; done

clean: ## remove what was built; data, runs and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache megatron/stream/*.so $(STAMP)
