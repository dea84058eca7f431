# `make help` lists the targets. `make serve` and `make test` need only make and Python 3.11 or later with venv.
PYTHON ?= python3
PORT   ?= 8000
BUNDLE ?= models/zoo/cifar100-msdnet
RECIPE ?= cifar100-fast
RUN    ?= runs/$(RECIPE)
DATA   ?= $(EXITSERVE_DATA)
PHOTOS ?=
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --no-compile --quiet --disable-pip-version-check --constraint constraints.txt
# Byte-compiles on all cores; pip would do it on one, which takes longer than installing. Packages' own tests are left
# out, and errors are ignored: packages contain templates that are not valid Python.
TO_BYTECODE := $(BIN)/python -m compileall -qq -j 0 -x '/(tests|pip)/' $(VENV)/lib || true

# The compiler that setuptools will use. It is tried first, as without it or Python's headers setuptools prints a trace.
C_COMPILER  := import os, sysconfig as s; print(os.environ.get("CC") or s.get_config_var("CC"), "-I" + s.get_path("include"))
NO_COMPILER := error: no C compiler that finds Python.h. Install both (Debian, Ubuntu: apt-get install gcc libc6-dev \
  python3-dev), or serve without compiling, which is optional.
PARALLEL    := -m "not gpu" -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
# Tests of the compiled modules: the engine and its budget, in parts, as a whole, and in a server.
COMPILED    := tests/service/engine tests/service/budget tests/service/runners/test_slots.py \
  tests/service/runners/test_limits.py tests/service/runners/test_runner_onnx.py tests/service/plan/test_plan_simulation.py \
  tests/service/front/test_front_engine.py tests/service/test_compiled.py tests/service/test_serving_real.py \
  tests/promises --ignore tests/promises/test_interface.py --ignore tests/service/budget/test_budget_real.py \
  -k "not cifar100-msdnet and not 8192"

.PHONY: help serve setup compile pure test test-compiled test-gpu check format bench league train secrets configuration dashboard check-containers clean

help:            ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

serve: $(VENV)/.serve  ## serve BUNDLE on PORT (installs its dependencies into .venv)
	$(BIN)/python -m service --bundle $(BUNDLE) --port $(PORT)

setup: $(VENV)/.dev    ## install the dependencies of training, tests and benchmarks into .venv

compile: $(VENV)/.compile  ## compile the engine's modules to C, in place: more images per second (needs a C compiler)
	@echo '#include <Python.h>' | $$($(BIN)/python -c '$(C_COMPILER)') -E - >/dev/null 2>&1 || { echo '$(NO_COMPILER)'; exit 2; }
	@$(MAKE) --no-print-directory pure
	EXITSERVE_COMPILE=1 $(BIN)/python setup.py --quiet build_ext --inplace --force

pure:            ## undo `make compile`: the modules run as Python again
	find service -name '*.so' -delete

test: $(VENV)/.dev     ## run the tests in parallel, by file; then tests/alone, which compares wall-clock times
	$(BIN)/python -m pytest $(PARALLEL) --ignore tests/alone
	$(BIN)/python -m pytest tests/alone

test-compiled: $(VENV)/.dev compile  ## compile, then run the tests of the compiled modules
	$(BIN)/python -m pytest $(PARALLEL) $(COMPILED)
	$(BIN)/python -m pytest tests/alone/test_host_benchmark.py

test-gpu: $(VENV)/.dev  ## on a machine with a GPU: run the tests that need one (some minutes)
	$(BIN)/python -m pytest -m gpu

check: $(VENV)/.dev    ## check lint, format, types and the imports between packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --cache-dir build/imports

format: $(VENV)/.dev   ## fix lint and format where possible
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev    ## measure the engine on BUNDLE, then run `league` (keep the machine idle meanwhile)
	$(BIN)/python -m benchmarks.engine --bundle $(BUNDLE) $(if $(DATA),--data $(DATA))
	$(MAKE) league

league: $(VENV)/.dev   ## compare the service with servers in common use, on DATA and PHOTOS (image folder)
	$(BIN)/python -m benchmarks.league --quick $(foreach set,$(DATA) $(PHOTOS),--data $(set)) --output build/league/table.md

train: $(VENV)/.dev    ## train RECIPE on DATA into RUN; the same command resumes
	@test -n '$(DATA)' || { echo 'error: no images given: make train DATA=cifar-100-python.tar.gz (or a folder with train/ and val/)'; exit 2; }
	$(BIN)/python -m training train $(RUN) --recipe $(RECIPE) --data $(DATA)

# World-readable files, for the containers' users, who read them through mounts; only the owner may enter the folder.
secrets:         ## create docker compose's secrets once, in docker/secrets: an admin token, Grafana's password
	@chmod 700 docker/secrets
	@cd docker/secrets && for name in admin-token grafana-password; do \
	  test -s $$name || { head -c 24 /dev/urandom | base64 | tr '+/' '-_' > $$name && chmod 444 $$name; }; done
	@echo "docker/secrets/admin-token, docker/secrets/grafana-password"

configuration: $(VENV)/.dev  ## write docs/configuration.md from service/settings.py
	$(BIN)/python -m service.reference > docs/configuration.md

dashboard: $(VENV)/.dev  ## write Grafana's dashboard from docker/grafana/panels.toml
	$(BIN)/python -m docker.grafana.dashboard

check-containers:  ## build the images, run the stack and check it (as root; for the programs it needs, see docker/check.py)
	$(PYTHON) -m docker.check

clean: pure      ## remove the environment, caches and compiled modules (keeps runs/)
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis build/lib.* build/temp.* build/service build/ops.txt

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ExitServe needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[client]'
	@$(TO_BYTECODE)
	@touch $@

$(VENV)/.compile: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[client,compile]'
	@$(TO_BYTECODE)
	@touch $@ $(VENV)/.serve

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	@$(TO_BYTECODE)
	@touch $@ $(VENV)/.serve $(VENV)/.compile
