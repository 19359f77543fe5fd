# SPDX-License-Identifier: Apache-2.0
# `make train` trains the example, `make test` checks everything; both set up .venv first where that is due.

PYTHON ?= python3
VENV := .venv/bin/python

# Byte code is kept, also where the environment says otherwise: without it, each of the suite's processes spends seconds
# compiling torch anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test check mutants coverage gpu clean

train: .venv/installed
	$(VENV) -m examples.train

# pytest comes last, so that its table of clauses closes the output. A process for each core; a file's tests stay together.
test: check
	OMP_NUM_THREADS=1 $(VENV) -m pytest -n auto --dist loadscope --no-loadscope-reorder

# Every wrong optimizer of tests/mutants, against the clauses that should notice; minutes, and a page in runs.
mutants: .venv/installed
	OMP_NUM_THREADS=1 $(VENV) -m tests.mutants

coverage: .venv/installed
	OMP_NUM_THREADS=1 $(VENV) -m pytest -n auto --dist loadscope --no-loadscope-reorder --ignore=tests/test_mutants.py \
		--cov=impl --cov=reference --cov-report=term-missing:skip-covered

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
