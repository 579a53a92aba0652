# make demo      the embedded model tuned in eight ways and compared, on this machine
# make test      the tests;  make test-all: with the exhaustive ones;  make quick: without the slow ones
# make lint      style, types, and the schema of the workflows
# Needs Python 3.10 to 3.13. PYTHON=... chooses one; PIP_ARGS=... goes to pip install; ARGS=... to the demo or to pytest.
VENV ?= .venv
PYTHON ?=
PIP_ARGS ?=
ARGS ?=
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
PYTEST = $(BIN)/python -m pytest -v -n logical --maxprocesses 4 --dist worksteal

# Ends with 0 in a Python that can run this: not under Rosetta, and on Intel Macs one that the last PyTorch for them knows.
SUITABLE = import os, platform, sys; mac = sys.platform == "darwin"; intel = mac and platform.machine() == "x86_64"; \
  rosetta = intel and os.popen("sysctl -in sysctl.proc_translated").read().strip() == "1"; \
  sys.exit(rosetta or not (3, 10) <= sys.version_info[:2] <= ((3, 12) if intel else (3, 13)))

.PHONY: demo test test-all quick lint clean
demo: $(VENV)/.installed
	$(BIN)/mlx-posttrain demo $(ARGS)

test: $(VENV)/.installed-dev
	$(PYTEST) --durations 10 -m "not exhaustive" $(ARGS)

test-all: $(VENV)/.installed-dev
	$(PYTEST) --durations 10 $(ARGS)

quick: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow and not exhaustive" $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

$(BIN)/pip:
	@for p in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10); do \
	  if $$p -c '$(SUITABLE)' 2>/dev/null; then echo "making $(VENV) with $$p"; exec $$p -m venv $(VENV); fi; \
	done; echo "make: no suitable Python: install Python 3.10 to 3.13 (on Apple Silicon an arm64 one, not under Rosetta;" \
	  "on an Intel Mac 3.10 to 3.12), or name one: make PYTHON=/path/to/python3" >&2; exit 1

$(VENV)/.installed: $(BIN)/pip pyproject.toml constraints.txt
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(BIN)/pip pyproject.toml constraints.txt
	@case "$(if $(PIP_ARGS),chosen,$$(uname -sm))" in "Linux x86_64") \
	  echo "make: on Linux, PyPI's torch carries CUDA and weighs gigabytes; for the CPU's, stop and give PIP_ARGS (see 'A small torch' in CONTRIBUTING.md)";; esac
	$(PIP) -e ".[dev,torch]"
	@touch $@ $(VENV)/.installed
