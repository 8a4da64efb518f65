# Each target makes .venv when there is none. PIP_ARGS is handed to pip, e.g. PIP_ARGS="--index-url …".
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-compose test-netem fuzz check proto clean

demo: $(VENV)/.demo
	$(BIN)/python deploy/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -rs -n 2 --dist loadfile $(TESTS)

# BASE, TORCH_INDEX and BUILD_NETWORK go to the build (see docker-compose.yml); COMPOSE is the command, if not found.
test-compose: $(VENV)/.dev
	$(BIN)/python -m pytest -rs --compose tests/compose

# All links, routes and events (make test has a few), as root: see docs/networks.md.
test-netem: $(VENV)/.dev
	$(BIN)/python -m pytest -rs --netem tests/netem

fuzz: $(VENV)/.fuzz  # every parser of strangers' bytes, FUZZ="TARGET… --seconds N" for some of them or for longer
	PYTHONPATH=tests $(BIN)/python tests/fuzz/run.py $(FUZZ)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

proto: $(VENV)/.dev  # after a change of split.proto
	$(BIN)/python -m grpc_tools.protoc -I. --plugin=$(BIN)/protoc-gen-mypy --python_out=. --mypy_out=. \
	    protocol/split.proto

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt split_model/native.c
	$(BIN)/pip install -q $(PIP_ARGS) -c constraints.txt -e ".[cloud]"
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt split_model/native.c
	$(BIN)/pip install -q $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.demo

$(VENV)/.fuzz: $(VENV)/.dev
	$(BIN)/pip install -q $(PIP_ARGS) -c constraints.txt -e ".[fuzz]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info split_model/*.so
