# `make help` lists the targets.
SHELL := /bin/bash
.DELETE_ON_ERROR:

PY := .venv/bin/python
DEMO := .venv/.installed-demo
DEV := .venv/.installed-dev

# Without its compiled files Python compiles all tests anew in every worker: half a minute of the loop's two cores.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

.PHONY: demo
demo: $(DEMO) ## the whole way on this machine: train, export, run, report, fall back
	.venv/bin/outrider demo --output demo-output

.PHONY: test
test: $(DEV) ## every test
	@.ci/debian
	$(PY) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: test-boards
test-boards: $(DEV) ## bundles and the device part of the tests on emulated ARM boards
	@.ci/debian
	$(PY) -m pytest --numprocesses 2 --dist loadfile tests/boards

.PHONY: check
check: $(DEV) ## the loop, under 90 seconds: linters, types, contracts, fast tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	OUTRIDER_LOOP=1 $(PY) -m pytest -q --numprocesses 2 --dist loadfile -p no:schemathesis -m "not slow" tests/unit

.PHONY: bench
bench: $(DEV) ## measure beside the peers and rewrite the README's figures
	$(PY) -m benchmarks

.PHONY: bench-exporters
bench-exporters: $(DEV) ## measure the exporter's files beside the quantizers' own: a quarter of an hour, on a quiet machine
	$(PY) -m benchmarks exporters

.PHONY: trials
trials: $(DEV) ## the full counts of what make test shows a share of; writes tests/trials/results
	@.ci/debian
	$(PY) -m pytest -m trials tests/trials

.PHONY: picture
picture: demo ## the README's picture, from a demo of this machine
	cp demo-output/requests.png docs/images/requests.png

.PHONY: clean
clean: ## remove what make made
	rm -rf .venv demo-output dist

$(DEMO): pyproject.toml .ci/constraints.txt .ci/setup
	@.ci/setup demo

$(DEV): pyproject.toml .ci/constraints.txt .ci/setup
	@.ci/setup dev
