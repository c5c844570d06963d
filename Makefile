# Two commands: `make demo` and `make test`. The first of either makes .venv and installs; a later one installs nothing.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test check bench

demo: $(INSTALLED)
	$(BIN)/klmetric demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# `make bench ARGS=--quick` takes fewer rounds. It installs the libraries that it compares with.
bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/all.py $(ARGS)

# The environment, made once and made again when what it holds changes.
$(INSTALLED): pyproject.toml constraints.txt src/klmetric/_version.py
	@echo "Setting up .venv, once: PyTorch and the rest are installed, which takes some minutes and prints nothing."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
