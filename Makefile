# `make reports` and `make test` do everything on a fresh machine with Python 3.10+ and make.
# With a network and the data: make reports DATASET=ilias:DIR BACKBONE=siglip
PYTHON ?= python3
DATASET ?= mini
BACKBONE ?= mini
BIN := .venv/bin

.PHONY: install reports lab test faults test-lowest bench train-mini train-rerankers train-heads notebooks hooks clean

install: .venv/installed

.venv/installed: settings.ini setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "patchify needs Python 3.10 or newer: name one with make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[all]'
	touch $@

reports: install
	$(BIN)/patchify report --dataset "$(DATASET)" --backbone "$(BACKBONE)"
	$(BIN)/patchify report --book

# JupyterLab in which opening a notebook does not mark it as modified, and saving keeps it clean
lab: install
	$(BIN)/jupyter lab --config jupyter_config.py

# two processes; a test file stays in one of them, because its tests share what they prepare
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# all faults: the campaign with every byte of a small store changed, and 200 kills at random moments
faults: install
	PATCHIFY_FAULTS=all $(BIN)/python -m pytest -q tests/faults
	$(BIN)/python tests/faults/kills.py --kills 200

# the lowest versions that settings.ini allows, in an environment of its own; not part of CI
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct --editable '.[all]'
	.venv-lowest/bin/python -m pytest -q --ignore tests/test_notebooks.py --ignore tests/test_report.py

bench: install
	$(BIN)/python -m benchmarks

train-mini: install
	$(BIN)/patchify train encoder

train-rerankers: install
	$(BIN)/patchify train rerankers

train-heads: install
	$(BIN)/patchify train heads

notebooks: install
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --output-dir . --output README --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_input_tags=hide-input --TagRemovePreprocessor.remove_cell_tags=hide-cell nbs/index.ipynb

hooks: install
	$(BIN)/nbdev_install_hooks

clean:
	rm -rf .venv data/stores data/indexes data/mini data/tiny
