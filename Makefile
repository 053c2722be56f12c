# make tune | test | test-gpu | test-all | lint | docs | bench | clean
# Needs Python 3.11+, gcc and make; everything else goes into $(VENV). A second run of a target does only its own work.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
WORKERS ?= 2
TUNE ?=
PIP_INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt
SPELLED_OUT = pyproject.toml constraints.txt Makefile
# One thread a worker: the suite's workers share the cores.
TEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help tune test test-gpu test-all lint docs bench chromium clean

help:
	@echo "make tune      install into $(VENV), tune the bundled digits job, show the answer and its report"
	@echo "make test      install what the tests need too, and run the suite"
	@echo "make test-gpu  the tests that need a GPU (BATCHLAB_TEST_DEVICE=cpu tries them without one)"
	@echo "make test-all  the same with the slow tests"
	@echo "make lint      ruff, mypy --strict, import contract, trust rules"
	@echo "make docs      build the documentation into docs/_build/html, warnings as errors"
	@echo "make bench     every benchmark, each against its peer"

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "batchlab needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(SPELLED_OUT) | $(VENV)/bin/python
	$(PIP_INSTALL) -e .
	@touch $@

# The curvature extra, and PyHessian to compare with, without torchvision: they ask for it, none loads it, and it has no
# CPU build here.
CURVATURE = curvlinops-for-pytorch backpack-for-pytorch PyHessian
CURVATURE_NEEDS = einconv einops linear_operator opt-einsum tqdm unfoldNd

$(VENV)/installed-dev: $(SPELLED_OUT) | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[dev,docs,hf,lightning,energy]' $(CURVATURE_NEEDS)
	$(PIP_INSTALL) --no-deps $(CURVATURE)
	@touch $@ $(VENV)/installed

tune: $(VENV)/installed
	$(VENV)/bin/batchlab tune digits $(TUNE)

test: $(VENV)/installed-dev chromium
	$(TEST) -m "not slow and not gpu"

test-gpu: $(VENV)/installed-dev
	$(TEST) -m gpu

test-all: $(VENV)/installed-dev chromium
	$(TEST) -m "not gpu"

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python scripts/lint_trust.py src

docs: $(VENV)/installed-dev
	$(VENV)/bin/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "documentation: docs/_build/html/index.html"

bench: $(VENV)/installed-dev
	@for script in benchmarks/*.py; do echo "== $$script"; $(VENV)/bin/python $$script || exit 1; done

chromium:
	@scripts/install_chromium

clean:
	rm -rf $(VENV) docs/_build build dist
