# Everything a newcomer runs. PYTHON picks the interpreter that the virtual environments are made with.
PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
TRL := .venv-trl
# What JAX needs besides, on a machine with an NVIDIA GPU or a TPU.
ACCELERATOR ?= $(shell if nvidia-smi -L >/dev/null 2>&1; then echo 'jax[cuda12]'; \
	elif ls /dev/accel0 /dev/vfio/0 >/dev/null 2>&1; then echo 'jax[tpu]'; fi)
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0

# Tests run in so many processes, each with a part of the files, and who is done takes half of what another one has
# left; 0 is one process, as plain `pytest` is.
WORKERS ?= 2
PYTEST := $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal
# Most tests are made of compilation, not arithmetic: they leave out LLVM's optimization of XLA's programs and XLA's newer
# code generator, so that compiling takes a seventh of the time. With OPTIMIZED=1 no test does, as those that are marked
# `optimized`.
OPTIMIZED ?=
QUICK := $(if $(OPTIMIZED),,JAX_DISABLE_MOST_OPTIMIZATIONS=1 XLA_FLAGS="$(XLA_FLAGS) --xla_cpu_use_fusion_emitters=false")

.PHONY: demo test test-slow test-long test-peers lint bench bench-gpu clean

demo: $(VENV)/.installed
	$(VENV)/bin/python -m experiments.docstrings --config=configs/demo.py --workdir=runs/demo $(DEMO_FLAGS)

test: $(VENV)/.installed-test
	$(QUICK) $(PYTEST) -m "not slow and not long" $(PYTEST_FLAGS)

test-slow: $(VENV)/.installed-test
	$(QUICK) $(PYTEST) -m "slow and not optimized" $(PYTEST_FLAGS)
	$(PYTEST) -m "slow and optimized" $(PYTEST_FLAGS)

# Before a release: larger cases of what the slow tests have smaller (presets through the TPU compiler, whole studies),
# the notebook, and nanoGPT's loss. .ci/run does not call it.
test-long: $(VENV)/.installed-test
	$(PYTEST) -m long $(PYTEST_FLAGS)

# Parity with torch and transformers, in an environment of its own.
test-peers: $(PEERS)/.installed
	$(QUICK) $(PEERS)/bin/python -m pytest -q tests/peers $(PYTEST_FLAGS)

lint: $(VENV)/.installed-test
	$(VENV)/bin/python -m ruff check .

# Each beside its peer, in turns: torch and transformers in one environment, TRL in one of its own.
bench: $(PEERS)/.installed $(TRL)/.installed
	$(PEERS)/bin/python -m experiments.benchmarks --trl_python=$(TRL)/bin/python $(BENCH_FLAGS)

# On an NVIDIA GPU, in .venv with jax[cuda12]; beside torch where BENCH_FLAGS=--torch_python=PYTHON has one with CUDA.
bench-gpu: $(VENV)/.installed
	$(VENV)/bin/python -m experiments.benchmarks.gpu $(BENCH_FLAGS)

clean:
	rm -rf $(VENV) $(PEERS) $(TRL) .jax_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -r requirements.txt $(if $(ACCELERATOR),'$(ACCELERATOR)')
	touch $@

$(VENV)/.installed-test: requirements.txt requirements-test.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -r requirements-test.txt $(if $(ACCELERATOR),'$(ACCELERATOR)')
	touch $@ $(VENV)/.installed

$(PEERS)/.installed: requirements.txt requirements-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install -q --upgrade pip
	$(PEERS)/bin/python -m pip install -q -r requirements-peers.txt
	touch $@

$(TRL)/.installed: requirements-trl.txt
	$(PYTHON) -m venv $(TRL)
	$(TRL)/bin/python -m pip install -q --upgrade pip
	$(TRL)/bin/python -m pip install -q -r requirements-trl.txt
	touch $@
