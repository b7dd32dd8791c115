# Every target sets up what it needs: a virtual environment in .venv with the pinned requirements.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/digits
SETUP := $(VENV)/.ready

.PHONY: run test lint bench peers clean

run: $(SETUP)
	$(BIN)/python -m experiments.run --config=configs/digits.py --workdir=$(WORKDIR)

test: $(SETUP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(SETUP)
	$(BIN)/python -m experiments.bench --out=runs/bench

# Every named model against timm itself; torch and timm go into the same environment.
peers: $(SETUP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(shell grep -o '^torch==.*' requirements-peers.txt) $(shell grep -o '^pyyaml==.*' requirements-peers.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-peers.txt
	$(BIN)/python -m pytest tests/peers tests/convert

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# Bytecode is written where it is first needed: compiling all of it takes as long as installing.
$(SETUP): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $(SETUP)
