"""What is loaded when tests/ranks.py forks its processes: libraries, and none of our programs, which start as they do,
but for what every start of the training program finds out about its options."""
# ruff: noqa: F401

import gc
import os

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}  # both are read at import

import deepspeed
import deepspeed.module_inject.auto_ep_layer  # as the next ones: DeepSpeed's engine loads it
import deepspeed.runtime.zero.muon.muon_optimizer
import torch
import torch._dynamo
import torch.utils.tensorboard
import tyro

import largescale.training.dry_run
import largescale.training.run
import largescale.training.startup
from largescale.config.yaml_files import to_yaml
from largescale.engine.deepspeed_patches import check_deepspeed
from largescale.planning.memory import activation_bytes
from largescale.train import parse
from tests.kept_parsers import keep_parsers

keep_parsers()

# Their first calls read source files, and count what a model keeps for its backward pass.
debug = parse(["debug"])
to_yaml(debug)
check_deepspeed()
activation_bytes(debug.model, torch.float32, checkpointing=False)

# Nothing of it is garbage, and looking through it would copy the pages that forked processes share.
gc.freeze()
