# `make demo` and `make test` are all a newcomer needs: both make .venv and get what they need by themselves.
PYTHON ?= python3
BIN := .venv/bin
# On a terminal pip shows how far it is. In a read-only home it would warn at each call that it keeps no cache.
QUIET := $(if $(MAKE_TERMOUT),,--quiet)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
ifeq ($(shell [ -w "$$HOME" ] && echo writable),)
  export PIP_NO_CACHE_DIR := 1
endif
PIP := $(BIN)/python -m pip $(QUIET)
HELPERS := mra_export/plugins/make
OPTIONAL := sh $(HELPERS)/optional.sh
SOURCES := $(shell find mra_export/plugins mra_export/embed -type f -not -name '*.py' -not -name '*.md' -not -path '*/examples/*' -not -path '$(HELPERS)/*')
OLD := .downloads
NVCC := nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl nvidia-cuda-crt nvidia-nvvm

.PHONY: help demo test test-heavy lint format docs bench clean
help: ## This list.
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14
	@echo "PYTHON=python3.12 makes .venv with that one. TORCH_INDEX=URL is where PyTorch comes from: unset, its own index of CPU builds"
	@echo "or, on a machine with an NVIDIA GPU, pip's; empty, pip's."

.venv/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"{sys.executable} is Python {v[0]}.{v[1]}: mra_export needs 3.10 or newer, pass another as make PYTHON=python3.12") if v < (3, 10) else None'
	@[ -n "$$CXX" ] || command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  { echo "no C++ compiler on PATH: install GCC 11, Clang 14 or newer (Debian, Ubuntu: apt install g++), or set CXX" >&2; exit 1; }
	@echo "Making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv >/dev/null 2>&1 || { rm -rf .venv build/virtualenv; \
	  $(PYTHON) -m pip install --quiet --target build/virtualenv virtualenv && PYTHONPATH=build/virtualenv $(PYTHON) -m virtualenv --quiet .venv; } || \
	  { rm -rf .venv; echo "$(PYTHON) can make no virtual environment: install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }

# The torch pin goes first and alone: a plain `torch` asked for by another package may pull a CUDA build of several gigabytes.
.venv/packages: .venv/pyvenv.cfg pyproject.toml constraints.txt
	@echo "Fetching PyTorch and the build tools (0.03 GB)"
	@$(BIN)/python $(HELPERS)/install_torch.py $(QUIET) -c constraints.txt
	@$(PIP) install -c constraints.txt "scikit-build-core>=0.10" "cmake>=3.22" ninja
	@touch $@

# What the TensorRT plugin is built with and tested against. It is optional: where something cannot be had, the rest goes on without.
.venv/tensorrt: .venv/packages mra_export/plugins/tensorrt/fetch_headers.py
	@echo "Fetching what TensorRT engines need: TensorRT-RTX and TensorRT's headers (0.1 GB)"
	@$(OPTIONAL) "TensorRT headers" $(BIN)/python mra_export/plugins/tensorrt/fetch_headers.py || true
	@$(BIN)/python $(HELPERS)/find_nvcc.py >/dev/null || { echo "and a CUDA compiler, since there is none of CUDA 12.8 or newer (0.1 GB)"; \
	  $(OPTIONAL) "CUDA compiler" $(PIP) install -c constraints.txt $(NVCC) || true; }
	@{ $(OPTIONAL) "TensorRT-RTX, for .plan engines without a GPU" $(PIP) install -c constraints.txt tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings && \
	  $(OPTIONAL) "TensorRT-RTX, for .plan engines without a GPU" $(PIP) install -c constraints.txt --no-build-isolation --no-deps tensorrt-rtx-cu13; } || true
	@touch $@

.venv/installed: .venv/packages .venv/tensorrt $(SOURCES)
	@echo "Fetching the other Python packages (0.2 GB), building the op libraries (minutes) and installing mra_export"
	@CUDACXX="$$($(BIN)/python $(HELPERS)/find_nvcc.py)" && export CUDACXX || unset CUDACXX; \
	  $(PIP) install -c constraints.txt --no-build-isolation --editable ".[dev]"
	@touch $@

demo: .venv/installed ## From the shipped checkpoint to a verified bundle, on real text.
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh; status=$$?; \
	  $(BIN)/python $(HELPERS)/left_out.py; exit $$status

test: .venv/installed $(OLD)/onnxruntime $(OLD)/transformers ## Every test but those of test-heavy.
	@MRA_TEST_ORT_OLD="$(CURDIR)/$(OLD)/onnxruntime" MRA_TEST_TRANSFORMERS_OLD="$(CURDIR)/$(OLD)/transformers" \
	  $(BIN)/python -m pytest -n 2 --dist worksteal -m "not heavy" $(PYTEST_ARGS); status=$$?; \
	  $(BIN)/python $(HELPERS)/left_out.py tests; exit $$status

test-heavy: .venv/installed $(OLD)/triton $(OLD)/ray $(OLD)/manifests $(OLD)/actionlint $(OLD)/onnxruntime-gpu $(OLD)/onnxruntime-aarch64 ## Real servers on loopback (Triton, Ray Serve), deployment files by their schemas, and onnxruntime-gpu.
	@$(BIN)/python -m pytest -m heavy $(PYTEST_ARGS); status=$$?; \
	  $(BIN)/python $(HELPERS)/left_out.py tests; exit $$status

# Old releases that the tests run against, each in a folder of its own. Without a network those tests skip and say so.
$(OLD)/%: tests/old/%.txt .venv/packages
	@echo "Fetching the old $* that the tests also run against (0.04 GB)"
	@rm -rf $@; $(OPTIONAL) "tests of the old $*" $(PIP) install --target $@ -r $< && touch $@ || rm -rf $@

# What the heavy tests start or check with. Without a network they skip and say so.
$(OLD)/triton $(OLD)/manifests $(OLD)/onnxruntime-gpu: NO_DEPS := --no-deps
$(OLD)/triton: SIZE := 0.07 GB
$(OLD)/ray: SIZE := 0.14 GB
$(OLD)/manifests: SIZE := 0.04 GB
$(OLD)/onnxruntime-gpu: SIZE := 0.26 GB
$(OLD)/actionlint: SIZE := 0.01 GB
$(OLD)/onnxruntime-aarch64: SIZE := 0.02 GB
$(OLD)/onnxruntime-aarch64: NO_DEPS := --no-deps --only-binary :all: --platform manylinux_2_28_aarch64
$(OLD)/%: tests/deploy/%.txt .venv/packages
	@echo "Fetching $* for the heavy tests ($(SIZE))"
	@rm -rf $@; $(OPTIONAL) "heavy tests of $*" $(PIP) install $(NO_DEPS) --target $@ -r $< && touch $@ || rm -rf $@

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

docs: .venv/installed ## The guide as a site, in build/site; stops at a broken link.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet && echo "Open build/site/index.html"

bench: .venv/installed ## The CPU attention kernel beside torch's own attention.
	@$(BIN)/python benchmarks/cpu_attention.py

# No .venv: a GPU machine has a torch of its own, and often no network.
.PHONY: gpu-check
gpu-check: ## Build, check and time the CUDA parts on this machine's GPU; installs nothing (docs/gpu-check.md).
	@$(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK_ARGS)

clean: ## Remove what was built, not what was downloaded.
	@rm -rf build demo-out .venv/installed .venv/tensorrt
