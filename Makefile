# SPDX-License-Identifier: Apache-2.0
# `make train` trains the example, `make test` checks everything; both set up .venv first where that is due.

PYTHON ?= python3
VENV := .venv/bin/python

.PHONY: train test check gpu clean

train: .venv/installed
	$(VENV) -m examples.train

# pytest comes last, so that its table of clauses closes the output.
test: check
	$(VENV) -m pytest

check: .venv/installed
	$(VENV) -m ruff check
	$(VENV) -m ruff format --check
	$(VENV) -m pyright

# In the Python that is there, since a CUDA build of torch is nothing to install twice.
gpu:
	$(PYTHON) -m pytest conformance tests --gpu

# Byte code is left to the first import of a module: torch has thousands that are never imported.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
