PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test lint figures notebooks benchmarks lab clean

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
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy mechtransplant

figures: install  ## draw every committed figure again, from the tables that are committed
	$(BIN)/python scripts/make_figures.py
	$(BIN)/python benchmarks/report.py

notebooks: install  ## run every notebook from top to bottom; the copies go to a temporary folder
	@out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; \
	for notebook in notebooks/*.ipynb; do \
		test -e "$$notebook" || { echo "no notebooks yet"; break; }; \
		echo "$$notebook"; \
		$(BIN)/jupyter nbconvert --log-level WARN --to notebook --execute --output-dir "$$out" "$$notebook" || exit 1; \
	done

benchmarks: install  ## error rates, power, speed, and cost, and operators beside mergekit (fetched): about eight hours
	$(BIN)/python benchmarks/calibration.py
	$(BIN)/python benchmarks/coverage.py
	$(BIN)/python benchmarks/real_null.py
	$(BIN)/python benchmarks/power.py
	$(BIN)/python benchmarks/screens.py
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/sweeps.py
	$(BIN)/python benchmarks/answers.py
	$(BIN)/python benchmarks/texts.py
	$(BIN)/python benchmarks/cost.py
	$(BIN)/python benchmarks/kills.py
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/grafting_speed.py
	$(BIN)/python benchmarks/operators.py
	$(BIN)/python benchmarks/report.py

lab: install  ## open the notebooks
	$(BIN)/mechtransplant lab

clean:  ## remove caches, builds and demo runs; the environment stays
	rm -rf build dist runs/demo runs/scratch .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
