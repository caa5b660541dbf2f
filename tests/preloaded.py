"""What is loaded when tests/ranks.py forks its processes: libraries, and none of our programs, which start as they do."""
# ruff: noqa: F401

import gc
import os

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}  # both are read at import

import deepspeed
import torch._dynamo  # DeepSpeed's engine loads it: half of its start
import torch.utils.tensorboard
import tyro

import largescale.training.dry_run
import largescale.training.run

# Nothing of it is garbage, and looking through it would copy the pages that forked processes share.
gc.freeze()
