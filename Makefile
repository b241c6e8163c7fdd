PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTEST_ARGS ?=
PY := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo ablation setup-eval test test-slow test-long setup-next test-next smoke-next lint format schema docs bench clean

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

.venv/.run: requirements.txt constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed (tried '$(PYTHON)'): install it or say make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/.eval: .venv/.run requirements-eval.txt
	$(PY) -m pip install --disable-pip-version-check -r requirements-eval.txt
	@touch $@

.venv/.dev: .venv/.run requirements-dev.txt requirements-data.txt requirements-search.txt requirements-eval.txt
	$(PY) -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@

setup: .venv/.run ## create .venv with everything a run needs

setup-dev: .venv/.dev

setup-eval: .venv/.eval ## add what only evaluations need: retrieval, similarity, scores (a minute, 0.7 GB)

demo: setup ## prepare text, pretrain a small encoder, export it, fill masks (5 minutes on two cores, after the install)
	$(PY) main.py demo

ablation: setup ## prepare the demo's text, train four activations with three seeds each, write the report (half an hour on two cores)
	$(PY) main.py prepare configs/data/demo.yaml
	$(PY) main.py sweep configs/sweep/activation.yaml
	$(PY) main.py report runs/sweep-activation

# Two processes, since most tests wait for one thread; OpenMP's idle threads must then not spin on the other's core.
# A worker that a hanging test has ended is not started again, since it would hang again.
PYTEST := OMP_WAIT_POLICY=passive $(PY) -m pytest -n 2 --dist loadfile --max-worker-restart=0 --durations=15

test: setup-dev ## the quick tests, 8 minutes on two cores after the install (PYTEST_ARGS="tests/data -k masking" for some)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: setup-dev ## the slow tests: kills, launchers, compilers, more sizes of what `make test` proves
	$(PYTEST) -m "slow and not long" $(PYTEST_ARGS)

test-long: setup-dev ## the longest tests, of which others prove the essence: before a release (CI does not run them)
	$(PYTEST) -m long $(PYTEST_ARGS)

# The second stack. The first Python 3.12 or 3.13 that runs; a machine's constraints have no say in a whole lock.
PYTHON_NEXT ?= $(shell for each in $$(bash -c 'type -ap python3.12 python3.13'); do $$each -c "" 2>/dev/null && echo $$each && break; done)
NEXT := OMP_WAIT_POLICY=passive .venv-next/bin/python -m pytest -n 2 --dist loadfile

.venv-next/.done: requirements-next.txt
	@test -n "$(PYTHON_NEXT)" || { echo "Python 3.12 or 3.13 is needed: install it or say make PYTHON_NEXT=/path/to/python3.12"; exit 1; }
	$(PYTHON_NEXT) -m venv .venv-next
	PIP_CONSTRAINT=/dev/null .venv-next/bin/python -m pip install --disable-pip-version-check --no-deps -r requirements-next.txt
	@touch $@

setup-next: .venv-next/.done ## create .venv-next: newest torch and transformers, Python 3.12 or 3.13 (5 minutes, 8 GB)

test-next: setup-next ## the quick tests on the second stack
	$(NEXT) -m "not slow" $(PYTEST_ARGS)

smoke-next: setup-dev setup-next ## seeds, exports and checkpoints go from one stack to the other and back; exports in transformers 5
	$(NEXT) tests/stacks.py tests/flexbert/hf/transformers5.py tests/flexbert/hf/test_parts.py $(PYTEST_ARGS)

lint: setup-dev ## ruff, pyright and the arrows between rooms
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/basedpyright
	.venv/bin/lint-imports

format: setup-dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

schema: setup ## write configs/schema/ and docs/reference.md anew, after a change of a config's keys
	$(PY) main.py schema --json
	$(PY) main.py schema --markdown --output docs/reference.md

.venv-docs/.done: requirements-docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --disable-pip-version-check -r requirements-docs.txt
	@touch $@

docs: setup .venv-docs/.done ## build the documentation into site/; open site/index.html
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

bench: setup-dev ## the loader, 2 trillion simulated tokens, start-up (docs/measurements.md names the other benchmarks)
	$(PY) -m benchmarks.loader
	$(PY) -m benchmarks.scale
	$(PY) -m benchmarks.startup

clean: ## remove the demo's data and run
	rm -rf datasets/demo runs/demo
