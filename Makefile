# make demo   sets everything up and teaches a tiny GLM-4.1V to see and answer
# make test   sets everything up and runs the tests; make test-fast those of three minutes, make test-slow installs, soaks
# make bench  races every op against its peers; table, JSON and page go to OUT; ARGS="--quick --op linear" chooses
# make gpu-check   on a machine with a GPU: tests, races, benchmarks; the record goes to bench/results/
PYTHON ?= python3
OUT ?= bench/results/latest
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
CXX := $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')
# Passive waiting in tests only: two busy processes on two cores would otherwise spin at every OpenMP barrier.
PYTEST := OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

.PHONY: demo test test-fast test-slow gpu-check bench docs wheels lint format build

# It trains on the CPU: where nothing is built yet, it is spared the minutes that CUDA kernels take to compile.
ifeq ($(wildcard glm4v_ext/libglm4v_ops.so),)
demo: export GLM4V_CUDA ?= 0
endif
demo: build
	$(BIN)/python -m rlcs.cli demo --out runs/demo

test: build
	$(PYTEST) -m "not slow"

test-fast: build
	$(PYTEST) -m "not slow and not long" -x --failed-first

test-slow: build
	$(PYTEST) -m slow -rA

gpu-check: build
	$(BIN)/python .ci/gpu_check.py

bench: build
	$(BIN)/python -m pytest bench --benchmark-json=$(OUT)/bench.json $(ARGS)

docs: build
	$(BIN)/python -m sphinx -q -W --keep-going -n docs build/docs
	@echo build/docs/index.html

wheels: .venv/.ready
	$(BIN)/python .ci/wheels.py

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX)
	$(BIN)/python .ci/clang_tidy.py

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX)

build: .venv/.ready
	$(BIN)/python setup.py --quiet build_ext --inplace

# torch comes first and pinned; everything else then finds it installed.
.venv/.ready: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch numpy "setuptools>=77" wheel "pybind11>=3.0" "cmake>=3.22,<5" ninja
	$(PIP) --no-build-isolation -e ".[dev]"
	touch $@
