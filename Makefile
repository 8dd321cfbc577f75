# What one does with this project; `make` alone says it.
# Needed: Python 3.11 or newer with venv, and nothing else. Another Python: make PYTHON=/path/to/python3

VENV ?= .venv
SUITABLE = import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c '$(SUITABLE)' 2>/dev/null && { command -v $$python; break; }; done)
INSTALLED = $(VENV)/installed

.PHONY: help install test demo lint clean
.DEFAULT_GOAL := help

help: ## say what can be made
	@sed -n 's/^\([a-z]*\):.*## /make \1	/p' Makefile | expand -t 16

install: $(INSTALLED) ## make .venv with deerml and all that it is developed with; the first time takes minutes

test: $(INSTALLED) ## run every notebook and test; ARGS="--slow" also runs what takes long
	$(VENV)/bin/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

demo: $(INSTALLED) ## run the whole loop on a simulated yard; ARGS="--seed 3" for another one
	$(VENV)/bin/deerml demo $(ARGS)

lint: $(INSTALLED) ## check the style of notebooks, package and tests
	$(VENV)/bin/ruff check .

clean: ## remove what was made here, .venv included
	rm -rf $(VENV) build dist *.egg-info .coverage .coverage.* .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp, so that the second time is instant. What is said in these files decides what is installed.
$(INSTALLED): settings.ini setup.py pyproject.toml tools/install.py
	@"$(PYTHON)" -c '$(SUITABLE)' 2>/dev/null || { \
		echo "deerml needs Python 3.11 or newer with venv$(if $(PYTHON),; $(PYTHON) is not that)."; \
		echo "On Debian and Ubuntu: sudo apt install python3-venv. Or name one: make PYTHON=/path/to/python3"; exit 1; } >&2
	@"$(PYTHON)" tools/install.py $(VENV)
	@touch $@
