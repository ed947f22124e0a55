# make run    set up, run the demo, say where its results are
# make ui     MLflow's UI on http://127.0.0.1:5000
# make test   set up and run every test
# make docs   build the documentation site in site/ (no network needed)
# make lint   ruff, mypy, and the contracts of the layout

PYTHON ?= python3
PORT ?= 5000
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DVC_NO_ANALYTICS := 1

.PHONY: run ui test docs lint

run: .venv/run
	@dvc repro
	@echo
	@cat report/table.md
	@echo
	@echo "Report:      report/index.html (open it in a browser)"
	@echo "Submission:  submissions/best.csv (the best model), submissions/bag.csv (all of them)"
	@echo "MLflow UI:   make ui"

ui: .venv/run
	@case "$$MLFLOW_TRACKING_URI" in \
	http*) echo "The runs are on $$MLFLOW_TRACKING_URI";; \
	*) MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --workers 1 --host 127.0.0.1 --port $(PORT) \
		--backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/mlflow.db}";; \
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
