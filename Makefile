# make demo, make test: on a fresh machine with Python >= 3.11 and make, nothing else to install.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
PIP := -m pip install --disable-pip-version-check --quiet

# Tests in as many processes as there are cores; one that has nothing left takes over what another has not begun.
PYTEST := -m pytest -n logical --maxprocesses 16 --dist worksteal
NORMAL := -m "not slow and not nightly"

# What depends on the instructions that the CPU has, and how an AVX-512 machine is held to AVX2.
VECTORS := tests/test_attend.py tests/test_bias.py tests/test_blocks.py tests/test_dynamic.py tests/test_plan.py tests/test_properties.py \
	tests/test_rows.py tests/test_tiles.py tests/test_tiles_numba.py
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES= NUMBA_CACHE_DIR=$(CURDIR)/runs/numba-avx2

.PHONY: demo see lecture test test-slow test-avx2 test-browser test-all test-latest test-oldest nightly bench bench-gpt wheel docs lint format clean

demo: $(VENV)/installed
	$(RUN) examples/gpt.py $(ARGS)

test: $(VENV)/installed lint  # a few minutes
	$(RUN) $(PYTEST) $(NORMAL)

see: $(VENV)/installed  # the tour: a page that this machine serves, until Ctrl-C
	$(RUN) -m attngraph show --open

lecture: $(VENV)/installed  # every system of the lecture in its quick form, a quarter of an hour: runs/lecture/index.html
	$(RUN) examples/lecture.py $(ARGS)

test-slow: $(VENV)/installed  # what `make test` leaves out: compilers, every family, 500 examples of each law
	HYPOTHESIS_PROFILE=thorough $(RUN) $(PYTEST) -m "(slow or hypothesis) and not nightly"

test-avx2: $(VENV)/installed  # the same numbers without AVX-512; x86 only
	$(AVX2) $(RUN) $(PYTEST) $(NORMAL) -k "not triton" $(VECTORS)

test-browser: $(VENV)/installed  # the page in chromium, which is Debian's: apt-get install chromium
	$(RUN) $(PIP) --constraint constraints.txt --editable '.[browser]'
	$(RUN) -m pytest tests/test_browser.py

test-all: test test-slow test-avx2 test-browser

test-latest:  # the newest release of everything
	$(MAKE) VENV=.venv-latest .venv-latest/bin/python
	.venv-latest/bin/python $(PIP) --upgrade --upgrade-strategy eager --editable '.[tests]'
	.venv-latest/bin/python $(PYTEST) $(NORMAL)

test-oldest:  # the lowest versions that pyproject.toml allows
	$(MAKE) VENV=.venv-oldest .venv-oldest/bin/python
	.venv-oldest/bin/python tests/oldest.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/python $(PIP) --constraint .venv-oldest/constraints.txt --editable '.[tests]'
	.venv-oldest/bin/python $(PYTEST) $(NORMAL)

nightly: $(VENV)/installed  # 20,000 generated examples of each law, and every cell of every sweep
	HYPOTHESIS_PROFILE=nightly $(RUN) $(PYTEST) -m "hypothesis or nightly"

bench: $(VENV)/installed  # dense against sparse on this machine, in ten minutes: runs/bench/report.html
	$(RUN) -m benchmarks $(ARGS)

bench-gpt: $(VENV)/installed
	$(RUN) -m benchmarks.train_gpt $(ARGS)

wheel: $(VENV)/installed  # built, looked into, installed into an empty environment, and its demo run there
	$(RUN) tests/wheel.py

docs: $(VENV)/installed-docs  # the documentation as a site: runs/docs/index.html
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

lint: $(VENV)/installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/basedpyright --pythonpath $(RUN)

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "attngraph needs Python 3.11 or newer: install it, or make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Made once; again only when what is to be installed has changed.
$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(RUN) $(PIP) --constraint constraints.txt --editable '.[tests]'
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(RUN) $(PIP) --constraint constraints.txt --editable '.[docs]'
	@touch $@

clean:
	rm -rf .venv .venv-latest .venv-oldest runs .pytest_cache .ruff_cache .hypothesis
