# Every target does the set-up it needs: a virtual environment in .venv and the package in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
NATIVE := $(wildcard src/native/*.h src/native/*.cpp src/native/kernels/*)
SET_UP := pyproject.toml constraints.txt CMakeLists.txt $(NATIVE)

.PHONY: help demo test slow clients interop real check sanitize arm docs stub format pair example bench peers dist clean

demo: $(VENV)/.core        ## complete Python with the bundled pair: with and without the drafter, the same bytes
	$(BIN)/gemma-mtp generate --file examples/prompt.txt --temperature 0.3 --seed 10 --compare --show-drafts

help:                      ## what each target does
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: $(VENV)/.dev         ## the default tests; those of the server's page need Chromium (apt-get install chromium)
	$(BIN)/python -m pytest -q -n $$($(BIN)/python -c 'import os; print(min(4, os.cpu_count()))') --dist worksteal

slow: $(VENV)/.dev build/json-schema-suite  ## what the default tests leave out: longer loads, more pairs of settings, whole suites
	$(BIN)/python -m pytest -q -m slow

# in folders of their own, because their pins are not ours
build/clients: tests/clients/requirements.txt | $(VENV)/.dev
	rm -rf $@ build/lm-eval
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $@ -r $<
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/lm-eval lm-eval==0.4.13
	@touch $@

build/npm: tests/clients/package.json
	mkdir -p $@ && cp $< $@
	cd $@ && npm install --silent --no-audit --no-fund
	@touch $@

clients: $(VENV)/.dev build/clients build/npm  ## the server's tests with clients of others, such as LangChain (needs Node.js)
	$(BIN)/python -m pytest -q -m clients

# without what they need besides, which the environment has or their lists name: no second PyTorch
build/interop/%: tests/interop/%.txt | $(VENV)/.dev
	rm -rf $@
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ -r $<
	@touch $@

interop: $(VENV)/.dev $(patsubst tests/%.txt,build/%,$(wildcard tests/interop/*.txt))  ## what is exported, run by llama.cpp, transformers, MLX and vLLM (x86-64 Linux, 450 MB)
	$(BIN)/python -m pytest -q -m interop

real: $(VENV)/.dev         ## real pretrained weights of 270 M parameters, downloaded once (240 MB, Gemma's terms), against transformers
	$(BIN)/python -m pytest -q -m real

check: $(VENV)/.dev        ## lint, format, types, and the native module's stub
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)
	$(BIN)/python tools/native_stub.py --check
	$(BIN)/mypy

sanitize: $(VENV)/.dev     ## the native operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	cmake -S . -B build/sanitize -DGEMMA_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir)
	cmake --build build/sanitize --parallel
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 GEMMA_MTP_BUILD=$(abspath build/sanitize) \
	  $(BIN)/python -m pytest -q tests/test_native.py

arm: $(VENV)/.dev          ## the kernels for 64-bit ARM, emulated (apt-get install g++-aarch64-linux-gnu qemu-user-static)
	$(BIN)/python -m pytest -q -m slow tests/test_native_arm.py

docs: $(VENV)/.core        ## docs/use/cli.md from the commands' own help
	$(BIN)/python tools/cli_docs.py

stub: $(VENV)/.dev         ## src/gemma_mtp/_native.pyi from the built native module
	$(BIN)/python tools/native_stub.py

format: $(VENV)/.dev       ## fix lint and format, Python and C++
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

pair: $(VENV)/.core        ## train the bundled pair from scratch: DEVICE=cuda as it was made, or hours on CPUs (docs/use/training.md)
	$(BIN)/python tools/make_pair.py --device $(or $(DEVICE),cpu)

example: $(VENV)/.dev      ## fine-tune the bundled target, adapt its drafter (about half an hour; see docs/use/adapting.md)
	$(BIN)/python examples/finetune_and_adapt/run.py

bench: $(VENV)/.dev        ## decode speed, plain and drafted, beside transformers
	$(BIN)/python benchmarks/decode.py

peers: $(VENV)/.bench      ## the same beside llama.cpp too, and a pair of 112 M parameters in three weight types
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/decode.py --pair small
	$(BIN)/python benchmarks/decode.py --pair small --quantize int8 --peers llama.cpp
	$(BIN)/python benchmarks/decode.py --pair small --quantize int4 --peers llama.cpp
	$(BIN)/python benchmarks/decode.py --pair small --acceptance 0 --draft-tokens auto --peers

# what finds faults of accessibility in the tests of the server's page
build/axe-core:
	mkdir -p build && cd build && npm pack --silent axe-core@4.14.1
	mkdir -p $@ && tar xzf build/axe-core-4.14.1.tgz -C $@

# the official tests of JSON Schema, which the source of the package jsonschema carries
build/json-schema-suite:
	mkdir -p build/jsonschema && cd build/jsonschema && \
	  ../../$(BIN)/python -m pip download --quiet --no-deps --no-binary jsonschema jsonschema==4.26.0
	tar xzf build/jsonschema/jsonschema-4.26.0.tar.gz -C build/jsonschema
	mv build/jsonschema/jsonschema-4.26.0/json $@

dist: $(VENV)/.dev         ## sdist and wheel for a package index, in dist/: make dist URL=https://HOST/OWNER/NAME
	rm -rf dist
	GEMMA_MTP_URL=$(or $(URL),$(error give the project's address: make dist URL=https://HOST/OWNER/NAME)) $(BIN)/python -m build --outdir dist
	$(BIN)/python tools/project_address.py dist/*

clean:                     ## remove the virtual environment and what was built
	rm -rf $(VENV) build dist

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# PyTorch without CUDA where there is no GPU for it
$(VENV)/.torch: | $(VENV)/bin/python
	@$(BIN)/python tools/install_torch.py
	@touch $@

$(VENV)/.core: $(SET_UP) | $(VENV)/.torch
	@echo "installing the package and compiling its native operators: a minute or two"
	$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(SET_UP) | $(VENV)/.torch
	@echo "installing the package and its tools, and compiling its native operators: a minute or two"
	$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.core $@

# builds llama.cpp for this machine's processor, which takes many minutes
$(VENV)/.bench: $(VENV)/.dev
	$(INSTALL) -e '.[bench]'
	@touch $@
