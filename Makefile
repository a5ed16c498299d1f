PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
MIN_PYTHON := $(shell sed -n 's/^min_python *= *//p' settings.ini)

.PHONY: help venv demo test docs readme clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1~\2/p' $(MAKEFILE_LIST) | awk -F'~' '{printf "%-12s %s\n", $$1, $$2}'

venv: $(READY)  ## make .venv with everything in it (PYTHON=python3.12 to choose one)

demo: $(READY)  ## pre-train on the embedded data on a CPU, probe, draw: a few minutes, into runs/demo
	@# a run that make demo made gives way to the next; any other runs/demo is refused by scott_pretrain
	@[ ! -e runs/demo/.made-by-make-demo ] || rm -rf runs/demo
	@[ -e runs/demo ] || trap 'touch runs/demo/.made-by-make-demo 2>/dev/null' EXIT; \
	  $(BIN)/scott_pretrain --preset demo --out runs/demo
	$(BIN)/scott_probe runs/demo --probes knn,linear
	$(BIN)/scott_visualize runs/demo

# $(call unchanged,FOLDER,PATTERN,COMMAND): COMMAND runs and must leave the FOLDER's files as they were
sums = find $(1) -name '$(2)' ! -path '*/.*' ! -path '*/_proc/*' -exec cksum {} + | sort -k 3
define unchanged
@printf '\n== %s must leave %s/ as it is\n' '$(3)' '$(1)'
@before=$$($(call sums,$(1),$(2))); \
 $(BIN)/$(3) || { echo "FAILED: $(3)"; exit 1; }; \
 after=$$($(call sums,$(1),$(2))); \
 [ "$$before" = "$$after" ] || { echo "FAILED: $(3) changed files in $(1)/ (look at them, then commit them):"; \
  printf '%s\n%s\n' "$$before" "$$after" | sort | uniq -u | awk '{print "  " $$3}' | sort -u; exit 1; }
endef

test: export OMP_NUM_THREADS = 1
test: export MPLBACKEND = agg
test: $(READY)  ## all checks: export, clean, every page, the tests
	$(call unchanged,scott,*.py,nbdev_export)
	$(call unchanged,nbs,*.ipynb,nbdev_clean)
	@printf '\n== nbdev_test: every page runs\n'
	@$(BIN)/nbdev_test --n_workers 2 --timing || { echo 'FAILED: nbdev_test (the pages are named above)'; exit 1; }
	@printf '\n== pytest\n'
	@$(BIN)/python -m pytest -q -rs --tb=short tests || { echo 'FAILED: pytest'; exit 1; }
	@printf '\nAll checks passed.\n'

docs:  ## the site, into _docs/ (needs Quarto)
	@command -v quarto >/dev/null || \
	  { echo 'make docs needs Quarto: install it from https://quarto.org/docs/get-started, then run make docs again' >&2; exit 1; }
	@$(MAKE) readme  # first: nbdev_docs makes a README of its own when this one is older than its page
	PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_docs

readme: $(READY)  ## README.md from nbs/index.ipynb
	$(BIN)/python tests/readme.py

clean:  ## remove what tests and docs leave behind; .venv and runs/ stay
	rm -rf _proc _docs nbs/nbdev.yml nbs/sidebar.yml build dist .pytest_cache
	find . -path ./.venv -prune -o -path ./runs -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -print | xargs rm -rf

$(READY): settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(MIN_PYTHON)".split("."))))' 2>/dev/null || \
	  { echo "scott needs Python $(MIN_PYTHON) or newer, and $(PYTHON) is $$(command -v $(PYTHON) >/dev/null && $(PYTHON) --version 2>&1 || echo missing): try 'make venv PYTHON=python3.12'" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@
