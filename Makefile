# `make demo` and `make test` do all the set-up on a fresh machine: a virtual environment in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint benchmark
demo: .venv/ready
	$(BIN)/python greenmim.py demo

test: .venv/ready
	$(BIN)/python -m pytest -q -m "not slow"

test-all: .venv/ready  # full-size models and the demo on three seeds as well
	$(BIN)/python -m pytest -q --durations=15

lint: .venv/ready
	$(BIN)/ruff check .

benchmark: .venv/ready
	$(BIN)/python -m tests.benchmark

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@
