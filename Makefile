# make run    set up (several GB), run the demo (about two minutes), print its results
# make ui     MLflow's UI on http://127.0.0.1:5000, until Ctrl-C; prints the links to open
# make test   set up and run all tests
# make docs   build the documentation site in site/ (no network needed)
# make lint   ruff, mypy, import-linter
# make cuda   check and measure everything that wants a GPU (eight minutes at most; SECTIONS="rates seeds" selects)
# make wheels download what `make cuda` needs besides torch to wheels/, for a machine without a package index

PYTHON ?= python3
PORT ?= 5000
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DVC_NO_ANALYTICS := 1

.PHONY: run ui test docs lint cuda wheels

# What torch 2.11 or newer, torchvision, timm, scikit-learn, pandas, safetensors and rich do not bring with them.
WHEELS := annotated-types pydantic pydantic_core typing_extensions typing-inspection
WHEELS_PYTHON ?= 3.12
# The wheels and the packages of $(PYTHON) take the place of .venv.
OFFLINE := $(if $(wildcard .venv),,$(wildcard wheels))

run: .venv/run
	@git rev-parse --git-dir > /dev/null 2>&1 || { echo "no Git repository, which DVC needs; run: git init" >&2; exit 2; }
	@python -m stages.fork_server dvc repro
	@echo
	@cat report/table.md
	@echo
	@echo "Report:      report/index.html (open it in a browser)"
	@echo "Submission:  submissions/best.csv (the best seed), submissions/bag.csv (the ensemble of all)"
	@echo "MLflow UI:   make ui"

ui: .venv/run
	@cxr ui --port $(PORT)

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

cuda: $(if $(OFFLINE),wheels/site,.venv/run)
	PYTHONPATH="$(CURDIR)$(if $(OFFLINE),:$(CURDIR)/wheels/site)" $(PYTHON) bench/gpu.py $(SECTIONS)

wheels:
	$(PYTHON) -m pip download --quiet --dest wheels --no-deps --only-binary=:all: --python-version $(WHEELS_PYTHON) \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		--constraint constraints.txt $(WHEELS)
	@du -sh wheels

wheels/site: $(wildcard wheels/*.whl)
	$(PYTHON) -m pip install --quiet --no-index --no-deps --target $@ $^

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; run: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv

.venv/run: .venv/bin/pip setup.cfg constraints.txt
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/test: .venv/run
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[docs,test]'
	@touch $@
