# make demo   sets everything up and runs the main job on real images, on CPU
# make test   sets everything up and runs the tests

PYTHON ?= python3
BIN := .venv/bin
RUN := runs/digits
RANKS ?= 2

.PHONY: demo test check clean
.DELETE_ON_ERROR:

demo: .venv/demo.stamp
	$(BIN)/python -m data_prep.digits --out data/digits
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node $(RANKS) -m largescale.train digits --output $(RUN)
	$(BIN)/python -m eval.sample $(RUN) --out $(RUN)/eval --num-samples 1000 --cfg-scale 1.5 2.0
	$(BIN)/python -m eval.digits $(RUN)/eval/cfg1.5 $(RUN)/eval/cfg2.0 --data data/digits --out $(RUN)/eval/digits.json

test: .venv/dev.stamp check
	$(BIN)/python -m pytest

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/%.stamp: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "largescale needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv: about 3 GB to download, one to three minutes"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[demo$(if $(filter dev,$*),$(comma)dev)]'
	touch $@

comma := ,

clean:
	rm -rf .venv runs data/digits
