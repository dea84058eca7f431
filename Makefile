# ExitServe: the verbs of the day. `make serve` and `make test` need nothing but Python 3.11 or later and make.
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
# To bytecode, which takes pip longer than to install, since it has one core do it; but for packages' own tests, which
# nobody runs here. Packages hold files that are no Python: that is not told.
TO_BYTECODE := $(BIN)/python -m compileall -qq -j 0 -x '/(tests|pip)/' $(VENV)/lib || true

# What setuptools will compile with, which ends in a trace where it or Python's headers are missing.
C_COMPILER  := import os, sysconfig as s; print(os.environ.get("CC") or s.get_config_var("CC"), "-I" + s.get_path("include"))
NO_COMPILER := error: no C compiler that finds Python.h. Install both (Debian, Ubuntu: apt-get install gcc libc6-dev \
  python3-dev), or serve as it is: nothing has to be compiled.
SIDE_BY_SIDE := -m "not gpu" -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
# Tests of what is compiled: the engine and its budget, in parts, whole, and in a server.
COMPILED    := tests/service/engine tests/service/budget tests/service/runners/test_slots.py \
  tests/service/runners/test_limits.py tests/service/runners/test_runner_onnx.py tests/service/plan/test_plan_simulation.py \
  tests/service/front/test_front_engine.py tests/service/test_compiled.py tests/service/test_serving_real.py \
  tests/promises --ignore tests/promises/test_interface.py --ignore tests/service/budget/test_budget_real.py

.PHONY: help serve setup compile pure test test-compiled test-gpu check format bench league train secrets configuration dashboard check-containers clean

help:            ## list the verbs
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

serve: $(VENV)/.serve  ## serve BUNDLE on PORT (installs what serving needs into .venv)
	$(BIN)/python -m service --bundle $(BUNDLE) --port $(PORT)

setup: $(VENV)/.dev    ## install what training, tests and benchmarks need into .venv

compile: $(VENV)/.compile  ## compile the engine's modules to C, in place: more images a second (needs a C compiler)
	@echo '#include <Python.h>' | $$($(BIN)/python -c '$(C_COMPILER)') -E - >/dev/null 2>&1 || { echo '$(NO_COMPILER)'; exit 2; }
	@$(MAKE) --no-print-directory pure
	EXITSERVE_COMPILE=1 $(BIN)/python setup.py --quiet build_ext --inplace --force

pure:            ## remove what `make compile` made: the modules run as Python again
	find service -name '*.so' -delete

test: $(VENV)/.dev     ## run the tests: a file a core and one more at a time, then tests/alone, which compares times of a clock
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --ignore tests/alone
	$(BIN)/python -m pytest tests/alone

test-compiled: $(VENV)/.dev compile  ## compile, then run the tests of what is compiled
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(COMPILED)
	$(BIN)/python -m pytest tests/alone/test_host_benchmark.py

test-gpu: $(VENV)/.dev  ## on a GPU: run the tests that need one, some minutes
	$(BIN)/python -m pytest -m gpu

check: $(VENV)/.dev    ## lint, format, types, and which room imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --cache-dir build/imports

format: $(VENV)/.dev   ## mend what lint and format can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev    ## measure the engine on BUNDLE, then the league (keep the machine idle meanwhile)
	$(BIN)/python -m benchmarks.engine --bundle $(BUNDLE) $(if $(DATA),--data $(DATA))
	$(MAKE) league

league: $(VENV)/.dev   ## measure the service beside the servers people use, on DATA and PHOTOS (an image folder)
	$(BIN)/python -m benchmarks.league --quick $(foreach set,$(DATA) $(PHOTOS),--data $(set)) --output build/league/table.md

train: $(VENV)/.dev    ## train RECIPE on DATA into RUN; the same command resumes
	@test -n '$(DATA)' || { echo 'which images? make train DATA=cifar-100-python.tar.gz (or a folder with train/ and val/)'; exit 2; }
	$(BIN)/python -m training train $(RUN) --recipe $(RECIPE) --data $(DATA)

# World-readable files in a folder that only its owner may enter: the containers' users read them through mounts.
secrets:         ## make what docker compose needs secret: an admin token and Grafana's password, once, in docker/secrets
	@chmod 700 docker/secrets
	@cd docker/secrets && for name in admin-token grafana-password; do \
	  test -s $$name || { head -c 24 /dev/urandom | base64 | tr '+/' '-_' > $$name && chmod 444 $$name; }; done
	@echo "docker/secrets/admin-token, docker/secrets/grafana-password"

configuration: $(VENV)/.dev  ## write docs/configuration.md from service/settings.py
	$(BIN)/python -m service.reference > docs/configuration.md

dashboard: $(VENV)/.dev  ## write Grafana's dashboard from docker/grafana/panels.toml
	$(BIN)/python -m docker.grafana.dashboard

check-containers:  ## build the images and run the stack for real (root; Debian's buildah, podman, mmdebstrap, prometheus)
	$(PYTHON) -m docker.check

clean: pure      ## remove the environment, caches and what was compiled (runs/ stay)
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
