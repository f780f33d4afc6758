# The main commands are `make demo` and `make test`. They install and build in .venv and build/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# For programs that run in other folders.
ABSOLUTE_BIN := $(if $(filter /%,$(VENV)),,$(CURDIR)/)$(BIN)
# torch is installed first and pinned: a looser range may download gigabytes of CUDA.
TORCH ?= torch==2.13.0
# Processes that run the tests; 0 for a single one, which a debugger can use.
WORKERS ?= 2
CTEST := $(BIN)/ctest --parallel $(or $(filter-out 0,$(WORKERS)),1) --output-on-failure
BUILD ?= $(or $(shell echo '$(NEUROADA_BUILD)' | tr A-Z a-z),auto)
$(if $(filter 1-0,$(words $(BUILD))-$(words $(filter-out auto cpu cuda none,$(BUILD)))),,$(error BUILD: '$(BUILD)', expected one of auto, cpu, cuda, none))
# With BUILD=cuda nvcc comes from PyPI, pinned, about 100 MB; `NVCC=` uses the one on the PATH.
NVCC ?= nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85 nvidia-cuda-runtime==13.0.96
# CUTLASS as well. Only its headers are used, so the dependencies of its Python part are not installed.
CUTLASS ?= nvidia-cutlass==4.2.0.0
# Where setup.py compiles: the C++ tests and the wheel use the same objects.
CPP_BUILD := build/cmake
# What a source distribution must contain, besides tests and documentation.
PACKED := csrc neuroada_kernels triton_kernels benchmarks CMakeLists.txt setup.py pyproject.toml MANIFEST.in README.md LICENSE
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

FORMATTED = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test bench figures lint format clean dist install settings test-python test-triton test-cpp \
  test-cuda-host test-aarch64 count-instructions fuzz smoke

help:
	@echo 'make demo      trains, adapts and merges a small model'
	@echo 'make test      all tests'
	@echo 'make bench     the benchmark of single layers'
	@echo 'make install   the package and its tools in $(VENV); BUILD=auto, cpu, cuda or none'
	@echo 'make lint      the linters; make format formats'
	@echo 'make dist      sdist and wheel'
	@echo 'CONTRIBUTING.md lists the others.'

demo: install
	$(BIN)/neuroada demo

test: test-triton test-python test-cpp

bench: install
	$(BIN)/neuroada bench

# The figures and tables of the documentation, from the committed results.
figures: install
	$(BIN)/python -m neuroada_kernels.benchmarks.readme

install: settings $(VENV)/installed-$(BUILD)

# A given PYTHON or TORCH is refused where the environment was made with another one.
GIVEN := $(foreach name,PYTHON TORCH,$(if $(filter-out file,$(origin $(name))),'$(name)=$($(name))'))
settings:
	@for given in $(GIVEN); do \
	  test ! -s $(VENV)/torch || grep -qxF "$$given" $(VENV)/torch || { \
	  echo "$$given: $(VENV) was made with $$(paste -sd' ' $(VENV)/torch); expected that, or make clean before"; \
	  exit 1; }; done

$(VENV)/torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	rm -rf $(CPP_BUILD)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	printf 'PYTHON=%s\nTORCH=%s\n' '$(PYTHON)' '$(TORCH)' > $@

$(VENV)/nvcc: $(VENV)/torch
	$(if $(NVCC),$(BIN)/python -m pip install --quiet $(NVCC))
	touch $@

$(VENV)/cutlass: $(VENV)/torch
	$(if $(CUTLASS),$(BIN)/python -m pip install --quiet --no-deps $(CUTLASS))
	touch $@

