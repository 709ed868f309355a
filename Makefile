# PYTHON makes the environment in VENV; PIP_ARGS go to pip, ARGS to the command a target runs.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PIP_ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := server models kernels offramp tests

.PHONY: install serve test test-clients drill sanitize sanitize-threads fuzz lint type docs bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[fast,test,dev,train,otel]'
	touch $@

serve: install
	$(BIN)/offramp serve $(ARGS)

# Some tests use real weights; they are kept in the cache, so this downloads once.
# One thread: several wait for each other longer than they compute on tiny tensors.
# A file's tests go to one of WORKERS processes, each of which takes up to 2 GB.
WORKERS ?= 2
test: export OMP_NUM_THREADS ?= 1
test: install
	$(BIN)/offramp pull smollm2-135m
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Client libraries and judges against a live server, each in an environment of its own that is kept in
# .venv-clients. Writes docs/conformance.md; ARGS='--peer llamacpp' puts llama.cpp's server beside it.
test-clients: export OMP_NUM_THREADS ?= 1
test-clients: install
	$(BIN)/offramp pull smollm2-135m
	$(BIN)/python -m tests.clients.run $(ARGS)

# A server of the tiny model, and what may befall one: its engine killed, clients that leave, a full disk
# and more, in some three minutes. ARGS='--soak 3600' then loads a server for an hour and draws its memory.
drill: export OMP_NUM_THREADS ?= 1
drill: install
	$(BIN)/python -m tests.drill.run $(ARGS)

# The C kernels' tests with the address and undefined-behaviour sanitizers of GCC, built for MARCH.
MARCH ?= native
sanitize: install
	ASAN_OPTIONS=detect_leaks=0,verify_asan_link_order=0 OFFRAMP_CACHE_DIR=$(VENV)/sanitize \
	CFLAGS='-fsanitize=address,undefined -fno-sanitize-recover=undefined -g -O1 -march=$(MARCH)' \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	$(BIN)/python -m pytest tests/kernels/test_decoder.py tests/kernels/test_weight_formats.py \
	tests/kernels/test_lm_head.py tests/kernels/test_draw_tokens.py tests/models/test_drafting.py \
	tests/kernels/test_bounds.py \
	tests/models/test_hostile_config.py $(ARGS)

# Their threads with the thread sanitizer: OpenMP's regions run on plain threads, which it sees, at addresses
# that are not random, which it needs.
sanitize-threads: install
	TSAN_OPTIONS="exitcode=66 suppressions=$(CURDIR)/tests/kernels/tsan.supp" \
	OFFRAMP_CACHE_DIR=$(VENV)/sanitize TEST_THREADS=3 OMP_NUM_THREADS=3 \
	CFLAGS='-fsanitize=thread -g -O1 -march=$(MARCH) -Wl,-Bsymbolic $(CURDIR)/tests/kernels/openmp_by_pthreads.c' \
	LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)" \
	setarch -R $(BIN)/python -m pytest -s tests/kernels/test_decoder.py \
	tests/kernels/test_weight_formats.py tests/kernels/test_lm_head.py tests/kernels/test_draw_tokens.py \
	tests/models/test_drafting.py $(ARGS)

# What nobody should send or load: 11,000 bodies, 2,000 files of weights, 1,500 of heads, from FUZZ_SEED.
FUZZ_SEED := $(or $(FUZZ_SEED),$(shell date +%s))
fuzz: export OMP_NUM_THREADS ?= 1
fuzz: install
	@echo FUZZ_SEED=$(FUZZ_SEED)
	FUZZ_SEED=$(FUZZ_SEED) FUZZ_BODIES=1000 FUZZ_FILES=2000 $(BIN)/python -m pytest --timeout 0 \
	--hypothesis-seed $(FUZZ_SEED) tests/server/test_fuzz.py tests/models/test_hostile_files.py $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile
	$(BIN)/clang-format --dry-run --Werror kernels/native/*.[ch] tests/kernels/*.c

type: install
	$(BIN)/mypy

# Pages that are made from the code; a test fails where they are not current.
docs: install
	$(BIN)/python -m offramp.server.options > docs/options.md
	$(BIN)/python -m offramp.server.instruments > docs/metrics.md

bench: install
	$(BIN)/offramp bench $(ARGS)

clean:
	rm -rf $(VENV) .venv-clients build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(filter-out offramp,$(SOURCES)) -name __pycache__ -type d -exec rm -rf {} +
