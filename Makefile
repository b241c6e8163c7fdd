PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTEST_ARGS ?=
PY := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo test lint format bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

.venv/.run: requirements.txt constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed (tried '$(PYTHON)'): install it or say make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/.dev: .venv/.run requirements-dev.txt requirements-data.txt
	$(PY) -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@

setup: .venv/.run ## create .venv with everything a run needs

setup-dev: .venv/.dev

demo: setup ## prepare text, pretrain a small encoder, export it, fill masks (5 minutes on two cores, after the install)
	$(PY) main.py demo

# Two processes, since most tests wait for one thread; OpenMP's idle threads must then not spin on the other's core.
test: setup-dev ## all tests, 25 minutes on two cores after the install (PYTEST_ARGS="-m 'not slow'" for the fast ones)
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n 2 --dist loadfile --durations=15 $(PYTEST_ARGS)

lint: setup-dev ## ruff and pyright
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/basedpyright

format: setup-dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: setup-dev ## the loader, 2 trillion simulated tokens, start-up (README.md names the other benchmarks)
	$(PY) -m benchmarks.loader
	$(PY) -m benchmarks.scale
	$(PY) -m benchmarks.startup

clean: ## remove the demo's data and run
	rm -rf datasets/demo runs/demo
