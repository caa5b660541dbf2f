# make demo   sets everything up and runs the main job on real images, on CPU
# make test   sets everything up and runs the tests

PYTHON ?= python3
RANKS ?= 2
RUN ?= runs/digits
SAMPLES ?= 1000
# More options for the training program, for example DEMO_ARGS='--train.steps 8000'
DEMO_ARGS ?=

BIN := .venv/bin
TORCHRUN := OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node $(RANKS)
comma := ,

.PHONY: demo test check clean
.DELETE_ON_ERROR:

demo: .venv/demo.stamp
	@date +%s > .venv/demo.started
	$(BIN)/python -m data_prep.digits --out data/digits
	$(TORCHRUN) -m largescale.train digits --output $(RUN) $(DEMO_ARGS)
	$(TORCHRUN) -m eval.sample $(RUN) --out $(RUN)/eval --num-samples $(SAMPLES) --cfg-scale 1.5 2.0 --steps 100
	$(BIN)/python -m eval.digits $(RUN)/eval/cfg1.5 $(RUN)/eval/cfg2.0 --out $(RUN)/eval/digits.json
	@echo
	@echo "pictures     $(RUN)/eval/cfg2.0/grid.png, $(RUN)/eval/cfg1.5/grid.png (a column a class); while training: $(RUN)/samples"
	@echo "logs         $(RUN)/metrics.jsonl; to look: $(BIN)/tensorboard --logdir $(RUN)/tensorboard"
	@echo "checkpoint   $$(ls -d $(RUN)/checkpoints/step_* | tail -n 1)"
	@echo "measured     above, and in $(RUN)/eval/digits.json; this start took $$(($$(date +%s) - $$(cat .venv/demo.started))) s"
	@echo "to resume    make demo, after an interruption; to train on: make demo DEMO_ARGS='--train.steps 10000'"

test: .venv/dev.stamp check
	$(BIN)/python -m pytest

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/%.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "largescale needs Python 3.11 to 3.13; try make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv: about 3 GB to download, one to three minutes, the last one silent"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[demo$(if $(filter dev,$*),$(comma)dev)]'
	@touch $@

clean:
	rm -rf .venv runs data/digits
