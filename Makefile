# Two commands: `make demo` and `make test`. The first of either makes .venv and installs; a later one installs nothing.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test quick check docs bench wheels sanitize processors

demo: $(INSTALLED)
	$(BIN)/klmetric demo

# Tests are given out one by one, the slow ones first, so that both workers end together.
PYTEST := $(BIN)/python -m pytest -n 2 --maxschedchunk 1

test: $(INSTALLED)
	@echo "All tests: some eight minutes on two idle cores. (make quick: those that start no processes, and are quick.)"
	$(PYTEST)

quick: $(INSTALLED)
	@echo "What takes no second by itself, and starts no process: half of the time of all tests."
	$(PYTEST) -m "not slow"

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Random rows through a kernel that watches its memory and its arithmetic, at each level. It takes gcc, and two minutes.
sanitize: $(INSTALLED)
	$(BIN)/python tests/arithmetic/sanitize.py

# The kernel's bits on aarch64 beside those here. It takes qemu-aarch64 (Debian: qemu-user), and two minutes.
processors: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[wheels]'
	$(BIN)/python -m pytest tests/arithmetic/test_processors.py

# The site, in the folder `site`. It installs what builds it.
docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# `make bench ARGS=--quick` takes fewer rounds. It installs the libraries that it compares with.
bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/all.py $(ARGS)

# A wheel for each platform, in dist/: one compiler makes the kernel of all of them.
wheels: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[wheels]'
	for platform in linux-x86_64 linux-aarch64 macosx-x86_64 macosx-arm64 win-amd64; do \
		KLMETRIC_PLATFORM=$$platform $(BIN)/python -m hatchling build -t wheel || exit 1; \
	done

# The environment, made once and made again when what it holds changes.
$(INSTALLED): pyproject.toml constraints.txt src/klmetric/_version.py hatch_build.py $(wildcard src/klmetric/arithmetic/kernel/*)
	@echo "Setting up .venv, once: PyTorch and the rest are installed, which takes some minutes and prints nothing."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
