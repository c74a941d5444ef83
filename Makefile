# peftc.  `make` lists what there is.  Nothing has to be installed by hand first.
#
#   PY=path/to/python   use an environment that is already set up instead of .venv
#   T=name              ctest: only tests/c/test_name.c; test: passed to pytest as the path

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
PY ?= $(VENV)/bin/python
CC := $(if $(filter default,$(origin CC)),gcc,$(CC))
CLANG ?= clang
FUZZ_SECONDS ?= 60

# ---------------------------------------------------------------- C: shared by tests and fuzzers

WARN := -Wall -Wextra -Wshadow -Wconversion -Wsign-conversion -Wstrict-prototypes -Wvla -Wpointer-arith -Wundef -Werror
CORE_C := $(sort $(wildcard src/core/*.c src/kernels/*.c src/methods/*.c src/formats/*.c))
CORE_H := $(sort $(wildcard src/core/*.h src/kernels/*.h src/methods/*.h src/formats/*.h))

# Asked once per run, and only by the targets that compile.
blas_include = $(eval blas_include := $$(shell $(PY) -c 'import scipy_openblas32 as b; print(b.get_include_dir())'))$(blas_include)
blas_lib = $(eval blas_lib := $$(shell $(PY) -c 'import scipy_openblas32 as b; print(b.get_lib_dir())'))$(blas_lib)
cjson_cflags = $(eval cjson_cflags := $$(shell pkg-config --cflags libcjson))$(cjson_cflags)
cjson_libs = $(eval cjson_libs := $$(shell pkg-config --libs libcjson))$(cjson_libs)

SAN := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
C_FLAGS = -std=c11 -O1 -g $(WARN) $(SAN) -DPC_TEST_HOOKS -Isrc -isystem $(blas_include) $(cjson_cflags)
C_LIBS = -L$(blas_lib) -Wl,-rpath,$(blas_lib) -lscipy_openblas $(cjson_libs) -lm -pthread

# ---------------------------------------------------------------- C tests

CT := build/ctest
CT_OBJ := $(CORE_C:%.c=$(CT)/%.o)
CT_ALL := $(patsubst tests/c/%.c,$(CT)/%,$(sort $(wildcard tests/c/test_*.c)))
CT_RUN := $(if $(T),$(CT)/test_$(patsubst test_%,%,$(basename $(notdir $(T)))),$(CT_ALL))

$(CT)/src/%.o: src/%.c
	@mkdir -p $(@D)
	$(CC) $(C_FLAGS) -MMD -MP -c $< -o $@

$(CT)/libpeftc.a: $(CT_OBJ)
	@rm -f $@
	ar rcs $@ $^

$(CT)/test_%: tests/c/test_%.c $(CT)/libpeftc.a tests/c/check.h
	$(CC) $(C_FLAGS) -MMD -MP -MF $@.d $< $(CT)/libpeftc.a $(C_LIBS) -o $@

-include $(CT_OBJ:.o=.d) $(addsuffix .d,$(CT_ALL))

.PHONY: ctest
ctest: $(CT_RUN) ## C tests under AddressSanitizer and UBSan, with allocations made to fail (T=name: one of them)
	@bad=0; for t in $(CT_RUN); do \
	  printf '%-28s' "$$(basename $$t)"; \
	  ASAN_OPTIONS=detect_leaks=1:allocator_may_return_null=1:detect_stack_use_after_return=1 \
	  UBSAN_OPTIONS=print_stacktrace=1 $$t || bad=1; \
	done; exit $$bad

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12
