# Everything from a fresh clone, on a CPU, without a model hub: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
LMMS := .venv-lmms
# An environment is fresh while the files that say what belongs into it are unchanged.
INSTALLED := $(VENV)/installed-$(shell cat setup.cfg pyproject.toml | cksum | cut -d' ' -f1)
INSTALLED_OLDEST := $(OLDEST)/installed-$(shell cat setup.cfg pyproject.toml constraints/oldest.txt | cksum | cut -d' ' -f1)
INSTALLED_LMMS := $(LMMS)/installed-$(shell cat setup.cfg pyproject.toml | cksum | cut -d' ' -f1)
STARTED := $(shell date +%s)
ARGS ?=
# One thread a process: tests run in two processes, and sums come out the same on every machine.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-lmms coverage drill soak check format clean

help:
	@echo "make demo      tune and score a small model on drawn scenes, then write a report (about a quarter of an hour)"
	@echo "make test      the test suite"
	@echo "make test-all  every test, line coverage, and the suite on the oldest supported versions"
	@echo "make test-lmms lmms-eval's command line over small tasks, in an environment of its own (some gigabytes)"
	@echo "make drill     what a run survives: a hundred kills, lost processes, full disks (under an hour)"
	@echo "make soak      whether a long run holds on to memory or files (half an hour)"
	@echo "make check     ruff, formatting, types"
	@echo "make format    let ruff mend what it can"
	@echo "make clean     remove the environments and everything that was built"

install: $(INSTALLED)

$(INSTALLED):
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@rm -f $(VENV)/installed-* && touch $@
	@echo "installed in $$(( $$(date +%s) - $(STARTED) )) s"

demo: $(INSTALLED)
	@started=$$(date +%s); $(BIN)/qformer demo $(ARGS) && now=$$(date +%s) && \
	echo "demo: $$(( now - started )) s after installation, $$(( now - $(STARTED) )) s in all"

test: $(INSTALLED)
	$(PYTEST) $(ARGS)

# Subprocesses are counted: coverage patches them (see [coverage:run] in setup.cfg).
coverage: $(INSTALLED)
	rm -f .coverage .coverage.*
	OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest -n 2 --dist worksteal $(ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --fail-under=90

$(INSTALLED_OLDEST):
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints/oldest.txt -e '.[dev]'
	@rm -f $(OLDEST)/installed-* && touch $@

test-all: $(INSTALLED) $(INSTALLED_OLDEST)
	$(MAKE) coverage ARGS='-m "slow or not slow"'
	# Old releases warn of their own old habits: there a warning is no error.
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist worksteal -W default

# lmms-eval brings some 160 packages and exact versions (of wandb, of av): it never shares .venv.
$(INSTALLED_LMMS):
	@test -x $(LMMS)/bin/python || $(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[lmms]' 'pytest>=8.4' 'pytest-timeout>=2.4'
	@rm -f $(LMMS)/installed-* && touch $@

test-lmms: $(INSTALLED_LMMS)
	OMP_NUM_THREADS=1 $(LMMS)/bin/python -m pytest -W default tests/lmms/command_line.py $(ARGS)

drill: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.drill $(ARGS)

soak: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) $(LMMS) build dist ./*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
