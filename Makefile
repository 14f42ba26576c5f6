# Two commands do everything: `make demo` and `make test`. Both create the environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VISION := .venv-vision
QUANT := .venv-quant
STAMP := $(VENV)/.installed

.PHONY: demo dist docs families test test-long test-real test-vision test-quant lint clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("massact needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Use: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

# The real language model is left out where it cannot be fetched, and the script says so.
SMOLLM2 := .cache/smollm2-135m-instruct.gguf
demo: $(STAMP)
	rm -rf runs/demo runs/demo-smollm2
	$(BIN)/massact scan --out runs/demo
	@if $(BIN)/python recipes/fetch_smollm2.py; then set -ex; \
	  $(BIN)/massact scan $(SMOLLM2) --seq-len 256 --n-sequences 8 --out runs/demo-smollm2; \
	  $(BIN)/massact explain runs/demo-smollm2; \
	  $(BIN)/massact report runs/demo-smollm2; fi

# Tests on a real language model are skipped where it cannot be fetched, and say so.
test: lint
	@$(BIN)/python recipes/fetch_smollm2.py || true
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# Golden values on real models and data that may not be redistributed: what is missing is an error that says what to set.
test-real: $(STAMP)
	@$(BIN)/python recipes/fetch_smollm2.py || true
	MASSACT_TEST_REAL=1 $(BIN)/python -m pytest -m real

# What takes long and is the same as others on more inputs.
test-long: $(STAMP)
	MASSACT_TEST_LONG=1 $(BIN)/python -m pytest -m long --numprocesses auto --dist loadfile

# timm needs torchvision, whose build must be that of torch: an environment of its own, without pinned versions.
test-vision:
	$(PYTHON) -m venv $(VISION)
	$(VISION)/bin/python -m pip install --quiet --editable '.[dev,vision]'
	$(VISION)/bin/python -m pytest tests/models/test_timm.py

# llm-compressor needs versions of its own of transformers and compressed-tensors: one more environment, without pinned ones.
test-quant:
	$(PYTHON) -m venv $(QUANT)
	$(QUANT)/bin/python -m pip install --quiet --editable '.[dev,quant]' 'llmcompressor==0.14.0.1' torch==2.13.0
	$(QUANT)/bin/python -m pytest tests/quantisation/test_oneshot.py

# Every family of transformers, built tiny, into docs/families.md: half an hour or more on one core.
families: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m recipes.families.sweep

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

# What a release builds, tried in environments that hold nothing else of this checkout.
dist: $(STAMP)
	rm -rf dist
	$(BIN)/python recipes/distribution.py build dist
	$(BIN)/python recipes/distribution.py check dist --offline

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VISION) $(QUANT) runs/demo runs/demo-smollm2
