# Everything a developer and CI do. Needs make and Python 3.11 or newer; all else is installed into .venv.
#
#   make demo        serve a sample checkpoint from a local S3 server and stream it back
#   make test        lint, types, tests: whatever needs no root, no GPU and nothing but Python packages
#   make test-all    the same, then the built wheel in environments of its own, the demo, root-test, cloud-test and
#                    image-test
#   make root-test   the tests that need root and, of Debian's packages, nginx with its JavaScript module
#   make vllm-test   streamload in a real vLLM, in an environment of its own: x86-64, 2 GB
#
#   make cloud-test  the tests of gs:// and az://, against emulators; needs root, and npm for one of them
#   make image-test  builds the Dockerfile's image `init` and runs it as a kubelet would; needs root and Debian 12
#
#   make bench       streamload beside its nearest peers, in ten minutes at most; results in build/bench/quick.json
#   make bench-full  all peers, in ninety at most; goes on where it was interrupted; results in build/bench/full.json
#
# Another Python, in an environment of its own: make PYTHON=python3.12 VENV=/tmp/streamload-3.12 test

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

# Made anew, never updated in place: what an older constraints.txt installed must not linger.
# setuptools comes first so that the build takes the pinned one, not the newest one.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("streamload needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; name another one with: make PYTHON=python3.12")'
	@echo 'Setting up $(VENV); the first time, this downloads PyTorch.'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt setuptools
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[torch,runai,dev]'
	touch $@

.PHONY: venv
venv: $(INSTALLED)

.PHONY: demo
demo: $(INSTALLED)
	$(BIN)/python -m examples.demo

.PHONY: lint
lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

.PHONY: format
format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: types
types: $(INSTALLED)
	$(BIN)/mypy

.PHONY: pytest
pytest: $(INSTALLED)
	$(BIN)/python -m pytest -n auto -m 'not gpu and not root and not cloud and not image'

# One after the other even under make -j: the output stays readable, and the cheap checks fail first.
.PHONY: test
test: $(INSTALLED)
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory types
	$(MAKE) --no-print-directory pytest

# Made anew where its list has changed. Nothing is compiled ahead: most of it is never imported.
VLLM_VENV ?= build/vllm
$(VLLM_VENV)/.installed: pyproject.toml constraints-vllm.txt
	rm -rf $(VLLM_VENV)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip --quiet install --no-deps --no-compile --requirement constraints-vllm.txt
	$(VLLM_VENV)/bin/python -m pip --quiet install --no-deps --no-build-isolation --editable .
	touch $@

# Each rank is a process that runs all the tests; where one fails, torchrun ends the others.
.PHONY: vllm-test
vllm-test: $(VLLM_VENV)/.installed
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/torchrun --standalone --nproc-per-node 1 -m pytest --exitfirst tests/engines
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/torchrun --standalone --nproc-per-node 2 -m pytest --exitfirst tests/engines

.PHONY: wheel-test
wheel-test: $(INSTALLED)
	$(BIN)/python -m scripts.wheel_test

# What test-all runs beyond test, for those who have just run test.
.PHONY: test-more
test-more: $(INSTALLED)
	$(MAKE) --no-print-directory wheel-test
	$(MAKE) --no-print-directory demo
	$(MAKE) --no-print-directory root-test
	$(MAKE) --no-print-directory cloud-test
	$(MAKE) --no-print-directory image-test

.PHONY: test-all
test-all: $(INSTALLED)
	$(MAKE) --no-print-directory test
	$(MAKE) --no-print-directory test-more

# The benchmarks' S3 server: nginx with its JavaScript module, a network namespace of its own, a capped link.
.PHONY: root-test
root-test: $(INSTALLED)
	@test "$$(id -u)" = 0 || { echo 'make root-test needs root' >&2; exit 1; }
	$(NGINX)
	$(BIN)/python -m pytest -m root

$(VENV)/.cloud: $(INSTALLED)
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[cloud]'
	touch $@

AZURITE := build/azurite/node_modules/.bin/azurite-blob
$(AZURITE):
	@command -v npm >/dev/null || { apt-get update -qq && apt-get install -qq npm; }
	npm install --silent --no-audit --no-fund --prefix build/azurite azurite@3.37.0

# Each in a process of its own, since Run:ai's engine reads one kind of object store in a process.
# Root, because Run:ai's plugin for Azure speaks nothing but TLS and trusts the system's list alone: the tests lay a
# certificate of theirs over it, in a mount namespace of their own.
.PHONY: cloud-test
cloud-test: $(VENV)/.cloud $(AZURITE)
	@test "$$(id -u)" = 0 || { echo 'make cloud-test needs root' >&2; exit 1; }
	$(BIN)/python -m pytest -m cloud tests/cloud/test_gs.py
	$(BIN)/python -m pytest -m cloud tests/cloud/test_az.py

# No registry is asked for a base image: debootstrap makes a stand-in, build/image keeps it.
OF_IMAGES := buildah debootstrap podman runc
.PHONY: image-test
image-test: $(INSTALLED)
	@test "$$(id -u)" = 0 || { echo 'make image-test needs root' >&2; exit 1; }
	@dpkg-query --show $(OF_IMAGES) >/dev/null 2>&1 || { apt-get update -qq && apt-get install -qq --no-install-recommends $(OF_IMAGES); }
	$(BIN)/python -m pytest -m image tests/image

# Of a Debian; elsewhere the scenarios that need the server say so.
NGINX := command -v nginx >/dev/null || { apt-get update -qq && apt-get install -qq nginx-light libnginx-mod-http-js iproute2; }

$(VENV)/.bench: $(INSTALLED)
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[bench]'
	touch $@

.PHONY: bench
bench: $(VENV)/.bench
	@test "$$(id -u)" != 0 || { $(NGINX); } || echo 'no nginx: the S3 scenarios will be left out' >&2
	$(BIN)/python -m bench run all --quick --rounds 3 --minutes 8 --json build/bench/quick.json
	$(BIN)/python -m bench plot build/bench/quick.json

.PHONY: bench-full
bench-full: $(VENV)/.bench
	@test "$$(id -u)" != 0 || { $(NGINX); } || echo 'no nginx: the S3 scenarios will be left out' >&2
	$(BIN)/python -m bench run all --rounds 5 --minutes 80 --json build/bench/full.json
	$(BIN)/python -m bench plot build/bench/full.json

.PHONY: clean
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
