# make sample PROMPT="..."   a video from the shipped model      make test   the fast tests      make docs   the site
# make model                 trains the shipped model from scratch; SCALE=0.01 runs every stage in six minutes
# make test JOBS=8           in eight processes, of about 1.5 GB each
# Both create .venv on the first call (PYTHON=... chooses the interpreter) and need no network afterwards.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$p && break; done)
# The default sentence is held out: no training clip of the shipped model shows a red ball that rolls left.
PROMPT ?= a red ball rolls left on grass
OUT ?= out/sample.mp4
RUN ?= runs/shipped
SCALE ?= 1
JOBS ?= 2
BIN := .venv/bin

# $(value ...) and the environment pass quotes, dollars and 中文 to the program unchanged by make and the shell.
export KLING_PROMPT := $(value PROMPT)
export PYTHONUTF8 := 1

.PHONY: sample model test test-all docs lint clean

sample: .venv/.installed
	@$(BIN)/kling-sample --output "$(OUT)" --overwrite -- "$$KLING_PROMPT"

model: .venv/.installed
	@$(BIN)/kling-train-all configs/shipped.yaml out="$(RUN)" scale=$(SCALE)

# Processes of one thread each: the tests are too small for two threads to share. A hang in C code, which Python's timeout cannot end,
# prints every thread's stack, and its process is replaced.
test: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not slow and not gpu" \
		-o faulthandler_timeout=420 -o faulthandler_exit_on_timeout=true

test-all: .venv/.installed-dev
	$(BIN)/python -m pytest -q

# Builds the site of docs/ into site/. A broken link, or a page missing from the menu, is an error (with -q mkdocs would not count them).
docs: .venv/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "site/index.html"

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build out site *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found: install one, or call make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@ .venv/.installed
