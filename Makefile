# Everything runs in a virtual environment of this checkout.
#   make quickstart   install, and run the main job in small: prune the embedded model, compare, print the table
#   make test         install, and run ruff, mypy and the tests (at most 10 minutes on 2 cores)
#   make test-long    install, and run what takes longer: more architectures, engines, processes that are killed
#   make docs         install, and build the documentation into docs/_build/html; a warning is an error
# PYTHON       the interpreter that makes the environment (3.10 or newer)
# TORCH_INDEX  a package index to take torch from; unset, torch comes from your usual one. For example
#              make test TORCH_INDEX=https://download.pytorch.org/whl/cpu     CPU only, a smaller download
#              make test TORCH_INDEX=https://download.pytorch.org/whl/cu130   for CUDA 13.0
PYTHON ?= python3
TORCH_INDEX ?=
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install quickstart test suite test-long lint docs clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@

quickstart: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/prunekit run recipes/quickstart.yaml

lint: $(STAMP)
	$(BIN)/ruff check prunekit tests benchmarks docs
	$(BIN)/ruff format --check prunekit tests benchmarks docs
	$(BIN)/mypy

FUZZ := tests/test_fuzz_recipes.py tests/test_fuzz_models.py tests/data/test_fuzz_data.py
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

test: $(STAMP)
	$(MAKE) --jobs 2 suite lint

suite: $(STAMP)
	$(PYTEST) -m "not long" --dist loadfile --no-loadscope-reorder

test-long: $(STAMP)
	$(PYTEST) -m long --dist loadfile
	PRUNEKIT_FUZZ=8 $(PYTEST) -m "not long" $(FUZZ)

docs: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf $(VENV) docs/_build
