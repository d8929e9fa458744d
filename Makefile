# `make demo` and `make test` are all the set-up there is: each makes its own virtual environment.
VENV   ?= .venv
PYTHON ?= python3
RUN    := $(VENV)/bin
PIP    := $(RUN)/python -m pip install --quiet -c constraints.txt
NATIVE := $(wildcard speculate/native/*.[ch] speculate/native/cuda/*) speculate/native/generate_cdefs.py CMakeLists.txt

.PHONY: demo install test test-all lint format clean

demo: $(VENV)/installed
	$(RUN)/draftsmith build smollm2-lossless -o bundle
	$(RUN)/draftsmith generate bundle --chat --max-new-tokens 64 "What should I look at first when I buy a used bicycle?"
	$(RUN)/draftsmith bench bundle --prompts recipes/demo_prompts.jsonl --limit 4 --max-new-tokens 64

install: $(VENV)/installed

test: $(VENV)/installed-dev
	$(RUN)/python -m pytest -m "not slow"

test-all: $(VENV)/installed-dev
	$(RUN)/python -m pytest

lint: $(VENV)/installed-dev
	$(RUN)/pre-commit run --all-files

format: $(VENV)/installed-dev
	$(RUN)/ruff check --fix --quiet . && $(RUN)/ruff format --quiet .
	$(RUN)/clang-format -i speculate/native/*.[ch] speculate/native/cuda/*

# The build backend is pinned like the rest, hence no build isolation.
$(VENV)/installed: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(PIP) scikit-build-core cmake ninja cffi
	$(PIP) --no-build-isolation --editable '.[build,cpu]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --no-build-isolation --editable '.[build,cpu,dev]'
	@touch $@

clean:
	rm -rf build dist .pytest_cache .ruff_cache
