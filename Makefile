# `make demo` and `make test` need only make and Python 3.11 or newer; everything goes into .venv.
# Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

# What pip installs before the package. Without an NVIDIA GPU that is the CPU build of PyTorch: on Linux it lies on PyTorch's
# own index (the default index serves gigabytes of CUDA libraries), unless pip is configured to use indexes of your own.
# With a GPU it is empty: the package's own requirement brings PyTorch with CUDA. Set TORCH_INSTALL to choose yourself.
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
PIP_CONFIGURED := $(shell $(PYTHON) -m pip config list 2>/dev/null)
LINUX := $(filter Linux,$(shell uname -s))
TORCH_INDEX := $(if $(LINUX),$(if $(PIP_CONFIGURED),,--index-url https://download.pytorch.org/whl/cpu))
TORCH_INSTALL ?= torch==2.13.0 $(TORCH_INDEX)
else
TORCH_INSTALL ?=
endif

.PHONY: help demo test lint bench
.DEFAULT_GOAL := help

help: ## what can be made
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST)

demo: $(STAMP) ## several tokens per step with the embedded model: offline, on a CPU
	@$(BIN)/foretell demo

bench: $(STAMP) ## tokens per step and seconds on this machine
	@$(BIN)/foretell bench

# One thread: the tests' models are tiny, and two threads on a busy machine spend their time waiting for each other.
test: export OMP_NUM_THREADS := 1
test: $(STAMP) ## the tests
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: $(STAMP) ## style, formatting, types and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

# The environment: made once, refreshed when pyproject.toml changes. The stamp is written last, so that an interrupted
# installation is taken up again.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "foretell needs Python 3.11 or newer, which '$(PYTHON)' is not; name one, as in: make demo PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments: install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing $(if $(TORCH_INSTALL),$(firstword $(TORCH_INSTALL)) and )foretell with its dependencies into $(VENV): a minute or two, once"
	@$(if $(TORCH_INSTALL),$(PIP) install $(TORCH_INSTALL),:)
	@$(PIP) install -e '.[dev]'
	@touch $@
