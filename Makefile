# lora-kit: set-up, the demo, the tests. `make help` lists the targets.

VENV ?= .venv
# The torch to install first, as pip arguments: TORCH="torch==2.13.0". Empty: whatever pip picks in
# the range of pyproject.toml, or what the environment already has.
TORCH ?=
# Further arguments of pytest: make test ARGS="-x tests/test_recipe.py".
ARGS ?=
# Files of tests are shared out to the cores, up to four: each holds a model. SHARED_OUT= runs them one by one, as -s
# and --pdb want it.
SHARED_OUT ?= -n auto --maxprocesses 4 --dist loadfile
# The first interpreter that is new enough; 3.11, which the tests run on, is asked first.
ifndef PYTHON
PYTHON := $(shell for python in python3.11 python3 python3.12 python3.13 python3.14; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$python"; break; }; done)
endif

# Recipes read TORCH from the environment, so that "torch>=2.6" is never a redirection.
export TORCH
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

# Another TORCH than the one installed for: install again, although pyproject.toml has not changed.
ifneq ($(strip $(TORCH)),)
ifneq ($(strip $(TORCH)),$(strip $(shell cat $(VENV)/.torch 2>/dev/null)))
CHANGED_TORCH := changed-torch
endif
endif

.DEFAULT_GOAL := help
.PHONY: help demo install install-dev test test-fast lint docs clean changed-torch

help:
	@echo 'make demo         install if needed, then train, merge, quantize, measure and score the default model'
	@echo 'make test         install what tests need, then run all of them'
	@echo 'make test-fast    the same without the real model'
	@echo 'make install      $(VENV) with lora-kit and what it stands on; nothing compiles'
	@echo 'make install-dev  that, with pytest, ruff and llama-cpp-python (compiles: 3 to 4 minutes on two cores)'
	@echo 'make lint         ruff'
	@echo 'make docs         write the generated parts of docs/, README.md and recipes/recipe.schema.json again'
	@echo 'make clean        remove build outputs and caches; runs/ and $(VENV) stay'
	@echo
	@echo 'PYTHON=python3.12          the interpreter to build $(VENV) with (3.11 or newer)'
	@echo 'TORCH="torch==2.13.0"      the torch to install, as pip arguments. Without it pip picks one: on Linux that'
	@echo '                           is the CUDA build of several GB, on a Mac the small one with MPS. For a Linux'
	@echo '                           machine without an NVIDIA GPU name the CPU build: TORCH="torch --index-url URL",'
	@echo '                           with the URL that the installation page of pytorch.org gives for CPU.'
	@echo 'ARGS="-x -k recipe"        further arguments of pytest'
	@echo 'SHARED_OUT=                test files one by one, not shared out to the cores (pytest-xdist)'

demo:
	@start=$$(date +%s); \
	$(MAKE) --no-print-directory install || exit $$?; \
	installed=$$(date +%s); code=0; \
	$(VENV)/bin/lora-kit run recipes/chat.yaml || code=$$?; \
	echo "installation $$((installed - start)) s, main job $$(($$(date +%s) - installed)) s"; \
	exit $$code

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

$(VENV)/.created:
	@[ -n "$(PYTHON)" ] || { \
		echo "make: no Python 3.11 or newer; install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "make: $(PYTHON) is no Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "make: $(PYTHON) lacks venv or ensurepip; install them (Debian, Ubuntu: apt install python3-venv)" >&2; \
		exit 1; }
	"$(PYTHON)" -m venv "$(VENV)"
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.created $(CHANGED_TORCH)
	@if [ -n "$$TORCH" ]; then \
		echo "$(PIP) install $$TORCH"; $(PIP) install $$TORCH && printf '%s\n' "$$TORCH" > "$(VENV)/.torch"; \
	elif [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null && ! $(PIP) show -q torch 2>/dev/null; then \
		echo "make: no NVIDIA GPU seen, and pip's own torch is a CUDA build of several GB; 'make help' says how" \
			"to take another with TORCH=... Going on."; \
	fi
	$(PIP) install --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@for compiler in "$${CXX:-c++}" g++ clang++; do command -v "$$compiler" >/dev/null && exit 0; done; \
		echo "make: no C++ compiler for llama-cpp-python; install g++ (Debian, Ubuntu: apt install g++; Mac:" \
			"xcode-select --install), or use 'make install', which needs none" >&2; exit 1
	$(PIP) install --editable '.[dev]'
	$(PIP) install --no-deps --upgrade --target "$(VENV)/apart" "$$("$(VENV)/bin/python" -m tests.apart)"
	@touch $@

test: install-dev
	$(VENV)/bin/python -m tests.fetch
	$(VENV)/bin/python -m pytest $(SHARED_OUT) $(ARGS)

test-fast: install-dev
	$(VENV)/bin/python -m tests.fetch --archives-only
	$(VENV)/bin/python -m pytest -m 'not real_model' $(SHARED_OUT) $(ARGS)

lint: install-dev
	$(VENV)/bin/ruff check .

docs: install
	$(VENV)/bin/python docs/build.py --write

clean:
	rm -rf build dist .pytest_cache .ruff_cache *.egg-info
	find lora_kit tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
