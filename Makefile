# Every target makes its own environment first, so each works as the first command in a clone.

VENV ?= .venv
# Tested versions first, then whatever "python3" is. Some commands of this name only exist to say
# that no such version is installed, hence the trial run.
CAN_MAKE_VENV = import ensurepip, ssl, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c '$(CAN_MAKE_VENV)' 2>/dev/null && echo $$p && break; done)
ARGS ?=

RUN = $(VENV)/bin/python -m
READY = $(VENV)/.ready
UNFINISHED = $(VENV)/.unfinished
PARITY = $(VENV)-parity
DOCS = $(VENV)-docs
PINS = requirements.txt
AUDIT = $(VENV)/audit
comma = ,

.PHONY: help demo test parity lint docs format audit clean
.DEFAULT_GOAL := help

help:  ## Print this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1@\2/p' Makefile | awk -F@ '{printf "%-16s%s\n", $$1, $$2}'
	@echo
	@echo "Options: ARGS=\"...\" goes to the demo or to pytest; PYTHON=python3.12 VENV=.venv312 makes"
	@echo "and uses an environment of another Python (3.11 or newer)."

demo: $(READY)  ## Train supervised and CSC on drawn street scenes and compare them (5 minutes)
	$(VENV)/bin/csc-jax demo --workdir=runs/demo $(ARGS)

test: $(READY)  ## Run the tests, but for the slow ones: ARGS="-m slow" runs those
	$(RUN) pytest -n 2 -m "not slow" $(ARGS)

parity:  ## Run the tests that compare with PyTorch, timm, transformers and the Cityscapes evaluator
	@$(MAKE) --no-print-directory $(PARITY)/.ready VENV=$(PARITY) \
		PINS="requirements.txt requirements-parity.txt"
	$(PARITY)/bin/python -m pytest -n 2 -m parity --no-skips $(ARGS)

lint: $(READY)  ## Check format, style and types
	$(RUN) ruff format --check
	$(RUN) ruff check
	$(RUN) mypy

docs:  ## Build the documentation site into site/; a warning is an error
	@$(MAKE) --no-print-directory $(DOCS)/.ready VENV=$(DOCS) PINS=requirements-docs.txt
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build $(ARGS)

format: $(READY)  ## Format the code and repair what can be repaired
	$(RUN) ruff format
	$(RUN) ruff check --fix

audit: $(READY)  ## Look the pinned packages up in the database of known vulnerabilities
	@"$(VENV)/bin/python" -m venv $(AUDIT)
	@$(AUDIT)/bin/pip install --quiet --disable-pip-version-check "pip-audit>=2.9,<3" || { \
		echo "Nothing was audited: pip-audit cannot be installed from here." >&2; exit 1; }
	@rm -f $(AUDIT)/report
	@# Strict, as it would else pass over a package that it cannot ask about. It ends with 1 both for
	@# a finding, which it writes down, and where it cannot ask.
	@$(AUDIT)/bin/pip-audit --requirement requirements.txt --no-deps --disable-pip --strict \
		--progress-spinner off --output $(AUDIT)/report || { \
		if [ -s $(AUDIT)/report ]; then cat $(AUDIT)/report; else \
			echo "The audit failed: the database cannot be asked from here." >&2; fi; exit 1; }

clean:  ## Remove the environments and all caches; keeps runs/
	rm -rf $(VENV) $(PARITY) $(DOCS) build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find csc_jax configs scripts tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# An environment whose installation was cut off is made anew: pip takes a package that it had
# half unpacked for a whole one.
$(READY): $(PINS) pyproject.toml
	@if [ -e $(UNFINISHED) ] || ! $(RUN) pip --version >/dev/null 2>&1; then \
		if ! "$(PYTHON)" -c '$(CAN_MAKE_VENV)' 2>/dev/null; then \
			echo "No Python 3.11 or newer with its venv and ssl modules (found: $(or $(PYTHON),none))." \
				"Install one, or name it: PYTHON=/path/to/python3" >&2; \
			exit 1; \
		fi; \
		echo "Making $(VENV) with $$("$(PYTHON)" --version)"; \
		"$(PYTHON)" -m venv --clear $(VENV); \
	fi
	@rm -f $(READY) && touch $(UNFINISHED)
	@echo "Installing the packages of $(PINS) into $(VENV), once: some minutes$(if $(filter requirements.txt,$(PINS)),$(comma) 1.4 GB)."
	@# One file after the other: a later pin of the same package replaces an earlier one.
	for pins in $(PINS); do $(RUN) pip install --disable-pip-version-check -r $$pins || exit 1; done
	$(RUN) pip install --quiet --disable-pip-version-check --no-deps --editable .
	@mv $(UNFINISHED) $(READY)
