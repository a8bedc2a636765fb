# make demo: train 13 numbers of a real language model and see what they did.
# make test: style, types and tests.
# Both set up .venv by themselves; when nothing changed, a second run installs nothing and needs no network.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# With PYTHON=/path/to/python you choose; else the first of these that runs and is at least 3.11.
PYTHON ?=
PYTHONS := $(if $(PYTHON),$(PYTHON),python3.13 python3.12 python3.11 python3)

# nvidia-smi may be there without a GPU, so it has to succeed.
CONSTRAINTS := -c constraints/tested.txt $(shell nvidia-smi >/dev/null 2>&1 || echo "-c constraints/cpu.txt")
LOWEST := -c constraints/lowest.txt $(shell nvidia-smi >/dev/null 2>&1 || echo "-c constraints/cpu.txt")

# Images for containers often set this, and then every process would compile torch and transformers anew.
unexport PYTHONDONTWRITEBYTECODE

# The stamp's name carries the hash of what decides on the environment: change that, and it is set up anew.
INPUTS_HASH := $(shell (cat pyproject.toml constraints/*.txt; echo "$(CONSTRAINTS)") | cksum | cut -d' ' -f1)
STAMP := .venv/.ready-$(INPUTS_HASH)
BENCH_STAMP := .venv-bench/.ready-$(INPUTS_HASH)
INTEROP_STAMP := .venv-interop/.ready-$(INPUTS_HASH)
BROWSER_STAMP := .venv-browser/.ready-$(INPUTS_HASH)
LOWEST_STAMP := .venv-lowest/.ready-$(INPUTS_HASH)
DOCS_STAMP := .venv-docs/.ready-$(INPUTS_HASH)

# For make test-processors (else all of them) and make test-lowest (else those that touch other libraries).
TESTS ?=
TOUCHING := $(addprefix tests/,models interop tasks/test_prompt.py tasks/test_latex.py training/test_train.py cli/test_common.py \
  system/test_progress.py sweeps/test_figure.py config/test_toml_text.py store/test_run_folder.py)

# For make report-check. A Chromium that is there already is used; without one, playwright fetches its own.
PAGES ?= $(wildcard runs/*/report.html)
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

.PHONY: help demo test test-processors test-lowest lint format bench-setup interop-setup report-check docs docs-serve clean

help:
	@echo "make demo         train 13 numbers of a real model, and measure what they changed (7 to 14 minutes on 2 newer cores)"
	@echo "make test         ruff, mypy and the tests"
	@echo "make test-processors  the tests once for each older kind of processor that this one can stand for"
	@echo "make test-lowest  the tests that touch other libraries, under the lowest versions that pyproject.toml allows, in .venv-lowest"
	@echo "make lint         ruff and mypy only"
	@echo "make format       let ruff reformat the code"
	@echo "make bench-setup  an environment of its own, .venv-bench, with the peers that bench/ compares with"
	@echo "make interop-setup  another, .venv-interop, with llama.cpp and lm-evaluation-harness (compiles for minutes)"
	@echo "make report-check  open reports in a headless browser (PAGES='a.html b.html'; else all in runs/)"
	@echo "make docs         build the site of docs/ into site/ (docs-serve shows it at http://127.0.0.1:8000)"
	@echo "make clean        remove all environments and site/ (the model cache stays: see tinylora cache)"

demo: $(STAMP)
	.venv/bin/tinylora train demo

# Two workers of one thread each, a file of tests at a time: the models are tiny, so threads would only wait for each other.
test: lint
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The tests that depend on the processor, on older ones than this: oneDNN, torch's operators and our kernels pretend.
test-processors: $(STAMP)
	for isa in "AVX2 avx2" "AVX512_CORE avx512" "AVX512_CORE_BF16 avx512" "AVX2 default"; do \
	  set -- $$isa; \
	  if [ $$2 = avx512 ] && ! .venv/bin/python -c "import sys, torch; sys.exit(not torch.backends.cpu.get_cpu_capability().startswith('AVX512'))"; \
	  then echo "== this processor has no AVX-512, so it cannot stand for $$1"; continue; fi; \
	  echo "== oneDNN and our kernels up to $$1, torch's operators at $$2"; \
	  ONEDNN_MAX_CPU_ISA=$$1 ATEN_CPU_CAPABILITY=$$2 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE \
	    .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q $(or $(TESTS),tests) || exit 1; \
	done

# The tests that touch other libraries, under the lowest versions of them that pyproject.toml allows (but for torch).
# Warnings are no errors there: old versions warn of what they have mended since.
test-lowest: $(LOWEST_STAMP)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv-lowest/bin/python -m pytest -n 2 --dist loadfile \
	  --no-loadscope-reorder -q -W default $(or $(TESTS),$(TOUCHING))

lint: $(STAMP)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: $(STAMP)
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench-setup: $(BENCH_STAMP)

interop-setup: $(INTEROP_STAMP)

report-check: $(BROWSER_STAMP)
	@test -n "$(strip $(PAGES))" || { echo "there is no page to check; write one with: tinylora report runs/demo-001" >&2; exit 2; }
	.venv-browser/bin/python -m bench.trust.report_screens $(PAGES)

# mkdocs.yml says what becomes of docs/. Without the variable each run prints a notice about versions to come.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build
	@echo "open site/index.html; searching it needs make docs-serve"

docs-serve: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs serve

# $(1): folder of the environment, $(2): what pip installs, $(3): constraints other than the tested versions. A folder
# without the stamp is not trusted, only reused. pip would compile 17,000 files in minutes; Python compiles the tenth of
# them that is used when it first imports them.
define set_up
	@found=""; \
	for candidate in $(PYTHONS); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found="$$candidate"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "tinylora needs Python 3.11 or newer, and none of these is: $(PYTHONS). Install one, or run make again with PYTHON=/path/to/python" >&2; \
	  exit 1; \
	fi; \
	if ! $(1)/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	  echo "creating $(1) with $$found"; rm -rf $(1); \
	  "$$found" -m venv $(1) || { echo "$$found cannot create $(1); on Debian and Ubuntu, install its venv package" >&2; exit 1; }; \
	fi
	@rm -f $(1)/.ready-*
	$(1)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check $(or $(3),$(CONSTRAINTS)) $(2)
	@touch $@
endef

$(STAMP):
	$(call set_up,.venv,-e '.[test]')

# The lowest numpy has no wheels for newer ones.
$(LOWEST_STAMP): PYTHONS := $(if $(PYTHON),$(PYTHON),python3.11 python3.12)
$(LOWEST_STAMP):
	$(call set_up,.venv-lowest,-e '.[test]',$(LOWEST))

$(BENCH_STAMP):
	$(call set_up,.venv-bench,-e '.[peft]' trl)

$(INTEROP_STAMP):
	$(call set_up,.venv-interop,llama-cpp-python 'lm-eval[hf,math]' transformers peft accelerate)

$(BROWSER_STAMP):
	$(call set_up,.venv-browser,playwright)
	$(if $(CHROMIUM),,.venv-browser/bin/python -m playwright install chromium)

$(DOCS_STAMP):
	$(call set_up,.venv-docs,'mkdocs<2' 'mkdocs-material<10')

clean:
	rm -rf .venv .venv-lowest .venv-bench .venv-interop .venv-browser .venv-docs site .mypy_cache .pytest_cache .ruff_cache
