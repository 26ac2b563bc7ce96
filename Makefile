# Needs python3 >= 3.11, make and pip. `make demo` first; `make test` for the tests.
# Where wheels come from is pip's own configuration. PyPI's torch for Linux brings CUDA along; for the CPU build set
# PIP_EXTRA_INDEX_URL to PyTorch's CPU index. Another torch than the tested one: make venv TORCH='torch==2.11.0'

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
# Processes that share the tests; each computes with one thread.
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
OUT := demo-out

.PHONY: venv test lint format demo clean

venv: $(STAMP)

# The sources are installed editable: only a change of what is required installs again.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("klquant needs Python 3.11 or later") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.lock
else
	grep -v '^torch==' requirements.lock > $(VENV)/requirements.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r $(VENV)/requirements.txt '$(TORCH)'
endif
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(STAMP)
	rm -rf $(OUT)
	$(BIN)/klquant plan demo/model --recipe int4
	for recipe in int4 int8; do \
	  $(BIN)/klquant quantize demo/model --recipe $$recipe -o $(OUT)/$$recipe --calib demo/text/calib && \
	  $(BIN)/klquant eval $(OUT)/$$recipe --against demo/model --data demo/text/eval -o $(OUT)/$$recipe.json || exit; \
	done
	@$(BIN)/python scripts/demo_table.py demo/model $(OUT)
	@echo; echo "klquant generate $(OUT)/int4 'def test_open('"; echo
	@$(BIN)/klquant generate $(OUT)/int4 'def test_open(' --max-new-tokens 60

clean:
	rm -rf $(OUT) build dist .pytest_cache .ruff_cache .hypothesis
	find klquant tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
