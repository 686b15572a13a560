# `make demo` and `make test` are all a newcomer needs: both make .venv and get what they need by themselves.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := $(shell find mra_export/plugins mra_export/embed -type f -not -name '*.py' -not -path '*/examples/*')
OLD := .downloads
NVCC := nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl nvidia-cuda-crt nvidia-nvvm

.PHONY: help demo test test-heavy lint format bench clean
help: ## This list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/:/' | column -t -s:

.venv/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"{sys.executable} is Python {v[0]}.{v[1]}: mra_export needs 3.10 or newer, pass another as make PYTHON=python3.12") if v < (3, 10) else None'
	@echo "Making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv 2>/dev/null || { rm -rf .venv build/virtualenv; \
	  $(PYTHON) -m pip install --quiet --target build/virtualenv virtualenv && PYTHONPATH=build/virtualenv $(PYTHON) -m virtualenv --quiet .venv; } || \
	  { rm -rf .venv; echo "$(PYTHON) can make no virtual environment: install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }

# The torch pin goes first and alone: a plain `torch` asked for by another package may pull a CUDA build of several gigabytes.
.venv/packages: .venv/pyvenv.cfg pyproject.toml constraints.txt
	@echo "Installing the Python packages (a few minutes the first time)"
	@$(PIP) install -c constraints.txt torch
	@$(PIP) install -c constraints.txt "scikit-build-core>=0.10" "cmake>=3.22" ninja
	@touch $@

# What the TensorRT plugin is built with and tested against. It is optional: where something cannot be had, the rest goes on without.
.venv/tensorrt: .venv/packages mra_export/plugins/tensorrt/fetch_headers.py
	@echo "Fetching what TensorRT engines need (optional)"
	@$(BIN)/python mra_export/plugins/tensorrt/fetch_headers.py || echo "No TensorRT headers: the plugin is left out"
	@{ command -v nvcc || command -v "$${CUDACXX:-none}" || command -v /usr/local/cuda/bin/nvcc; } >/dev/null || $(PIP) install -c constraints.txt $(NVCC) || echo "No CUDA compiler: the plugin is left out"
	@$(PIP) install -c constraints.txt tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings && \
	  $(PIP) install -c constraints.txt --no-build-isolation --no-deps tensorrt-rtx-cu13 || echo "No TensorRT-RTX: engines are left out"
	@touch $@

.venv/installed: .venv/packages .venv/tensorrt $(SOURCES)
	@echo "Building the op libraries and installing mra_export"
	@export CUDACXX="$${CUDACXX:-$$(ls "$(CURDIR)"/.venv/lib/python*/site-packages/nvidia/cu13/bin/nvcc 2>/dev/null)}"; \
	  [ -n "$$CUDACXX" ] || unset CUDACXX; $(PIP) install -c constraints.txt --no-build-isolation --editable ".[dev]"
	@touch $@

demo: .venv/installed ## From the shipped checkpoint to a verified bundle, on real text.
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

test: .venv/installed $(OLD)/onnxruntime $(OLD)/transformers ## Every test but those of test-heavy.
	@MRA_TEST_ORT_OLD="$(CURDIR)/$(OLD)/onnxruntime" MRA_TEST_TRANSFORMERS_OLD="$(CURDIR)/$(OLD)/transformers" \
	  $(BIN)/python -m pytest -n 2 --dist worksteal -m "not heavy" $(PYTEST_ARGS)

test-heavy: .venv/installed $(OLD)/triton $(OLD)/ray $(OLD)/manifests $(OLD)/actionlint $(OLD)/onnxruntime-gpu $(OLD)/onnxruntime-aarch64 ## Real servers on loopback (Triton, Ray Serve), deployment files by their schemas, and onnxruntime-gpu.
	@$(BIN)/python -m pytest -m heavy $(PYTEST_ARGS)

# Old releases that the tests run against, each in a folder of its own. Without a network those tests skip and say so.
$(OLD)/%: tests/old/%.txt .venv/packages
	@echo "Fetching the old $* that the tests also run against"
	@rm -rf $@ && $(PIP) install --target $@ -r $< && touch $@ || { rm -rf $@; echo "No old $* here: its tests will be skipped"; }

# What the heavy tests start or check with. Without a network they skip and say so.
$(OLD)/triton $(OLD)/manifests $(OLD)/onnxruntime-gpu: NO_DEPS := --no-deps
$(OLD)/onnxruntime-aarch64: NO_DEPS := --no-deps --only-binary :all: --platform manylinux_2_28_aarch64
$(OLD)/%: tests/deploy/%.txt .venv/packages
	@echo "Fetching $* for the heavy tests"
	@rm -rf $@ && $(PIP) install $(NO_DEPS) --target $@ -r $< && touch $@ || { rm -rf $@; echo "No $* here: its tests will be skipped"; }

# What the wheels are built and checked with, apart from .venv: no compiler of this machine's own.
WHEEL := mra_export/plugins/wheel
.PHONY: wheel test-wheel
wheel: $(OLD)/wheel ## The sdist and the wheels for Linux with glibc 2.28 or newer, x86-64 and aarch64, in dist/ (any x86-64 Linux).
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python mra_export/plugins/tensorrt/fetch_headers.py
	@$(BIN)/python $(WHEEL)/build.py --tools $(OLD)/wheel $(WHEEL_ARGS)

test-wheel: .venv/installed $(OLD)/onnxruntime-aarch64 ## What make wheel left in dist/: contents, use without a compiler, aarch64 under an emulator.
	@$(BIN)/python -m pytest -m heavy tests/wheel $(PYTEST_ARGS)

$(OLD)/wheel: $(WHEEL)/requirements.txt constraints.txt | .venv/pyvenv.cfg
	@echo "Fetching a C++ compiler for older systems, nvcc and what checks wheels: 0.3 GB, 0.8 GB in $@"
	@rm -rf $@ && $(PIP) install --target $@ -c constraints.txt -r $< && \
	  $(PIP) install --target $@/aarch64 --platform manylinux2014_aarch64 --only-binary :all: --no-deps -c constraints.txt nvidia-cuda-runtime || { rm -rf $@; exit 1; }

lint: .venv/installed ## ruff, mypy and clang-format.
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'mra_export/*.cc' 'mra_export/*.h' 'mra_export/*.hpp' 'examples/*.cc' 'mra_export/*.cu' 'mra_export/*.cuh' 'tests/*.cc' 'benchmarks/*.cc' 'tests/*.h' 'tests/*.cu' | grep -v third_party)

format: .venv/installed ## Rewrite the sources in the project's style.
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	@$(BIN)/clang-format -i $$(git ls-files 'mra_export/*.cc' 'mra_export/*.h' 'mra_export/*.hpp' 'examples/*.cc' 'mra_export/*.cu' 'mra_export/*.cuh' 'tests/*.cc' 'benchmarks/*.cc' 'tests/*.h' 'tests/*.cu' | grep -v third_party)

bench: .venv/installed ## The CPU attention kernel beside torch's own attention.
	@$(BIN)/python benchmarks/cpu_attention.py

# No .venv: a GPU machine has a torch of its own, and often no network.
.PHONY: gpu-check
gpu-check: ## Build, check and time the CUDA parts on this machine's GPU; installs nothing (docs/gpu-check.md).
	@$(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK_ARGS)

clean: ## Remove what was built, not what was downloaded.
	@rm -rf build demo-out .venv/installed
