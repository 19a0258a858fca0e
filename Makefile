# make demo, make test: on a fresh machine with Python >= 3.11 and make, nothing else to install.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test bench wheel lint format nightly bench-gpt clean

demo: $(VENV)/installed
	$(RUN) examples/gpt.py $(ARGS)

test: $(VENV)/installed lint
	$(RUN) -m pytest -n auto

bench: $(VENV)/installed  # dense against sparse on this machine, in ten minutes: runs/bench/report.html
	$(RUN) -m benchmarks $(ARGS)

wheel: $(VENV)/installed  # built, installed into an empty environment, and its demo run there
	$(RUN) tests/wheel.py

lint: $(VENV)/installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/lint-imports --no-logo

nightly: $(VENV)/installed  # 20,000 generated examples of each law
	HYPOTHESIS_PROFILE=nightly $(RUN) -m pytest -n auto tests/test_properties.py

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

bench-gpt: $(VENV)/installed
	$(RUN) -m benchmarks.train_gpt $(ARGS)

# Made once; again only when what is to be installed has changed.
$(VENV)/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "attngraph needs Python 3.11 or newer: install it, or make PYTHON=/path/to/python"; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check --quiet --editable '.[tests]'
	@touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
