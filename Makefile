# Every target sets itself up: a fresh clone needs only Python >= 3.11, pip, git and make.
PYTHON   ?= python3
PIP_ARGS ?=
VENV     := .venv
BIN      := $(VENV)/bin
STAMP    := $(VENV)/.installed
TRACKERS := .venv-trackers

.DEFAULT_GOAL := help
.PHONY: help setup run test test-slow test-trackers faults lab book docs docs-quarto preview bench readme export clean fetch

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv with the pinned versions (every other target does it for you)

$(VENV)/bin/python $(TRACKERS)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"development needs Python >= 3.11, and $(PYTHON) is {v.major}.{v.minor}; try: make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(@:/bin/python=) || { rm -rf $(@:/bin/python=); echo "no working venv module: using virtualenv from a private folder"; \
	  $(PYTHON) -m pip install --quiet --target .venv-tool virtualenv && PYTHONPATH=.venv-tool $(PYTHON) -m virtualenv --quiet $(@:/bin/python=); rm -rf .venv-tool; test -x $@; }

$(STAMP): $(VENV)/bin/python settings.ini setup.py pyproject.toml constraints.txt
	@echo "installing the pinned environment (torch's default build for this platform: about 200 MB for CPU builds, several GB for CUDA builds on Linux; choose with PIP_ARGS=...)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[all]'
	@touch $@

fetch: $(STAMP)
	@$(BIN)/dmr streams fetch text8 --quiet

run: fetch  ## the main job: compare the routings on text8; table, figures and HTML report in runs/
	@$(BIN)/dmr run

test: fetch  ## the fast tier: notebooks, pytest, export sync, lint, types (under 15 minutes on 2 cores)
	$(BIN)/ruff check nbs tests dmr setup.py
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile
	$(BIN)/nbdev_test --n_workers 2

# these tests kill processes and watch clocks: what fails on a busy machine gets one second chance
test-slow: fetch  ## the rest: several processes, cluster, browser, small real studies
	$(BIN)/python -m pytest -m slow || $(BIN)/python -m pytest -m slow --last-failed --last-failed-no-failures none

# MLflow and trackio ask for older versions than the pinned ones: first the pins, then what the trackers ask for
$(TRACKERS)/.installed: $(TRACKERS)/bin/python settings.ini setup.py pyproject.toml constraints.txt
	@echo "installing MLflow, trackio and W&B with the project into $(TRACKERS) (choose torch's build with PIP_ARGS=...)"
	@$(TRACKERS)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[experiments,hf,lightning]' pytest pytest-timeout tensorboard
	@$(TRACKERS)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e '.[mlflow,trackio,wandb]' $$(grep -E '^(mlflow|trackio|wandb)==' constraints.txt)
	@touch $@

test-trackers: $(TRACKERS)/.installed  ## loggers and exports with MLflow, trackio and W&B, in an environment of their own
	$(TRACKERS)/bin/python -c 'import mlflow, trackio, wandb'
	$(TRACKERS)/bin/python -m pytest tests/frameworks/test_loggers.py tests/reporting/test_export.py

faults: $(STAMP)  ## over 500 faults thrown at a tiny study and its checkpoints; writes results/faults.csv
	$(BIN)/python tests/faults/attack.py --out results/faults.csv

lab: $(STAMP)  ## open the book in JupyterLab with this environment's kernel
	@$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name "Python 3 (dmr)" >/dev/null
	$(BIN)/jupyter lab nbs

docs: $(STAMP)  ## build the site into _docs/ from the committed outputs, without Quarto
	@$(BIN)/python -m dmr.book.site build

docs-quarto: $(STAMP)  ## the same site with Quarto, where it is installed
	@$(BIN)/python -m dmr.book.site build --quarto

book: fetch  ## execute the chapters whose cells or code changed since they were last executed
	@$(BIN)/python -m dmr.book.freshness execute

preview: docs  ## build and serve the site
	@$(BIN)/python -m dmr.book.site serve

bench: fetch  ## measure the router's cost; writes results/performance.csv
	@$(BIN)/python -m dmr.book.performance

readme: fetch  ## take the last `make run` into results/readme.csv, the home page and README.md
	@cp runs/demo/report/runs.csv results/readme.csv
	@$(BIN)/python -m dmr.book.freshness execute nbs/index.ipynb
	@$(BIN)/python -m dmr.book.home

export: $(STAMP)  ## write dmr/ and README.md from the notebooks
	@$(BIN)/nbdev_export
	@$(BIN)/python -m dmr.book.home

clean:  ## remove built files and runs (not .venv, not the stream cache)
	rm -rf _proc _docs runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
