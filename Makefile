# make demo | test | docs | compat | nightly | bench | gpu | wheel | lint | setup | clean. PYTHON picks the interpreter, whose torch is
# used where it has one; VENV the virtual environment; CONSTRAINTS the versions in place of both that torch's and
# constraints.txt's.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

SOURCES := pyproject.toml setup.py $(VENV)/constraints.txt $(shell find csrc -type f)

.PHONY: setup demo docs test test-python test-interpreted test-emulated test-sanitized test-transformers compat nightly bench gpu wheel lint clean

setup: $(VENV)/.installed

$(VENV)/constraints.txt: constraints.txt .ci/environment.py $(CONSTRAINTS)
	$(PYTHON) .ci/environment.py $(VENV) $(CONSTRAINTS)

# The build uses the torch that the package will run with, so there is no build isolation.
$(VENV)/.installed: $(SOURCES)
	$(PIP) install -c $(VENV)/constraints.txt "torch>=2.11" "setuptools>=77" wheel ninja pybind11
	$(PIP) install -c $(VENV)/constraints.txt --no-build-isolation -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install -c $(VENV)/constraints.txt --no-build-isolation -e ".[test,triton,plot,dev,docs,release]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/simsd generate "Tom has 23 apples. Tom buys 45 more. How many apples does Tom have now?" --show-steps
	$(BIN)/simsd bench --items 25 --modes native,temporal,exact-model,exact-auto
	@echo "simsd is $(BIN)/simsd: try $(BIN)/simsd generate \"What is the capital of Japan?\", or first . $(BIN)/activate"

TRANSFORMERS_TESTS := $(foreach what,models published configuration loading checkpoint supported weights tokenizer cache \
	iteration draft prefill decoder engine experts fused runner hf, \
	$(wildcard tests/test_$(what).py tests/test_$(what)_*.py)) tests/test_ambient.py
IN_PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test: test-python test-interpreted test-emulated test-sanitized test-transformers

test-python: $(VENV)/.installed-test
	$(IN_PARALLEL) --dist loadfile tests --ignore tests/emulated --ignore tests/gpu benchmarks --benchmark-disable

# Kernels under Triton's interpreter, and CUDA kernels run on the CPU, need processes of their own: which it is to be is
# settled when the package is imported.
test-interpreted: $(VENV)/.installed-test
	TRITON_INTERPRET=1 $(IN_PARALLEL) tests/ops

test-emulated: $(VENV)/.installed-test
	library=$$($(BIN)/python tests/emulation.py) && \
		SIMSD_CUDA_EMULATION=$$library $(IN_PARALLEL) tests/ops tests/emulated

# AddressSanitizer must be there before anything else, and C++'s runtime with it: it would end the process at the first
# exception. Laws, graphs, states by hand and whether rows notice each other are asked above; they say nothing of memory.
NOT_OF_MEMORY := $(foreach what,ambient_state gradients plan_block verify_graph,--ignore tests/ops/test_$(what).py)

test-sanitized: $(VENV)/.installed-test
	library=$$($(BIN)/python tests/emulation.py --asan) && \
		preload="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" && \
		SIMSD_CUDA_EMULATION=$$library LD_PRELOAD=$$preload ASAN_OPTIONS=detect_leaks=0 \
			$(IN_PARALLEL) tests/ops tests/emulated $(NOT_OF_MEMORY) \
			-k "not law_for and not draws and not notice and not lane and not compiles and not test_same"

# What touches transformers, on the oldest supported one; constraints.txt pins the newest that was tried.
OLD_TRANSFORMERS := $(VENV)/oldest-transformers

$(OLD_TRANSFORMERS)/.installed: $(VENV)/.installed-test .ci/oldest.txt
	$(BIN)/python .ci/environment.py $(OLD_TRANSFORMERS)
	$(OLD_TRANSFORMERS)/bin/python -m pip --disable-pip-version-check -q install $$(grep transformers== .ci/oldest.txt)
	touch $@

test-transformers: $(OLD_TRANSFORMERS)/.installed
	OMP_NUM_THREADS=1 $(OLD_TRANSFORMERS)/bin/python -m pytest -n 2 $(TRANSFORMERS_TESTS)

# Before a release: the oldest torch, Triton and transformers, then the newest of everything. Several GB of downloads.
compat: compat-oldest compat-newest

compat-%:
	$(MAKE) VENV=.venv-$* CONSTRAINTS=.ci/$*.txt test-python test-interpreted

nightly: test compat
	$(BIN)/python -m benchmarks exactness soak serve ray_faults

# `busy` may miss its bar where others use the machine.
bench: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks
	-$(BIN)/python -m benchmarks busy

# Uses PYTHON as it is: no virtual environment, no pip, no network. SECTION=build,test,... runs these alone; OUTPUT is
# the folder of the results, BUDGET the seconds for all together.
gpu:
	@PYTHONPATH=.:python:$$PYTHONPATH $(PYTHON) -m benchmarks $(or $(SECTION),gpu) \
		$(if $(OUTPUT),--out $(OUTPUT)) $(if $(BUDGET),--budget $(BUDGET))

# The site, in build/site: a link that leads nowhere is an error. `mkdocs serve` shows it while you write.
docs: $(VENV)/.installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# The sdist and the wheel as they are published, with CUDA kernels unless SIMSD_BUILD_CUDA=0, tried in a fresh environment.
wheel: $(VENV)/.installed-test
	rm -rf dist
	$(BIN)/python tests/distribution.py --out dist

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build *.egg-info simsd_kernels/_C*.so
