# `make demo` and `make test` do all the set-up they need on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Tests start hundreds of interpreters: none should have to compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test slow check format bench clean

help:
	@echo "make demo    set up, then train eight peer processes on this machine (about a minute)"
	@echo "make test    set up, then run the tests"
	@echo "make slow    run the long tests: many seeds, many processes"
	@echo "make check   style, types, import order"
	@echo "make bench   the benchmarks"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/p2pfl run digits --on local

# Tests that start processes would take ports and time from each other: they run by themselves.
test: $(READY)
	$(BIN)/python -m pytest -m "processes and not slow"
	$(BIN)/python -m pytest -m "not processes and not slow" -n 2 --dist loadfile

slow: $(READY)
	$(BIN)/python -m pytest -m slow

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python scripts/benchmarks/peers.py
	$(BIN)/python scripts/benchmarks/simulation.py --repeats 3
	$(BIN)/python scripts/benchmarks/mixing.py
	$(BIN)/python scripts/benchmarks/emulator.py --models mlp --repeats 3
	$(BIN)/python scripts/benchmarks/distributed.py
	$(BIN)/python scripts/benchmarks/wire.py
	$(BIN)/python scripts/benchmarks/detection.py --seeds 10 --hours 10
	$(BIN)/python scripts/benchmarks/kills.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
