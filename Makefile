# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
TAG := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
ifeq ($(TAG),)
$(error PYTHON=$(PYTHON) does not run; name an interpreter of Python 3.11 or newer)
endif
VENV ?= .venv/$(TAG)
BIN := $(VENV)/bin
# Exact versions that were tested; other Pythons resolve freely.
LOCK := $(wildcard constraints/py$(TAG).txt)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix -c ,$(LOCK))
WORKERS ?= 2

PEERS ?= .venv/peers-$(TAG)
.PHONY: demo test test-slow test-peers lint format clean
demo: $(VENV)/ready
	$(BIN)/jaxlab train demo

test: $(VENV)/ready-dev
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not peers"

test-slow: $(VENV)/ready-aot
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

# PyTorch's libraries live in an environment of their own; `make test` needs none of them.
test-peers: $(PEERS)/ready
	JAXLAB_PEER_PYTHON=$(PEERS)/bin/python $(PEERS)/bin/python -m pytest tests/peers tests/test_generate_peers.py

lint: $(VENV)/ready-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/ready-dev
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

clean:
	rm -rf .venv .cache build *.egg-info

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/ready: pyproject.toml $(LOCK) | $(BIN)/python
	@echo "installing into $(VENV) (a minute or two)"
	$(PIP) -e .
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(PIP) -e '.[dev]'
	@touch $@

$(PEERS)/ready: pyproject.toml $(wildcard constraints/peers-py$(TAG).txt)
	$(PYTHON) -m venv $(PEERS)
	@echo "installing PyTorch's side into $(PEERS) (some minutes)"
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check \
		$(addprefix -c ,$(wildcard constraints/peers-py$(TAG).txt)) \
		torch==2.13.0 transformers peft pytest hypothesis scipy -e '.[hf]'
	@touch $@

$(VENV)/ready-aot: $(VENV)/ready-dev
	$(PIP) -e '.[dev,tpu-aot]'
	@touch $@
