PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test lint figures notebooks docs benchmarks lab clean

help:  ## what each target does
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP)  ## .venv with the pinned versions and the package in it; instant the second time

# the stamp is written last, so that an install that failed is tried again
$(STAMP): pyproject.toml constraints.txt
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "constraints.txt needs Python 3.11 or newer: make install PYTHON=python3.11")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: install  ## find, graft and measure on the family in the repo
	$(BIN)/mechtransplant demo

test: install  ## all tests, on two processes
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n 2 --dist loadfile --durations 40

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy mechtransplant

figures: install  ## draw every committed figure again, from the tables that are committed
	$(BIN)/python scripts/make_figures.py
	$(BIN)/python benchmarks/report.py

notebooks: install  ## run every notebook at a small size, from top to bottom in a fresh kernel; writes nothing
	$(BIN)/python scripts/run_notebooks.py

docs: install  ## the documentation as a site, in site/
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict --quiet

# rows that are in the tables are kept: name a new folder to measure all of them
RESULTS ?= benchmarks/results

benchmarks: install  ## error rates, power, speed, and cost, and operators beside mergekit (fetched): about ten hours; RESULTS=FOLDER: elsewhere
	$(BIN)/python benchmarks/calibration.py --out $(RESULTS)
	$(BIN)/python benchmarks/coverage.py --out $(RESULTS)
	$(BIN)/python benchmarks/real_null.py --out $(RESULTS)
	$(BIN)/python benchmarks/power.py --out $(RESULTS)
	$(BIN)/python benchmarks/screens.py --out $(RESULTS)
	$(BIN)/python benchmarks/speed.py --out $(RESULTS)
	$(BIN)/python benchmarks/sweeps.py --out $(RESULTS)
	$(BIN)/python benchmarks/answers.py --out $(RESULTS)
	$(BIN)/python benchmarks/texts.py --out $(RESULTS)
	$(BIN)/python benchmarks/cost.py --out $(RESULTS)
	$(BIN)/python benchmarks/kills.py --out $(RESULTS)
	$(BIN)/python benchmarks/engines.py --out $(RESULTS)
	$(BIN)/python benchmarks/peers.py --out $(RESULTS)
	$(BIN)/python benchmarks/grafting_speed.py --out $(RESULTS)
	$(BIN)/python benchmarks/operators.py --out $(RESULTS)
	$(BIN)/python benchmarks/report.py --results $(RESULTS)

lab: install  ## open the notebooks
	$(BIN)/mechtransplant lab

clean:  ## remove caches, builds and demo runs; the environment stays
	rm -rf build dist runs/demo runs/scratch .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
