# Every target sets up what it needs in .venv and is quick the second time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# What the installation is made from; Python files are used where they lie.
SOURCES := setup.py pyproject.toml $(wildcard $(addprefix bnbp/,*.pxd include/bnbp/*.h* include/bnbp/detail/* engine/*.pyx engine/*.h \
	engine/kernels/*.p* engine/kernels/*.h jax/*.h jax/*.cc torch/*.h torch/*.cc))

.DEFAULT_GOAL := help
.PHONY: help demo test test-torch test-jax test-clusters test-all test-parallel sanitize bench train-bench wheel wheel-check docs site-check site-pictures doxygen chromium lint format clean
.SECONDARY:

# What `make sanitize` does: this many calls, of this seed.
CALLS ?= 20000
SEED ?= 0
SANITIZED := build/sanitized/lib
CXX := c++

# Which pages `make site-pictures` takes pictures of, and where they go.
PAGES ?=
FOLDER ?= docs/_build/pictures
WARNINGS := -std=c++17 -Wall -Wextra -Wconversion -Werror

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 15

demo: $(VENV)/.demo ## train a small network on real images with the operators, show what they did
	$(BIN)/bnbp demo

test: $(VENV)/.test ## run every test that needs no framework
	$(BIN)/pytest

test-torch: $(VENV)/.test $(VENV)/.torch ## run the tests of bnbp.torch, and those beside PyTorch
	$(BIN)/pytest -m torch

test-jax: $(VENV)/.test $(VENV)/.flax ## run the tests of bnbp.jax, and those beside JAX
	OMP_NUM_THREADS=1 $(BIN)/pytest -m jax

test-clusters: $(VENV)/.test $(VENV)/.clusters ## run the tests of bnbp.mpi and bnbp.dask
	$(BIN)/pytest -m cluster

test-all: $(VENV)/.test $(VENV)/.torch $(VENV)/.flax $(VENV)/.clusters ## all of them, also those that need TensorFlow, which you install into .venv
	$(BIN)/pytest -m ""

# The tests of what an operator computes, in parts and as a whole, and refuses. The others are of the arithmetic, which
# has nothing that threads share, or of what there is once in a process.
test-parallel: $(VENV)/.test ## run each test of the operators in four threads at once
	$(BIN)/pytest --parallel-threads=4 $(foreach name,halves operators rules,tests/test_$(name).py)

# With the address sanitiser, in a process that was not built with it; libstdc++ so that it sees C++ exceptions.
sanitize: $(SANITIZED)/.built ## random calls of everything in a build with sanitisers: CALLS=1000000 SEED=1
	find bnbp -name '*.py' -exec cp --parents -t $(SANITIZED) {} +
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" PYTHONMALLOC=malloc \
		PYTHONPATH=$(SANITIZED) UBSAN_OPTIONS=print_stacktrace=1 \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096 \
		sh -c '$(BIN)/python tests/fuzz.py --cpp --calls $(CALLS) --seed $(SEED) && \
			$(BIN)/python tests/fuzz.py --calls $(CALLS) --seed $(SEED)'

bench: $(VENV)/.bench ## measure the operators beside the memory's floor
	$(BIN)/bnbp bench

train-bench: $(VENV)/.train ## measure whole training steps in PyTorch, with and without bnbp; takes an hour
	$(BIN)/bnbp train-bench

wheel: $(VENV)/.wheel ## build the sdist and the wheel into dist/, and test them on every CPython from 3.11 on
	$(BIN)/python tools/wheel.py

wheel-check: $(VENV)/.wheel ## build and check them, and run a few of the tests on this Python alone
	$(BIN)/python tools/wheel.py --quick

# Built anew, because Sphinx leaves the pages of files that are gone.
docs: doxygen $(VENV)/.docs ## build the site into docs/_build/html, run its examples and check its files
	rm -rf docs/_build
	cd docs && doxygen Doxyfile
	$(BIN)/sphinx-build -n -W --keep-going -q -b html docs docs/_build/html
	$(BIN)/sphinx-build -n -W --keep-going -q -b doctest docs docs/_build/doctest
	$(BIN)/python docs/check.py docs/_build/html

site-check: chromium docs $(VENV)/.site ## do that, then look at every page in Chromium: widths, colours, links, search
	$(BIN)/python docs/browse.py docs/_build/html
	$(BIN)/pytest -m site

site-pictures: chromium docs $(VENV)/.site ## save pictures of pages: PAGES="index ops/in_parts" FOLDER=/tmp/pictures
	$(BIN)/python docs/browse.py docs/_build/html --pictures $(FOLDER) $(PAGES)

doxygen:
	@command -v doxygen >/dev/null || { echo "make $(MAKECMDGOALS) needs Doxygen (Debian: apt-get install doxygen)"; exit 1; }

chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
		{ echo "make $(MAKECMDGOALS) needs Chromium (Debian: apt-get install chromium)"; exit 1; }

lint: $(VENV)/.lint ## style and types: ruff, cython-lint, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint bnbp
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy
	for level in x86-64 $(if $(filter x86_64,$(shell uname -m)),x86-64-v3 x86-64-v4); do \
		$(CXX) $(WARNINGS) $(if $(filter x86_64,$(shell uname -m)),-march=$$level) -fopenmp -DCYTHON_INLINE=inline \
			-fsyntax-only -x c++ -include bnbp/engine/kernels/bounds.h /dev/null || exit 1; \
	done

format: $(VENV)/.lint ## put the code into the form that lint expects
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info docs/_build
	find bnbp -name "*.so" -o -name "*.c" -o -name "*.cpp" | xargs rm -f

CPP := $(wildcard bnbp/engine/*.h bnbp/engine/kernels/*.h bnbp/jax/*.h bnbp/jax/*.cc bnbp/torch/*.h bnbp/torch/*.cc bnbp/include/bnbp/*.h* bnbp/include/bnbp/detail/* tests/cpp/* docs/examples/*.cpp)

# The package itself, compiled, and then what one of its extras asks for.
$(VENV)/.core: $(SOURCES) | $(BIN)/python
	@command -v c++ >/dev/null || { echo "bnbp needs a C++ compiler (Debian: apt-get install g++)"; exit 1; }
	@find bnbp -name "*.so" -delete # a module for one version of Python would be taken before the new one for all
	$(BIN)/pip install --quiet --editable .
	@touch $@

# The same with sanitisers, apart from it, and the C++ caller that makes random calls.
$(SANITIZED)/.built: $(SOURCES) tests/cpp/fuzz.cpp | $(VENV)/.test
	BNBP_SANITIZE=1 BNBP_LEVELS="$$($(BIN)/python -c 'import bnbp; print(bnbp.show_config("dicts")["isa"]["used"])')" \
		$(BIN)/python setup.py --quiet build --build-base build/sanitized --build-lib $(SANITIZED)
	$(CXX) $(WARNINGS) -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer \
		-fPIC -shared -Ibnbp/include \
		-I$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))') tests/cpp/fuzz.cpp \
		-o $(SANITIZED)/fuzz_cpp$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
	@touch $@

# The tools for the wheel need no package in place: what the system lacks is said before anything is compiled.
$(VENV)/.wheel: pyproject.toml | $(BIN)/python
	$(BIN)/python -c 'import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
		print(*extras["wheel"], sep="\n")' > $(VENV)/wheel.txt
	$(BIN)/pip install --quiet --requirement $(VENV)/wheel.txt
	@touch $@

$(VENV)/.%: $(VENV)/.core pyproject.toml
	$(BIN)/pip install --quiet 'bnbp[$*]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "bnbp needs Python 3.11 or later; name one with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
