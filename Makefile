# make demo        sets everything up and runs the main job on real images, on CPU
# make demo-text   the same for text-to-image: captioned emoji
# make test        sets everything up and runs the tests
# make gpu         measures everything on a CUDA machine, as one report; GPU_ARGS=--rehearse without one
# make docs        builds the pages of docs/ as a site, in site/
# make clean       removes .venv, the site and the demo's data; runs/ stays

PYTHON ?= python3
RANKS ?= 2
RUN ?= runs/demo
SAMPLES ?= 1000
# That run tests; by default as many as cores and memory bear (tests/conftest.py)
WORKERS ?= auto
# More options for the training program, for example DEMO_ARGS='--train.steps 8000'
DEMO_ARGS ?=

# More options for benchmarks/gpu_check.py. Where nothing can be installed: make gpu PY=python3 SITE=FOLDER, with the
# packages that python3 lacks in FOLDER
GPU_ARGS ?=
SITE ?=

PY := .venv/bin/python
# By address and not by name: the name of a laptop or a container may not resolve. A port of its own for each start.
TORCHRUN := OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --local-addr 127.0.0.1 \
	--nproc-per-node $(RANKS)
STARTED := $(shell date +%s)
# Clusters' modules point these at another Python's packages.
unexport PYTHONPATH PYTHONHOME
# Without compiled modules every program takes four seconds more to start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-text test check gpu docs clean

demo:
	@$(PYTHON) install.py demo
	$(PY) -m data_prep.digits --out data/digits
	$(TORCHRUN) -m largescale.train demo --output "$(RUN)" $(DEMO_ARGS)
	$(TORCHRUN) -m eval.sample "$(RUN)" --out "$(RUN)/eval" --num-samples $(SAMPLES) --cfg-scale 1.5 2.0 \
		--sampler heun --steps 8 --replace
	$(PY) -m eval.digits "$(RUN)/eval/cfg1.5" "$(RUN)/eval/cfg2.0" --out "$(RUN)/eval/digits.json"
	@echo
	@echo "pictures     $(RUN)/eval/cfg2.0/grid.png, $(RUN)/eval/cfg1.5/grid.png (a column a class); while training: $(RUN)/samples"
	@echo "logs         $(RUN)/metrics.jsonl; to look: $(PY) -m tensorboard.main --logdir $(RUN)/tensorboard"
	@echo "checkpoint   $$(ls -d '$(RUN)'/checkpoints/step_* | tail -n 1)"
	@echo "measured     above, and in $(RUN)/eval/digits.json; this start took $$(($$(date +%s) - $(STARTED))) s"
	@echo "to resume    make demo, after an interruption"
	@echo "try next     make demo DEMO_ARGS='--train.steps 4000'                              # trains on"
	@echo "             make demo RUN=runs/vanilla DEMO_ARGS='--curriculum.pacing none'       # without the curriculum"
	@echo "             make demo-text                                                        # emoji, from words"

TEXT_RUN ?= runs/emoji
PROMPTS := "grinning face" "blue book" "woman and man holding hands" "man firefighter medium skin tone" \
	"girl dark skin tone" "person standing" "Germany" "orange circle" "woman swimming" "man farmer light skin tone"

demo-text:
	@$(PYTHON) install.py demo-text
	$(PY) -m data_prep.emoji --out data/emoji
	$(PY) -m data_prep.describe data/emoji --picture data/emoji.png
	$(TORCHRUN) -m largescale.train emoji --output "$(TEXT_RUN)" $(DEMO_ARGS)
	$(TORCHRUN) -m eval.sample "$(TEXT_RUN)" --out "$(TEXT_RUN)/eval" --num-samples 50 --cfg-scale 2.0 --sampler dpm++2m --steps 20 --replace \
		--prompts $(PROMPTS)
	@echo
	@echo "pictures     $(TEXT_RUN)/eval/cfg2.0/grid.png (a column a prompt); while training: $(TEXT_RUN)/samples"
	@echo "data         data/emoji.png shows what was trained on: Twemoji graphics, by Twitter, Inc and others, CC-BY 4.0"
	@echo "to resume    make demo-text, after an interruption; this start took $$(($$(date +%s) - $(STARTED))) s"

# Tests of a GPU have it for themselves: some of them fill its memory.
test: check
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
	@! command -v nvidia-smi >/dev/null || OMP_NUM_THREADS=1 $(PY) -m pytest tests/gpu

check:
	@$(PYTHON) install.py demo demo-text prep eval examples wandb docs dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check --quiet .
	$(PY) -m mypy

gpu:
ifeq ($(PY),.venv/bin/python)
	@$(PYTHON) install.py prep eval dev
endif
	PYTHONPATH="$(CURDIR)$(if $(SITE),:$(SITE))" $(PY) benchmarks/gpu_check.py $(GPU_ARGS)

docs:
	@$(PYTHON) install.py docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --site-dir site
	@echo "open site/index.html, or: $(PY) -m http.server --directory site"

clean:
	rm -rf .venv site data/digits data/emoji data/emoji.png
