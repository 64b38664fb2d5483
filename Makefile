# Each target makes .venv when it is missing. PYTHON chooses the interpreter (3.10 to 3.12).
PYTHON ?= python3
BIN := .venv/bin
DEMO := configs/demo.yaml

.PHONY: demo report evidence rivals test test-fast test-integration cluster-up cluster-down lint bench clean help
help:
	@echo "make demo       videos to a registered student, on this machine (results in runs/demo)"
	@echo "make report     after it: the paper's tables and figures with the demo's numbers"
	@echo "make evidence   an hour or more: which of the paper's orderings hold at the demo's scale (docs/evidence.md)"
	@echo "make rivals     hours: SAVi, STEVE, SOLV and DIOD on the demo's videos, beside its own models (docs/rivals.md)"
	@echo ".venv/bin/slotmatch   lists the stages, which run one by one too"
	@echo "make test       the tests, but the slow ones;  make test-fast  those without Ray"
	@echo "make test-integration   S3, jobs, many nodes and every fault, the slow ones too; ends with the fault table"
	@echo "make cluster-up a Ray cluster, an S3 server and MLflow on this machine;  make cluster-down  ends them"
	@echo "make lint       ruff and mypy"
	@echo "make bench      every performance figure that docs/costs.md quotes"
	@echo "make clean      removes .venv, caches and runs/"

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "installing into .venv (about 2 GB)"
	$(BIN)/python install.py --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/.installed
	$(BIN)/python -m jobs.pipeline $(DEMO)

report: .venv/.installed
	$(BIN)/python -m jobs.report $(DEMO)

evidence: .venv/.installed
	$(BIN)/python -m jobs.evidence $(DEMO) configs/sweeps/evidence.yaml

rivals: .venv/.installed
	$(BIN)/python -m jobs.rivals $(DEMO) configs/systems/demo_rivals.yaml

# By files, two at a time: most of them wait for other processes half of their time.
IN_PARALLEL := -n 2 --dist loadfile

test: .venv/.installed
	$(BIN)/python -m pytest -m "not slow" $(IN_PARALLEL)

test-fast: .venv/.installed
	$(BIN)/python -m pytest -m "not slow" --ignore tests/integration

test-integration: .venv/.installed
	$(BIN)/python -m pytest -m "fault or slow" $(IN_PARALLEL)

cluster-up: .venv/.installed
	$(BIN)/python -m cluster.local up

cluster-down: .venv/.installed
	$(BIN)/python -m cluster.local down

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.installed
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache .mypy_cache *.egg-info
