# Each target is at most three lines; what needs more lives in app/ or tests/.
PYTHON ?= python3
TORCH ?= cuda
BIN := .venv/bin
ifeq ($(TORCH),cpu)
  INDEX := --extra-index-url https://download.pytorch.org/whl/cpu
  SIZE := the CPU build, about 200 MB
else
  SIZE := on Linux the CUDA build, about 3 GB; TORCH=cpu takes the CPU build, 200 MB
endif

.PHONY: setup serve test test-gpu check fix

setup: .venv/.stamp .venv/.prometheus

.venv/.stamp: pyproject.toml constraints.txt
	@echo "setup: installs into .venv what constraints.txt lists and .venv lacks: torch ($(SIZE)) and about 150 MB more"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install $(INDEX) --constraint constraints.txt --editable '.[dev]' && touch $@

.venv/.prometheus: deploy/prometheus/fetch | .venv/.stamp
	@deploy/prometheus/fetch $(BIN) && touch $@

serve: setup
	exec $(BIN)/instep serve

test: setup
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

check: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m tests.readme
