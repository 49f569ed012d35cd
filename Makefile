# Every target makes its own virtual environment: a fresh machine needs Python >= 3.11 and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all,test]"
	touch $@

.PHONY: quickstart test test-all check bench clean

quickstart: $(VENV)/.installed
	$(BIN)/fedlora quickstart

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Tiny tensors: two processes of one thread each; and nothing may reach for a model hub.
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2

test: check
	$(PYTEST) -m "not slow"

# A file's tests stay together: some are a story (machines that are set up once, clusters that share a host).
test-all: check
	$(PYTEST) --dist loadfile

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) runs
