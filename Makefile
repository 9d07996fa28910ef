# `make demo` and `make test` do all the set-up on a fresh machine: a virtual environment in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all golden lint same benchmark compare
demo: .venv/ready
	$(BIN)/python greenmim.py demo

test: .venv/ready
	$(BIN)/python -m pytest -q -m "not slow"

test-all: .venv/ready  # full-size models, and the demos on three seeds, too
	$(BIN)/python -m pytest -q --durations=15 --demo_seeds 3

golden: .venv/ready  # the released code's answers under every CPU kernel, one thread and two
	$(BIN)/python -m tests.golden -m "not slow"

lint: .venv/ready
	$(BIN)/ruff check .

same: .venv/ready  # copy what the scripts share from greenmim.py to the others
	$(BIN)/python -m tests.same

benchmark: .venv/ready
	$(BIN)/python -m tests.benchmark

compare: .venv/ready  # every demo, a table and docs/compare.png: a quarter of an hour
	$(BIN)/python -m tests.compare

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@
