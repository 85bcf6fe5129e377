# make demo | test | bench | gpu | lint | setup | clean. PYTHON picks the interpreter, VENV the virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

# A CUDA build of torch that is already there is used as it is; otherwise constraints.txt decides.
OWN_TORCH := $(shell $(PYTHON) -c "import torch; print(torch.version.cuda or '')" 2>/dev/null)
ifeq ($(OWN_TORCH),)
VENV_FLAGS :=
CONSTRAINTS := constraints.txt
else
VENV_FLAGS := --system-site-packages
CONSTRAINTS := $(VENV)/constraints.txt
endif

SOURCES := pyproject.toml setup.py constraints.txt $(shell find csrc -type f)

.PHONY: setup demo test bench gpu lint clean

setup: $(VENV)/.installed

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	grep -v -E '^(torch|triton)==' constraints.txt > $(VENV)/constraints.txt

# The build uses the torch that the package will run with, so there is no build isolation.
$(VENV)/.installed: $(VENV)/pyvenv.cfg $(SOURCES)
	$(PIP) install -c $(CONSTRAINTS) "torch>=2.11" setuptools wheel ninja pybind11
	$(PIP) install -c $(CONSTRAINTS) --no-build-isolation -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install -c $(CONSTRAINTS) --no-build-isolation -e ".[test,triton,plot,dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/simsd generate "Tom has 23 apples. Tom buys 45 more. How many apples does Tom have now?" --show-steps
	$(BIN)/simsd bench --items 25 --modes native,temporal,exact-model,exact-auto

# The tests of each op, which also run on its CUDA kernel.
OP_TESTS := $(patsubst simsd_kernels/%/api.py,tests/test_%.py,$(wildcard simsd_kernels/*/api.py)) tests/test_graph_verify.py
IN_PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Kernels under Triton's interpreter, and CUDA kernels run on the CPU, need processes of their own: which it is to be is
# settled when the package is imported. AddressSanitizer must be there before anything else, and C++'s runtime with it:
# it would end the process at the first exception.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests --ignore tests/interpreted --ignore tests/emulated --ignore tests/gpu
	TRITON_INTERPRET=1 $(IN_PARALLEL) tests/interpreted
	library=$$($(BIN)/python tests/emulation.py) && \
		SIMSD_CUDA_EMULATION=$$library $(IN_PARALLEL) tests/emulated $(OP_TESTS) -k "cuda or emulation"
	library=$$($(BIN)/python tests/emulation.py --asan) && \
		preload="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" && \
		SIMSD_CUDA_EMULATION=$$library LD_PRELOAD=$$preload ASAN_OPTIONS=detect_leaks=0 $(IN_PARALLEL) tests/emulated

bench: $(VENV)/.installed-test
	$(BIN)/python benchmarks/attention_cpu.py
	$(BIN)/python -m pytest benchmarks
	$(BIN)/python benchmarks/graph_shapes.py
	$(BIN)/python benchmarks/useless_draft.py
	$(BIN)/python benchmarks/batch_invariance.py
	$(BIN)/python benchmarks/exactness.py
	$(BIN)/simsd audit --json benchmarks/results/audit.json --markdown benchmarks/results/audit.md
	$(BIN)/simsd bench --items 100 --batch 1,8 --json benchmarks/results/tiny_pair.json \
		--markdown benchmarks/results/tiny_pair.md
	$(BIN)/simsd bench --items 50 --temperature 0.8 --modes native,exact-model,exact-self,exact-auto \
		--json benchmarks/results/tiny_pair_t08.json --markdown benchmarks/results/tiny_pair_t08.md

# Uses PYTHON as it is: no virtual environment, no pip, no network. SECTION=build,test,... runs these alone; OUTPUT is
# the folder of the results, BUDGET the seconds for all sections together.
gpu:
	@PYTHONPATH=benchmarks:.:python:$$PYTHONPATH $(PYTHON) -m gpu $(if $(SECTION),--section $(SECTION)) \
		$(if $(OUTPUT),--output $(OUTPUT)) $(if $(BUDGET),--budget $(BUDGET))

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

clean:
	rm -rf $(VENV) build *.egg-info simsd_kernels/_C*.so
