# Two commands, `make demo` and `make test`, and `make bench` for speed and `make docs` for the site. Each sets itself up
# in .venv on a bare Python 3.11+ machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# What make test-quick runs: the mathematics, and which folder may import which.
QUICK := tests/test_architecture.py tests/test_contract.py tests/test_hints.py tests/outer tests/learners \
	tests/data/test_episodes.py tests/data/test_glyphs.py

.PHONY: help demo test test-quick lint peers bench docs clean

help:
	@echo "make demo    train, judge and compare MAML and TA-MAML on built-in data (minutes)"
	@echo "make test    ruff, mypy and all tests"
	@echo "make test-quick  ruff and the tests of the mathematics, in less than a minute: for while you work"
	@echo "make bench   speed beside other libraries, into runs/bench: half an hour (make bench ARGS=--quick)"
	@echo "make docs    the site, into site/: warnings are errors, and no page loads anything from the network"
	@echo "make peers   the other libraries that the examples run inside (make test and make bench do it too)"

demo: $(VENV)/.installed
	$(BIN)/metaheed demo

test: $(VENV)/.installed-dev lint peers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

# mypy is left out: without its cache it takes longer than these tests.
test-quick: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow" $(QUICK)

bench: $(VENV)/.installed-dev peers
	$(BIN)/python -m benchmarks.speed $(ARGS)

# The build itself needs no network: it fetches nothing, and fails where a page would.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and alone: its pinned version is the CPU build where one is at hand, and nothing after it changes it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "metaheed needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --editable '.[docs]'
	touch $@

# Without dependencies, so that none of them changes torch. One that cannot be had (no network, no wheel for this Python)
# is no failure: its tests are skipped, and the next call tries again. learn2learn is packed by our own build backend,
# which the path puts before setuptools; uncached, so that no other project of the user is given that small wheel.
peers: $(VENV)/.peers

$(VENV)/.peers: benchmarks/peers.txt $(wildcard benchmarks/learn2learn/* benchmarks/learn2learn/setuptools/*) | $(VENV)/.installed-dev
	@complete=yes; \
	for peer in $$(grep '^[a-z]' benchmarks/peers.txt); do \
		$(PIP) --retries 1 --no-deps --only-binary :all: "$$peer" || complete=no; \
	done; \
	PYTHONPATH="$(CURDIR)/benchmarks/learn2learn" $(PIP) --retries 1 --no-deps --no-cache-dir --use-pep517 \
		--no-build-isolation --requirement benchmarks/learn2learn/requirements.txt || complete=no; \
	if [ $$complete = yes ]; then touch $@; else echo "some peers are missing: the tests of their examples are skipped, and make bench shows them as missing"; fi

clean:
	rm -rf $(VENV) build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
