# Every target sets up what it needs, from a fresh clone on; a stamp inside .venv says when that is done.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

# make test ARGS="-k noise -x"
ARGS ?=
# Test files run side by side, one thread each; JOBS=0 for one after the other, in one process.
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(4, os.cpu_count()))')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install quickstart study-digits assets assets-teacher bench-digits bench-emoji bench-covariances bench-memory bench-step bench-steps bench-ablations bench-text bench-cifar bench-edm bench-eval bench-mog40 test test-all lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(RUNTIME) ## create .venv with the runtime and this project in editable mode

quickstart: $(RUNTIME) ## distil the embedded Stable Diffusion three ways, measure, draw: outputs/quickstart/; four minutes
	$(BIN)/python -m scripts.quickstart $(ARGS)

study-digits: $(RUNTIME) ## train a teacher on 8x8 digits, distil it four ways, measure: outputs/study_digits/; seven minutes
	$(BIN)/python -m scripts.study_digits $(ARGS)

bench-digits: $(RUNTIME) ## all objectives on the digits, three seeds, equal time: outputs/bench/digits.{json,png}; under 40 minutes
	$(BIN)/python -m scripts.bench.digits $(ARGS)

bench-emoji: $(RUNTIME) ## the quickstart's students, 20 minutes each, three seeds, beside LCM-LoRA: outputs/bench/emoji.{json,png}; 3 hours of two cores
	$(BIN)/python -m scripts.bench.emoji $(ARGS)

bench-covariances: $(RUNTIME) ## what each covariance of the posterior buys (after bench-digits): outputs/bench/covariances.json
	$(BIN)/python -m scripts.bench.covariances $(ARGS)

bench-memory: $(RUNTIME) ## peak memory of a step of each objective (after bench-digits): outputs/bench/memory.json
	$(BIN)/python -m scripts.bench.memory $(ARGS)

bench-step: $(RUNTIME) ## time and memory of a step at Stable Diffusion's size, against other layouts: outputs/bench/step.json
	$(BIN)/python -m scripts.bench.step $(ARGS)

bench-steps: $(RUNTIME) ## students of 1, 2, 4 and 8 steps of the embedded Stable Diffusion, three seeds: outputs/bench/steps.{json,png}; 40 minutes of two cores
	$(BIN)/python -m scripts.bench.steps $(ARGS)

bench-ablations: $(RUNTIME) ## the papers' ablations on the digits, three seeds: outputs/bench/ablations.{json,png,md}; an hour of two cores
	$(BIN)/python -m scripts.bench.ablations $(ARGS)

bench-text: $(RUNTIME) ## text-to-image students on CIFAR-10: make bench-text ARGS="--cifar DIR"; outputs/bench/text.{json,png}
	$(BIN)/python -m scripts.bench.text $(ARGS)

bench-cifar: $(RUNTIME) ## CIFAR-10 by the shipped recipes, small: make bench-cifar ARGS="--cifar DIR"; outputs/bench/cifar.{json,png}
	$(BIN)/python -m scripts.bench.cifar $(ARGS)

bench-edm: $(RUNTIME) ## EDM's CIFAR-10 network against NVlabs' code: make bench-edm ARGS="--nvlabs DIR"; outputs/bench/edm.json
	$(BIN)/python -m scripts.bench.edm $(ARGS)

bench-eval: $(DEV) ## evaluation against clean-fid, torch-fidelity and torchmetrics on the same weights: outputs/bench/eval.json
	$(BIN)/python -m scripts.bench.evaluation $(ARGS)

bench-mog40: $(RUNTIME) ## VarDiU on its own benchmark, every variant, three seeds of 300 s: outputs/bench/mog40*.{json,png}; two hours
	$(BIN)/python -m scripts.bench.mog40 $(ARGS)
	$(BIN)/python -m scripts.bench.mog40_bounds

# What training starts from where it has no checkpoint of its own: START= for random weights.
START ?= assets
WORK := outputs/assets
ASSET = $(BIN)/python -m scripts.assets

assets: $(RUNTIME) ## train the embedded teacher in assets/ again: hours; stopped and started again, it goes on
	$(ASSET).vae --output $(WORK)/vae $(if $(START),--start $(START)/emoji_sd/vae)
	$(ASSET).clip --output $(WORK)/clip $(if $(START),--start $(START)/emoji_clip)
	$(ASSET).assemble --vae $(WORK)/vae/vae --clip $(WORK)/clip/clip $(if $(START),--unet $(START)/emoji_sd/unet) --output $(WORK)/start
	$(MAKE) assets-teacher VAE=$(WORK)/vae/vae CLIP=$(WORK)/clip/clip

# Where autoencoder and text tower come from; those committed, if they are to stay as they are.
VAE ?= assets/emoji_sd/vae
CLIP ?= assets/emoji_clip

assets-teacher: $(RUNTIME) ## train only its U-Net further: make assets-teacher ARGS="steps=20000"
	test -f $(WORK)/pairs/held_out.parquet || $(ASSET).pairs --output $(WORK)/pairs
	test -f $(WORK)/start/model_index.json || $(ASSET).assemble --vae $(VAE) --clip $(CLIP) --unet assets/emoji_sd/unet --output $(WORK)/start
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	  -m trainers.train_teacher --config configs/emoji_teacher.yaml $(ARGS)
	$(ASSET).pairs --ship
	$(ASSET).assemble --ship --vae $(VAE) --clip $(CLIP) --unet $(WORK)/teacher/teacher/unet
	$(ASSET).look --output $(WORK)/look
	$(ASSET).measure

test: $(DEV) ## run the quick tests, which reach every module and command: under five minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow" $(ARGS)

test-all: $(DEV) ## run all tests: about 25 minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(DEV) ## check style, formatting and types: two minutes the first time
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV) ## repair style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and caches; outputs/ stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './outputs/*' -prune -exec rm -rf {} +

# pip is asked for, not only python: a venv made without ensurepip looks finished and is not.
$(RUNTIME): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:3]; sys.exit(not (3, 11) <= v < (3, 15) or v == (3, 14, 1))' || { \
	  echo "Python 3.11 to 3.14 is needed (not 3.14.1, which torchvision refuses); '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 | head -n 1)." >&2; \
	  echo "Name another one, for example: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time takes minutes, PyTorch is large."
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' || test "$$(uname -sm)" != "Linux x86_64" || { \
	  echo "With the CUDA libraries that come with it: about 3 GB of downloads, 5.6 GB on disk."; \
	  command -v nvidia-smi >/dev/null || printf '%s\n' \
	    "There is no NVIDIA GPU here (no nvidia-smi). PyTorch's CPU build does without them and is much smaller: stop this with Ctrl-C, then" \
	    "  $(BIN)/python -m pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu" \
	    "  make $(MAKECMDGOALS)"; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.txt -e .
	@touch $@

$(DEV): $(RUNTIME) requirements-dev.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements-dev.txt
	@touch $@
