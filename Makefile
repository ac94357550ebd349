# make build   install into .venv and build, nothing more
# make demo    train a MobileNetV2 with and without normfused, and compare
# make test    run the tests
# make conformance  count what they prove, backend by backend: docs/conformance.md, docs/accuracy.md
# make cuda    where nvcc is: install with the CUDA kernels into .venv-cuda, beside the models of other libraries
# make lint    ruff, mypy and clang-format
# make bench   the microbenchmark of README.md
# make gpu     on a machine with a GPU: build, tests, sanitizers, benchmarks; OUT=folder, MINUTES=8.7, PYTHON=python3

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h') setup.py pyproject.toml constraints.txt
CUDA_SOURCES := $(SOURCES) $(shell find csrc -name '*.cu' -o -name '*.cuh') constraints-cuda.txt
FORMATTED := $(shell find csrc tests/emulator -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build cuda demo test conformance lint format bench gpu clean

build: $(VENV)/built

# What compiles comes first, by itself: the build uses the installed torch (no isolation), and runs ninja.
$(VENV)/built: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools wheel ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--no-build-isolation --editable '.[test,demo]'
	$(BIN)/python -m normfused
	touch $@

cuda: .venv-cuda/built

# A CUDA build of torch; without a GPU here, TORCH_CUDA_ARCH_LIST says what for.
.venv-cuda/built: $(CUDA_SOURCES)
	test -x .venv-cuda/bin/python || $(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install --quiet --constraint constraints-cuda.txt torch torchvision timm transformers \
		onnx onnxscript onnxruntime setuptools wheel ninja
	PATH="$(CURDIR)/.venv-cuda/bin:$$PATH" FORCE_CUDA=1 .venv-cuda/bin/python -m pip install --quiet \
		--constraint constraints-cuda.txt --no-build-isolation '.[test]'
	touch $@

demo: build
	$(BIN)/python -m bench demo

# Two processes: most tests keep one core busy. One file in one of them, for what its tests share.
test: build
	$(BIN)/python -m pytest -n 2 --dist loadfile

conformance: build
	$(BIN)/python -m pytest -p tests.conformance

bench: build
	$(BIN)/python -m bench ops

# Builds in place with PYTHON's own torch, so that it runs on a bare machine without a network.
OUT ?= out/gpu
MINUTES ?= 8.7
gpu:
	$(PYTHON) -m bench gpu --out '$(OUT)' --minutes $(MINUTES)

lint: $(VENV)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: $(VENV)/linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

$(VENV)/linters: $(VENV)/built
	$(BIN)/python -m pip install --quiet --constraint constraints.txt ruff clang-format mypy
	touch $@

clean:
	rm -rf $(VENV) .venv-cuda build out *.egg-info normfused/*.so
