# Two commands for a fresh machine: `make demo` and `make test`. Both make their own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# two files of tests at a time, each on one thread: threads of several processes would wait for each other
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations 20

.PHONY: demo test lint slow clean

demo: $(VENV)/.installed
	$(BIN)/python train.py fit --config configs/recover/emoji.yaml --model.overwrite true

test: $(VENV)/.installed-dev lint
	$(TESTS) -m "not slow"

slow: $(VENV)/.installed-dev
	$(TESTS) -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf .typing && mkdir -p .typing/obsdiff
	ln -s $(CURDIR)/src/obsdiff/* $(CURDIR)/callbacks $(CURDIR)/data .typing/obsdiff/
	$(BIN)/mypy .typing/obsdiff train.py prune.py tests

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
