# Every command is one line; the logic lives in Python.
# numpy 1.26, which the embedded server needs, has wheels up to Python 3.12.
SUITABLE := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(firstword $(shell for python in python3.11 python3.12 python3; do \
	"$$python" -c "$(SUITABLE)" 2> /dev/null && echo "$$python"; done))
CHECKPOINT ?= export/checkpoints/mst_gan_pruned.safetensors
SERVE_ARGS ?=
STREAM_ARGS ?=
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
BASE_IMAGE ?=
SWEEP ?=
QUICK ?=
LADDER_ARGS ?=
GPU_ARGS ?=
EVALUATE_ARGS ?=
# Five files of tests at a time, on two cores too: many of them wait more than they compute.
PYTEST_ARGS ?= -n 5 --dist loadfile

VENV := .venv
BIN := $(VENV)/bin
MODELS := model_repository/generator/1/model.onnx
EXPORT_CODE := pyproject.toml $(wildcard export/*.py $(foreach d,network onnx tensorrt verify data metrics,export/$(d)/*.py) export/verify/*.toml)

.DEFAULT_GOAL := help
.PHONY: help setup export stream plans configs serve doctor dist demo lint format check test test-deploy wheels images perf-tools sweep peers bench measure gpu ladder report evaluate clean

help:  ## List these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "expected Python 3.11 or 3.12 with venv, found none: run 'sudo apt install" \
	"python3.11-venv libpython3.11' on Debian 12 or Ubuntu 22.04, 'sudo apt install python3.12-venv" \
	"libpython3.12t64' on Ubuntu 24.04, or give make PYTHON=..."; exit 1; } >&2
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[export,server,perf,test]'
	printf '#!/bin/sh\nexec "%s/$(BIN)/python" "%s/deploy/embedded/launcher.py" "$$@"\n' "$(CURDIR)" "$(CURDIR)" > $(BIN)/tritonserver
	chmod +x $(BIN)/tritonserver
	touch $@

setup: $(VENV)/.installed  ## Make .venv with everything (needs no root)

$(MODELS): $(CHECKPOINT) $(EXPORT_CODE) | setup
	$(BIN)/python -m export build --checkpoint $(CHECKPOINT)

export: setup  ## Checkpoint -> ONNX -> parity check -> model_repository/  [TARGET=cpu|cuda|tensorrt|fp32] [CHECKPOINT=...]
	$(BIN)/python -m export build --checkpoint $(CHECKPOINT) $(if $(TARGET),--target $(TARGET))

stream: setup  ## Recurrent checkpoint -> the ensemble mst_gan_stream, beside mst_gan  [STREAM_ARGS="--target fp32"]
	$(BIN)/python -m export build-stream $(STREAM_ARGS)

plans: $(MODELS)  ## TensorRT-RTX plans of all three stages (needs no GPU)
	$(BIN)/python -m export plans

configs: setup  ## Regenerate every config.pbtxt from export/spec.py
	$(BIN)/python -m export repository

serve: $(MODELS)  ## Serve model_repository/ on loopback  [SERVE_ARGS=...]
	$(BIN)/tritonserver --model-repository=model_repository $(SERVE_ARGS)

doctor: setup  ## Common serving problems of this machine, each with its fix  [DOCTOR="--size 640x360"]
	$(BIN)/python -m deploy.doctor $(DOCTOR)

dist: $(MODELS)  ## Wheel, model repository archive, SBOM and checksums in dist/RELEASE/
	$(BIN)/python -m deploy.dist

demo: $(MODELS)  ## Upscale a real clip through a real server, and show it beside bicubic
	$(BIN)/python -m deploy.demo

lint: setup  ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --strict export/spec.py client

format: setup  ## Put the code into the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint  ## Lint and the quick tests: what to run while changing things
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not server and not slow and not docker"

test: lint $(MODELS)  ## Lint, unit tests, and end-to-end tests on the embedded server  [PYTEST_ARGS="-n 2 --dist loadfile"]
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-deploy: $(MODELS) wheels  ## Build the images, run Compose with a server killed; needs Docker  [BASE_IMAGE=...]
	REQUIRE_DOCKER=1 $(BIN)/python -m pytest -m docker tests/deploy/test_containers.py

wheels: setup  ## Packages of the images, in the versions of .venv, into build/wheels
	rm -rf build/lib build/wheels
	$(BIN)/python -m pip freeze --quiet --exclude-editable | grep -v onnxruntime > build/constraints.txt
	$(BIN)/python -m pip wheel --quiet --wheel-dir build/wheels --constraint build/constraints.txt pip . psutil 'numpy<2' \
		onnxruntime==$$($(BIN)/python -c "import onnxruntime; print(onnxruntime.__version__)")
	$(BIN)/python -m pip wheel --quiet --wheel-dir build/wheels --constraint build/constraints.txt --no-deps nvidia-pytriton

images: $(MODELS) wheels  ## Container images of the embedded server and of the client; needs Docker  [BASE_IMAGE=...]
	for target in client server; do docker build --file deploy/Dockerfile --target $$target --tag mst-gan-$$target:$(VERSION) \
		$(if $(BASE_IMAGE),--build-arg BASE=$(BASE_IMAGE)) . || exit; done

perf-tools: setup  ## Get a perf_analyzer that runs here (needs no root)
	$(BIN)/python -m perf.analyzer

sweep: $(MODELS) perf-tools  ## Measure the server with perf_analyzer  [SWEEP="names or options"]
	$(BIN)/python -m perf.sweep $(if $(QUICK),--quick) $(SWEEP)

peers: setup  ## Measure the papers' rivals beside ours, network by network
	$(BIN)/python -m perf.peers $(if $(QUICK),--quick)

bench: $(MODELS) perf-tools  ## File-to-file throughput against bare ONNX Runtime
	$(BIN)/python -m perf.end_to_end $(if $(QUICK),--quick)

ladder: $(MODELS) perf-tools  ## From PyTorch FP32 to the fastest served: speed and quality  [LADDER_ARGS="--clips folder"]
	$(BIN)/python -m perf.ladder $(if $(QUICK),--quick) $(LADDER_ARGS)

measure: sweep bench peers ladder report  ## All of these and the report  [QUICK=1: toy size]

gpu: setup  ## All networks on a GPU, against its roofline: ten minutes  [GPU_ARGS=...]
	$(BIN)/python -m perf.peers --device cuda --size 720 1280 --rounds 20 --minutes 10 $(GPU_ARGS)

report: setup  ## Draw perf/REPORT.md and build/perf/report.html from perf/results/
	$(BIN)/python -m perf.report $(if $(QUICK),--quick)

evaluate: setup  ## Score CHECKPOINT="a b ..." on every frame of CLIPS=folder  [NAMES=list] [EVALUATE_ARGS=...]
	$(BIN)/python -m export evaluate $(foreach file,$(CHECKPOINT),--checkpoint $(file)) --clips $(CLIPS) $(if $(NAMES),--names $(NAMES)) $(EVALUATE_ARGS)

clean:  ## Remove what was built, but not .venv
	rm -rf build model_repository/*/1/model* model_repository/mst_gan/config* model_repository/*stream*
