# `make demo` runs the main job on this machine; `make test` installs and passes the tests. Needs python3 and make.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: install demo test lint docs format clean

install: .venv/.installed

# What a run needs, without the developers' packages.
.venv/.runs: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[train]'
	touch $@

.venv/.installed: .venv/.runs
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[train,dev,docs]'
	touch $@

demo: .venv/.runs
	$(BIN)/bowstring run experiment=digits

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

docs: install
	$(BIN)/mkdocs serve

test: lint
	$(BIN)/python -m pytest -m "not slow and not gpu"

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
