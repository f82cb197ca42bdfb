# Two commands for a new user: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

# As many workers as cores, four at most: each imports torch and transformers anew. They, and the programs that tests start, find
# davsp compiled by an earlier run, whatever the environment says of that.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

.PHONY: demo test test-slow faults bounds lint format docs app-deps hashes sbom clean

demo: .venv/installed  ## train a visual safety prompt on the embedded model and show that it works
	$(BIN)/davsp demo --out out/demo

test: .venv/installed  ## everything that guards a change, in some nine minutes on two cores
	$(PYTEST) -m "not slow"

test-slow: .venv/installed  ## the long tests whole; make test has a short form of each
	$(PYTEST) -m slow

faults: .venv/installed  ## ten minutes of inputs that nobody wrote by hand, by fixed seeds; writes docs/reliability.md
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m faults

bounds: bounds-lowest-direct bounds-highest  ## make test on the lowest versions that pyproject.toml allows, and on the newest; torch stays at the lock's

# torch comes by pip and alone, as elsewhere; what it needs is then resolved with the rest. The extras follow in the same environment.
bounds-%: out/tools/installed
	rm -rf out/bounds/$*
	$(PYTHON) -m venv out/bounds/$*
	out/bounds/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $$(grep '^torch==' requirements.lock)
	out/tools/bin/uv pip install --quiet --python out/bounds/$* --resolution $* --editable '.[dev,parquet]'
	$(subst $(BIN)/,out/bounds/$*/bin/,$(PYTEST)) -m "not slow"
	out/tools/bin/uv pip install --quiet --python out/bounds/$* --resolution $* --editable '.[app,inspect,litellm]'
	out/bounds/$*/bin/python -m pytest tests/test_app.py tests/test_http.py tests/test_inspect.py tests/test_litellm.py
	out/tools/bin/uv pip freeze --python out/bounds/$*

lint: .venv/installed  ## style, types and the order of the rooms
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[lint]'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/installed  ## the documentation as a site in out/site; warnings are errors
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

app-deps: .venv/installed  ## Gradio and Playwright, for davsp app and its test in a browser
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-app.lock

hashes: out/tools/installed  ## requirements-hashes.txt anew: every file that is published of the versions in requirements.lock, but torch's
	grep -v '^torch==' requirements.lock | out/tools/bin/uv pip compile - --quiet --upgrade --no-deps --universal --generate-hashes --no-annotate \
		--no-python-downloads --python-version 3.13 --custom-compile-command 'make hashes' --output-file requirements-hashes.txt

sbom: .venv/installed out/tools/installed  ## what is installed in .venv, with licences and who needs whom: CycloneDX in out/sbom.json
	out/tools/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --mc-type library --output-reproducible --output-file out/sbom.json

clean:  ## everything that can be made again
	rm -rf .venv out

.venv/installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("davsp needs Python 3.11 or newer; this is %s. Try: make PYTHON=python3.12" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@echo "Setting up .venv: torch and friends, some minutes the first time"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	@touch $@

out/tools/installed: Makefile
	$(PYTHON) -m venv out/tools
	out/tools/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9 cyclonedx-bom==7.5.0
	@touch $@
