PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
MIN_PYTHON := $(shell sed -n 's/^min_python *= *//p' settings.ini)

OLDEST := $(shell sed -n 's/^requirements *=.*\btorch>=\([0-9.]*\).*/\1/p' settings.ini)

.PHONY: help venv demo test test-slow compat docs readme exercises clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1~\2/p' $(MAKEFILE_LIST) | awk -F'~' '{printf "%-14s %s\n", $$1, $$2}'

venv: $(READY)  ## make .venv with everything in it (PYTHON=python3.12 to choose one)

demo: $(READY)  ## pre-train on drawn flowers on a CPU, probe, draw, compare with a finished encoder: minutes, into runs/demo
	@# a finished run that make demo made gives way to the next, an unfinished one goes on; any other runs/demo is refused
	@[ ! -e runs/demo/.made-by-make-demo ] || { [ -e runs/demo/checkpoint.pt ] && [ ! -e runs/demo/probe_petals.json ]; } || rm -rf runs/demo
	@if [ -e runs/demo/.made-by-make-demo ]; then $(BIN)/scott_pretrain --preset demo --out runs/demo --resume; else \
	  [ -e runs/demo ] || trap 'touch runs/demo/.made-by-make-demo 2>/dev/null' EXIT; \
	  $(BIN)/scott_pretrain --preset demo --out runs/demo; fi
	$(BIN)/scott_probe runs/demo --probes knn,linear
	$(BIN)/scott_visualize runs/demo --beside petals-demo
	$(BIN)/python -m scott.lab.demo runs/demo

test: $(READY)  ## all quick checks: export, clean, every page, the tests; in less than 15 minutes
	$(BIN)/python tests/check.py

test-slow: $(READY)  ## what is long by nature: whole runs, kills by the hundred, several processes
	$(BIN)/python tests/check.py slow

compat:  ## the pages with the oldest supported PyTorch, in .venv-compat (PYTHON as for venv; downloads it)
	$(PYTHON) -m venv .venv-compat
	.venv-compat/bin/python -m pip install -q "torch==$(OLDEST).*" torchvision -e '.[dev]'
	.venv-compat/bin/nbdev_test --n_workers 2 --timing

docs:  ## the site, into _docs/ (needs Quarto)
	@command -v quarto >/dev/null || \
	  { echo 'make docs needs Quarto: install it from https://quarto.org/docs/get-started, then run make docs again' >&2; exit 1; }
	@$(MAKE) readme  # first: nbdev_docs makes a README of its own when this one is older than its page
	$(BIN)/python tests/llms.py
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=tests nbdev_docs

readme: $(READY)  ## README.md from nbs/index.ipynb
	$(BIN)/python tests/readme.py

exercises: $(READY)  ## nbs/exercises from nbs/solutions, what the checks know of usual mistakes, and the figures for a class
	$(BIN)/nbdev_export
	$(BIN)/python tests/exercises.py
	$(BIN)/python tests/figures.py

clean:  ## remove what tests and docs leave behind; .venv and runs/ stay
	rm -rf _proc _docs nbs/nbdev.yml nbs/sidebar.yml nbs/llms.txt build dist .pytest_cache
	find . -path ./.venv -prune -o -path ./runs -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -print | xargs rm -rf

$(READY): settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(MIN_PYTHON)".split("."))))' 2>/dev/null || \
	  { echo "scott needs Python $(MIN_PYTHON) or newer, and $(PYTHON) is $$(command -v $(PYTHON) >/dev/null && $(PYTHON) --version 2>&1 || echo missing): try 'make venv PYTHON=python3.12'" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@
