# Each target does its own set-up: a fresh machine needs Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests wait more than they work. By file: what a file starts, such as a server, serves all tests in it.
AT_A_TIME := -n 3 --dist loadfile
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test bench lint docs system fastapi-suite sse-starlette-suite lower matrix clean

demo: $(VENV)/.installed
	$(BIN)/python -m examples.sse_chat

test: lint system $(VENV)/.installed
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(AT_A_TIME)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report
	$(MAKE) fastapi-suite sse-starlette-suite lower

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright

# FastAPI's own tests, with and without CancellableRoute as the default: no new failure.
fastapi-suite: $(VENV)/.installed
	$(BIN)/python scripts/fastapi_suite.py

# A shortcut: the contract, line by line on every server. Writes docs/servers.md if something has changed.
matrix: $(VENV)/.installed
	$(BIN)/pytest tests/test_matrix.py

# sse-starlette's own tests, with SSEResponse for its response: no failure but those that are listed with their reason.
sse-starlette-suite: $(VENV)/.installed
	$(BIN)/python scripts/sse_starlette_suite.py

# What the tests need of the system: a browser, two proxies, Redis, curl. Installs what is missing, where it may.
system:
	$(PYTHON) scripts/system.py

# The oldest versions that we promise to work with.
lower: $(VENV)/.installed
	$(BIN)/python scripts/lower.py $(AT_A_TIME)

# The documentation is plain Markdown: run its examples, follow its links.
docs: $(VENV)/.installed
	$(BIN)/pytest tests/test_docs.py

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks

$(VENV)/.installed: pyproject.toml requirements-dev.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $@

clean:
	rm -rf .venv .venv-* .build dist
