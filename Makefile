# make install: .venv with everything a user needs; make demo: kill a run and prove that it did not matter;
# make test: all checks; make simulate: 10,000 lives of a run on a virtual store; make mutants: do the tests notice
# mistakes?
# Another interpreter: make install PYTHON=/path/to/python3.11
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check --quiet -c constraints.txt
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 /usr/bin/python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
CODE := $(wildcard orchestrator trainers tests bench)

.PHONY: install demo test simulate mutants bench lint clean

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(PY) -m orchestrator.demo

# Two at once, as much of it is waiting; a file's tests stay together, as they share what is expensive to make. The order
# is conftest's: what takes long begins first.
WORKERS ?= 2
test: lint
	$(PY) -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder

SEEDS ?= 10000
simulate: $(VENV)/.installed-test
	UNBROKEN_SIMULATION_SEEDS=$(SEEDS) $(PY) -m pytest tests/orchestrator/checkpoint/test_simulation.py -k violates

mutants: $(VENV)/.installed-test
	$(PY) -m tests.mutants

bench: $(VENV)/.installed-bench
	$(PY) -m bench

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff format --check $(CODE)
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/basedpyright --pythonpath $(PY)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(PY):
	@if [ -z "$(PYTHON)" ]; then echo "error: found no Python >= 3.11 with the venv module; on Debian:" \
		"apt-get install python3.11-venv, or make install PYTHON=/path/to/python3.11" >&2; exit 1; fi
	$(PYTHON) -m venv $(VENV)

# Stamp files: a second call installs nothing unless the requirements changed.
$(VENV)/.installed: pyproject.toml constraints.txt | $(PY)
	@echo "installing into $(VENV) (torch and ray are large: a minute or two) ..."
	$(PIP_INSTALL) -e '.[quickstart]'
	@touch $@
	@echo "done; next: make demo, or source $(VENV)/bin/activate && unbroken --help"

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP_INSTALL) -e '.[quickstart,test]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed-test
	$(PIP_INSTALL) -e '.[quickstart,test,bench]'
	@touch $@
