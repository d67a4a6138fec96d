# Every target sets up what it needs in .venv and is quick the second time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# What the installation is made from; Python files are used where they lie.
SOURCES := setup.py pyproject.toml $(wildcard bnbp/*.pyx bnbp/*.pxd bnbp/_machine.h bnbp/include/bnbp/*)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench wheel docs lint format clean
.SECONDARY:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/.demo ## train a small network on real images with the operators, show what they did
	$(BIN)/bnbp demo

test: $(VENV)/.test ## run every test that needs no framework
	$(BIN)/pytest

test-all: $(VENV)/.test ## those too that need PyTorch, TensorFlow and JAX, which you install into .venv
	$(BIN)/pytest -m ""

bench: $(VENV)/.bench ## measure the operators beside the memory's floor
	$(BIN)/bnbp bench

wheel: $(VENV)/.wheel ## build the sdist and the wheel into dist/, and test them on every CPython from 3.11 on
	$(BIN)/python tools/wheel.py

docs: $(VENV)/.docs ## build the operator reference into docs/_build/html and check it
	@command -v doxygen >/dev/null || { echo "make docs needs Doxygen (Debian: apt-get install doxygen)"; exit 1; }
	cd docs && doxygen Doxyfile
	$(BIN)/sphinx-build -n -W --keep-going -q -b html docs docs/_build/html
	$(BIN)/sphinx-build -n -W --keep-going -q -b doctest docs docs/_build/doctest
	$(BIN)/python docs/check.py docs/_build/html

lint: $(VENV)/.lint ## style and types: ruff, cython-lint, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint bnbp
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/.lint ## put the code into the form that lint expects
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info bnbp/*.so bnbp/*.c bnbp/*.cpp docs/_build

CPP := $(wildcard bnbp/_machine.h bnbp/include/bnbp/* tests/cpp/* docs/examples/*.cpp)

# The package itself, compiled, and then what one of its extras asks for.
$(VENV)/.core: $(SOURCES) | $(BIN)/python
	@command -v c++ >/dev/null || { echo "bnbp needs a C++ compiler (Debian: apt-get install g++)"; exit 1; }
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.%: $(VENV)/.core pyproject.toml
	$(BIN)/pip install --quiet 'bnbp[$*]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "bnbp needs Python 3.11 or later; name one with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
