# Everything sets itself up: `make demo` turns the flywheel once, `make test` tests it. See README.md.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
WORKSPACE ?= demo
FLYWHEEL = .venv/bin/flywheel
# Models are folders or packages, never downloads.
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help demo test test-all lint docs format setup setup-dev clean

help:
	@echo "make demo      set up, turn the flywheel once in $(WORKSPACE)/, say where the report is"
	@echo "make test      set up, run the quick tests (make test-all: the slow ones too)"
	@echo "make lint      ruff and mypy        make format    rewrite with ruff"
	@echo "make docs      rewrite the generated tables of docs/"
	@echo "make clean     remove .venv and caches; workspaces stay"

demo: setup
	@test -f $(WORKSPACE)/flywheel.toml || $(FLYWHEEL) init $(WORKSPACE) --preset quick
	@$(FLYWHEEL) run $(WORKSPACE)

test: setup-dev
	@.venv/bin/python -m pytest

test-all: setup-dev
	@.venv/bin/python -m pytest --slow

lint: setup-dev
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

docs: setup-dev
	@.venv/bin/python scripts/document.py

format: setup-dev
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

setup: need-python
	@$(PYTHON) scripts/set_up.py

setup-dev: need-python
	@$(PYTHON) scripts/set_up.py --dev

.PHONY: need-python
need-python:
	@test -n "$(PYTHON)" || { echo "set-up: there is no Python: apt-get install python3.11 python3.11-venv, then run again." >&2; exit 1; }

clean:
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
