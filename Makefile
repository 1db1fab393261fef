# Each target has at most three lines; longer ones are scripts in deploy/ or tests/.
PYTHON ?= python3
TORCH ?= auto
BIN := .venv/bin
STAMP := .venv/.stamp-$(TORCH)

.PHONY: setup serve test test-all test-gpu faults check fix

setup: $(STAMP) .venv/.prometheus

$(STAMP): pyproject.toml constraints.txt deploy/setup
	@TORCH=$(TORCH) PYTHON=$(PYTHON) deploy/setup .venv --editable '.[dev]' && touch $@

.venv/.prometheus: deploy/prometheus/fetch | $(STAMP)
	@deploy/prometheus/fetch $(BIN) && touch $@

serve: setup
	exec $(BIN)/instep serve

test: setup
	$(BIN)/python -m pytest -m "not gpu and not slow"

test-all: setup
	$(BIN)/python -m pytest -m "not gpu and slow"

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

faults: setup
	$(BIN)/python -m tests.faults

check: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m tests.readme
