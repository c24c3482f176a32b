# Everything runs in a virtual environment of this folder, .venv; nothing else is touched.
#
#   PYTHON       the interpreter to build it with (default: the first of python3, python3.13 ...
#                python3.10 that is Python 3.10 to 3.13)
#   TORCH_INDEX  package index with CPU-only builds of torch; used for torch alone.
#                Empty: take torch from pip's own sources, whatever build they hold.

PYTHON ?=
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VENV := .venv

.DEFAULT_GOAL := help
.PHONY: help demo test full fuzz clean

help:
	@echo "make demo    set up, export a real 135M model, let it answer, pause, resume; measure it"
	@echo "make test    set up, then lint, types and tests"
	@echo "make full    the same with the long tests and an hour of fuzzing"
	@echo "make fuzz    the fuzzing alone (EDGERT_FUZZ_SECONDS: 3600 for each parser, side by side)"
	@echo "make clean   remove what these made: .venv, the demo's bundle, caches"

demo: $(VENV)/.stamp-export
	@bash scripts/demo

test: $(VENV)/.stamp-dev
	@bash scripts/check

full: $(VENV)/.stamp-dev
	@bash scripts/check --full

fuzz: $(VENV)/.stamp-dev
	@$(VENV)/bin/python scripts/fuzz --seconds $${EDGERT_FUZZ_SECONDS:-3600}

# A stage is done when its stamp is newer than what it was made from, so that a second run starts
# at once and does not ask pip anything.
KERNELS := $(wildcard edgert/kernels/*.cpp edgert/kernels/*.h)

$(VENV)/.stamp-export: pyproject.toml setup.py scripts/setup $(KERNELS)
	@PYTHON='$(PYTHON)' TORCH_INDEX='$(TORCH_INDEX)' bash scripts/setup export

$(VENV)/.stamp-dev: $(VENV)/.stamp-export
	@PYTHON='$(PYTHON)' TORCH_INDEX='$(TORCH_INDEX)' bash scripts/setup dev

clean:
	rm -rf $(VENV) bundles/smollm2-135m-instruct bundles/story.session build dist edgert.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find edgert tests -name __pycache__ -type d -prune -exec rm -rf {} +