# No build isolation: an isolated build would fetch its own, newest torch.
$(VENV)/installed-$(BUILD): $(VENV)/torch $(if $(filter cuda,$(BUILD)),$(VENV)/nvcc $(VENV)/cutlass) $(SOURCES)
	rm -f $(VENV)/installed-* neuroada_kernels/*.so
	$(BIN)/python -m pip install --quiet 'setuptools>=77' wheel 'pybind11>=2.13' 'cmake>=3.22' ninja
	PATH="$(ABSOLUTE_BIN):$$PATH" NEUROADA_BUILD=$(BUILD) $(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
	touch $@

# The kernels in Triton's interpreter, in a separate process, where it replaces the compiler entirely.
# The tests of threads and of host memory, and large ones, are left out.
INTERPRETED := tests/triton_kernels tests/ops tests/test_compile.py tests/test_compile_resident.py tests/test_functional.py tests/test_numerics.py
test-triton: install
	TRITON_INTERPRET=1 NEUROADA_REQUIRE=triton $(BIN)/python -m pytest -n $(WORKERS) -m on_backend $(INTERPRETED)

# The CUDA backend on the CPU: its kernels and their torch glue, as ops on CPU tensors.
HOST_CUDA := build/host_cuda/tests/cuda/libneuroada_host_cuda.so
$(HOST_CUDA): $(VENV)/installed-$(BUILD) $(wildcard tests/cpp/*.h tests/cuda/*)
	$(BIN)/cmake -G Ninja -S . -B build/host_cuda "-DPython_EXECUTABLE=$(ABSOLUTE_BIN)/python" "-DCMAKE_MAKE_PROGRAM=$(ABSOLUTE_BIN)/ninja"
	$(BIN)/cmake --build build/host_cuda --target neuroada_host_cuda
	touch $@

test-python: install $(HOST_CUDA)
	NEUROADA_HOST_CUDA_LIBRARY="$(CURDIR)/$(HOST_CUDA)" $(BIN)/python -m pytest -n $(WORKERS) --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

test-cpp: install
	$(BIN)/cmake -G Ninja -S . -B $(CPP_BUILD) -DNEUROADA_PYTHON=OFF -DNEUROADA_TESTS=ON "-DCMAKE_MAKE_PROGRAM=$(ABSOLUTE_BIN)/ninja"
	$(BIN)/cmake --build $(CPP_BUILD)
	$(CTEST) --test-dir $(CPP_BUILD)

# The C++ tests, including those of the CUDA kernels, and the fuzzer, under AddressSanitizer and
# UndefinedBehaviorSanitizer.
fuzz: install
	$(BIN)/cmake -G Ninja -S . -B build/sanitized -DNEUROADA_PYTHON=OFF -DNEUROADA_SANITIZE=address,undefined "-DCMAKE_MAKE_PROGRAM=$(ABSOLUTE_BIN)/ninja"
	$(BIN)/cmake --build build/sanitized
	$(CTEST) --test-dir build/sanitized

# The CUDA kernels on the CPU under ThreadSanitizer: a missing barrier is a data race there.
test-cuda-host: install
	$(BIN)/cmake -G Ninja -S . -B build/threads -DNEUROADA_PYTHON=OFF -DNEUROADA_SANITIZE=thread "-DCMAKE_MAKE_PROGRAM=$(ABSOLUTE_BIN)/ninja"
	$(BIN)/cmake --build build/threads --target cuda_tests
	$(CTEST) --test-dir build/threads --tests-regex '^cuda_'

# The CPU kernels compiled for aarch64, their tests in an emulator: Debian's g++-aarch64-linux-gnu and qemu-user-static.
AARCH64_CXX ?= aarch64-linux-gnu-g++
AARCH64_EMULATOR ?= qemu-aarch64-static;-L;/usr/aarch64-linux-gnu
test-aarch64: install
	$(BIN)/cmake -G Ninja -S . -B build/aarch64 -DNEUROADA_PYTHON=OFF "-DCMAKE_MAKE_PROGRAM=$(ABSOLUTE_BIN)/ninja" \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(AARCH64_CXX) \
	  '-DCMAKE_CROSSCOMPILING_EMULATOR=$(AARCH64_EMULATOR)'
	$(BIN)/cmake --build build/aarch64 --target cpu_tests
	$(CTEST) --test-dir build/aarch64 --exclude-regex '^cuda_'

# Compares the instructions of the CPU kernels, by callgrind, with the committed figures; WRITE=1 rewrites them.
count-instructions: install
	$(BIN)/cmake -G Ninja -S . -B $(CPP_BUILD) -DNEUROADA_PYTHON=OFF -DNEUROADA_TESTS=ON "-DCMAKE_MAKE_PROGRAM=$(ABSOLUTE_BIN)/ninja"
	$(BIN)/cmake --build $(CPP_BUILD) --target count_instructions
	$(BIN)/python tests/cpp/count_instructions.py $(CPP_BUILD)/tests/cpp/count_instructions $(if $(WRITE),--write)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: install
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

# Both from this tree and its objects. Files that setuptools kept from an older tree would go into the wheel.
dist: install
	rm -rf dist build/lib* build/bdist* *.egg-info/SOURCES.txt
	PATH="$(ABSOLUTE_BIN):$$PATH" NEUROADA_BUILD=$(BUILD) $(BIN)/python -m build --sdist --wheel --no-isolation --outdir dist

# Installs the wheel into an empty environment, then a pure-Python one over it. The latter is built from the sdist,
# which must have all sources and suffice for CMake.
UNPACKED := build/unpacked
smoke: dist
	rm -rf build/empty build/pure $(UNPACKED)
	mkdir -p $(UNPACKED) && tar -xzf dist/*.tar.gz -C $(UNPACKED) --strip-components=1
	for file in $$(find $(PACKED) -type f ! -name '*.pyc' ! -name '*.so'); do \
	  test -f $(UNPACKED)/$$file || { echo "the sdist lacks $$file"; exit 1; }; done
	$(BIN)/cmake -G Ninja -S $(UNPACKED) -B $(UNPACKED)/build -DNEUROADA_PYTHON=OFF "-DCMAKE_MAKE_PROGRAM=$(ABSOLUTE_BIN)/ninja"
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet "$(TORCH)"
	build/empty/bin/python -m pip install --quiet dist/*.whl
	cd build && empty/bin/python ../tests/smoke.py cpu $(filter cuda,$(BUILD))
	NEUROADA_BUILD=none $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/pure dist/*.tar.gz
	build/empty/bin/python -m pip install --quiet --force-reinstall --no-deps build/pure/*.whl
	cd build && empty/bin/python ../tests/smoke.py eager

clean:
	rm -rf build dist demo-output *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	rm -f neuroada_kernels/*.so
	rm -rf $(VENV)
