# make demo, make test: each makes .venv from the lock files first; nothing else is needed but
# Python 3.11 to 3.13 and PyPI. make ingest makes .venv-ingest, whose TensorFlow reads seqio's tasks
# and rewrites TFDS data sets, and which the tests run, too; make launch makes .venv-launch, whose
# XManager starts jobs (launch/xmanager.py); make studio makes .venv-studio, whose Gradio serves a
# page over the demo's model, or over another (ARGS, see configs/studio.py). The tests of make
# test-all run these two as well, the page in Debian's Chromium if there is one. TORCH is what the
# tests' references need (PyTorch has CPU builds apart: elsewhere, add e.g. --index-url
# https://download.pytorch.org/whl/cpu).
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
INGEST := .venv-ingest/bin
LAUNCH := .venv-launch/bin
STUDIO := .venv-studio/bin
ARGS ?= --config=configs/studio.py:demo
# glibc would map large arrays anew at each step and give them back, in small pages. Kept, and in
# huge pages, they cost half of the system's time, and weights are read up to a fifth faster.
KEEP := glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592
ON_CPU := GLIBC_TUNABLES=glibc.malloc.hugetlb=1:$(KEEP) JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu}
RUN := $(ON_CPU) $(BIN)/python
# Most of a test is compilation, which takes one core. Each worker may come to hold 6 GB.
WORKERS ?= 2
PYTEST := $(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-long studio test test-all check ingest launch lock

demo: $(BIN)/.run
	$(RUN) -m emu3_jax.launch --config=configs/demo.py

demo-long: $(BIN)/.run
	$(RUN) -m emu3_jax.launch --config=configs/demo_long.py

studio: $(STUDIO)/.run
	$(ON_CPU) $(STUDIO)/python -m emu3_jax.launch $(ARGS)

test: $(BIN)/.test $(INGEST)/.run check
	$(PYTEST) -m "not slow"

test-all: $(BIN)/.test $(INGEST)/.run $(LAUNCH)/.run $(STUDIO)/.run check
	$(PYTEST)

check: $(BIN)/.test
	$(BIN)/ruff check .

ingest: $(INGEST)/.run

launch: $(LAUNCH)/.run

$(BIN)/uv:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet uv

$(BIN)/.run: requirements.lock | $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	touch $@

$(BIN)/.test: requirements-test.lock requirements.lock | $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements-test.lock
	$(BIN)/pip install --quiet $(TORCH)
	touch $@

# Without dependencies: the lock lists all, but for the second TensorFlow that one of them asks for.
$(INGEST)/.run: requirements-ingest.lock | $(BIN)/uv
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-ingest
	$(BIN)/uv pip install --quiet --no-deps --python $(INGEST)/python -r requirements-ingest.lock
	touch $@

$(LAUNCH)/.run: requirements-launch.lock | $(BIN)/uv
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-launch
	$(BIN)/uv pip install --quiet --python $(LAUNCH)/python -r requirements-launch.lock
	touch $@

$(STUDIO)/.run: requirements-studio.lock | $(BIN)/uv
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-studio
	$(BIN)/uv pip install --quiet --python $(STUDIO)/python -r requirements-studio.lock
	touch $@

# Pins for Python 3.11 to 3.13 on every platform at once.
lock: | $(BIN)/uv
	$(BIN)/uv pip compile --universal --python-version 3.11 --no-header --quiet \
		requirements.txt -o requirements.lock
	$(BIN)/uv pip compile --universal --python-version 3.11 --no-header --quiet \
		-c requirements.lock requirements-test.txt -o requirements-test.lock
	$(BIN)/uv pip compile --universal --python-version 3.11 --no-header --quiet \
		-c requirements.lock --no-emit-package tensorflow \
		requirements-ingest.txt -o requirements-ingest.lock
	$(BIN)/uv pip compile --universal --python-version 3.11 --no-header --quiet \
		requirements-launch.txt -o requirements-launch.lock
	$(BIN)/uv pip compile --universal --python-version 3.11 --no-header --quiet \
		requirements-studio.txt -o requirements-studio.lock
