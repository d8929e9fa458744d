# `make demo` and `make test` are all the set-up there is: each makes its own virtual environment.
VENV   ?= .venv
PYTHON ?= python3
RUN    := $(VENV)/bin
PIP    := $(RUN)/python -m pip install --quiet -c constraints.txt
NATIVE := $(wildcard speculate/native/*.[ch] speculate/native/cuda/*) speculate/native/generate_cdefs.py CMakeLists.txt

# Two workers, each with the whole of a file, so that what its tests share is made once.
PYTEST := $(RUN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo install test test-all lint format clean

demo: $(VENV)/installed
	$(RUN)/draftsmith build smollm2-lossless -o bundle
	$(RUN)/draftsmith generate bundle --chat --max-new-tokens 64 "What should I look at first when I buy a used bicycle?"
	$(RUN)/draftsmith bench bundle --prompts recipes/demo_prompts.jsonl --limit 4 --max-new-tokens 64

install: $(VENV)/installed

test: $(VENV)/installed-dev
	$(PYTEST) -m "not slow"

test-all: $(VENV)/installed-dev
	$(PYTEST)

lint: $(VENV)/installed-dev
	$(RUN)/pre-commit run --all-files

format: $(VENV)/installed-dev
	$(RUN)/ruff check --fix --quiet . && $(RUN)/ruff format --quiet .
	$(RUN)/clang-format -i speculate/native/*.[ch] speculate/native/cuda/*

$(VENV)/installed:     EXTRAS := build,cpu
$(VENV)/installed-dev: EXTRAS := build,cpu,dev

# The build backend is pinned like the rest, hence no build isolation.
$(VENV)/installed $(VENV)/installed-dev: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(PIP) scikit-build-core cmake ninja cffi
	$(PIP) --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf build dist .pytest_cache .ruff_cache
