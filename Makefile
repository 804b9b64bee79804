# The commands of the project. `make demo` and `make test` need Python 3.11 or newer and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo space screenshots test conformance check docs setup clean

setup: $(READY)

# Set up once; again only when what is declared has changed.
$(READY): setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[train,eval,app,dev]"
	touch $@

# World, two stages of training, evaluation, export, verification, four questions: about ten minutes.
demo: $(READY)
	$(BIN)/phi-mm demo

# A page to talk with what the demo made.
space: $(READY)
	$(BIN)/phi-mm serve runs/demo/artefact

# Pictures of that page, taken by a browser; writes docs/images/space-*.png.
screenshots: $(READY)
	$(BIN)/python -m tests.spaces_app.browser.screenshots runs/demo/artefact docs/images

# Three files of tests at a time: much of their time is waiting.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile

# Every way of loading, generating, adapting and pushing; writes the table of what works.
conformance: $(READY)
	$(BIN)/python -m pytest tests/conformance --write-table docs/conformance.md

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The documents as a site, in build/site; any warning fails.
docs: $(READY)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) runs build *.egg-info
