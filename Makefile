# make run    set up (several GB), run the demo (about three minutes), print its results
# make ui     MLflow's UI on http://127.0.0.1:5000, until Ctrl-C
# make test   set up and run all tests
# make docs   build the documentation site in site/ (no network needed)
# make lint   ruff, mypy, import-linter

PYTHON ?= python3
PORT ?= 5000
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DVC_NO_ANALYTICS := 1

.PHONY: run ui test docs lint

run: .venv/run
	@git rev-parse --git-dir > /dev/null 2>&1 || { echo "no Git repository, which DVC needs; run: git init" >&2; exit 2; }
	@dvc repro
	@echo
	@cat report/table.md
	@echo
	@echo "Report:      report/index.html (open it in a browser)"
	@echo "Submission:  submissions/best.csv (the best seed), submissions/bag.csv (the ensemble of all)"
	@echo "MLflow UI:   make ui"

ui: .venv/run
	@case "$$MLFLOW_TRACKING_URI" in \
	http*) echo "The runs are on $$MLFLOW_TRACKING_URI";; \
	*) MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --workers 1 --host 127.0.0.1 --port $(PORT) \
		--backend-store-uri "$$(python -m pipeline.tracking.tracking_uri)";; \
	esac

test: .venv/test
	pytest -n 2 --dist worksteal

docs: .venv/test
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict
	@echo "Documentation: site/index.html (open it in a browser)"

lint: .venv/test
	ruff check
	ruff format --check
	mypy
	lint-imports --no-logo --no-cache

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; run: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv

.venv/run: .venv/bin/pip setup.cfg constraints.txt
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/test: .venv/run
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[docs,test]'
	@touch $@
