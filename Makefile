# Every target sets up what it needs. `make PYTHON=python3.12 test` picks another interpreter.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
BIN := $(VENV)/bin
# Processes that run tests side by side: one for each core, eight at most. `make WORKERS=0 test` keeps one process.
WORKERS ?= $(shell cores=$$(nproc); echo $$((cores < 8 ? cores : 8)))
PIP := $(BIN)/python -m pip --disable-pip-version-check
IN_RANGE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c "$(IN_RANGE)" 2>/dev/null && echo $$p && break; done)

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: install
install: $(VENV)/.installed ## Create .venv with the plugin, RecBole and the test tools

.PHONY: demo
demo: install ## Train and evaluate HSTU on ml-100k, on a GPU if there is one
	$(BIN)/hstu-recbole demo

.PHONY: test
test: $(VENV)/.torchrec ## Run the tests; no GPU needed. PYTEST_ARGS adds options
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

.PHONY: lint
lint: install ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: format
format: install ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: readme
readme: install ## Bring the tables of README.md up to date with the recorded results
	$(BIN)/python -m benchmarks.update_readme

.PHONY: install-torchrec
install-torchrec: install ## Add TorchRec and TorchX: the CUDA build beside an NVIDIA GPU, else the CPU build
	@if nvidia-smi -L 2>/dev/null | grep -q GPU; then \
	  echo "NVIDIA GPU found: installing the CUDA build"; \
	  $(PIP) install -c constraints.txt -e '.[torchrec,torchx]'; \
	else \
	  echo "no NVIDIA GPU: installing the CPU build"; \
	  $(PIP) install -c constraints.txt ./packaging/fbgemm-gpu-cpu-shim -e '.[torchrec-cpu,torchx]'; \
	fi
	@touch $(VENV)/.torchrec

.PHONY: clean
clean: ## Remove .venv and everything built
	rm -rf $(VENV) build dist *.egg-info kernels/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Two stamps: a changed pyproject.toml updates the environment in place instead of fetching torch again.
$(VENV)/.created:
	@if [ -z "$(PYTHON)" ] || ! $(PYTHON) -c "$(IN_RANGE)"; then \
	  echo "hstu-plugin needs Python 3.11 or 3.12, found $$($(or $(PYTHON),python3) --version 2>&1 | head -n 1);" \
	       "name one with: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; \
	fi
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# RecBole goes in without its dependencies: its metadata demands ray<=2.6.3, which nothing here uses and which is not to
# be had for Python 3.12. The recbole extra lists what RecBole really imports.
$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e '.[recbole,dev]'
	$(PIP) install -c constraints.txt --no-deps recbole
	@touch $@

# Tests need it once; install-torchrec by name always installs anew.
$(VENV)/.torchrec: $(VENV)/.installed packaging/fbgemm-gpu-cpu-shim/pyproject.toml
	$(MAKE) --no-print-directory install-torchrec
