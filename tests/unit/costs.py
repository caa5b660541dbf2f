"""Workloads and hardware of round numbers."""

from typing import Any

from largescale.config.deepspeed import load_ds_config
from largescale.config.presets import PRESETS
from largescale.config.schema import Config
from largescale.planning.cost import Workload
from largescale.planning.hardware import Hardware

ROUND = Hardware("round", peak_flops=2e12, memory_bytes=1e9, memory_bandwidth=1e12, intra_bandwidth=4e9, inter_bandwidth=0.5e9,
                 gpus_per_node=4, mfu=0.5, launch_s=0.0, data_bandwidth=1e9, host_bandwidth=1e9, write_bandwidth=1e9,
                 storage_bandwidth=8e9, node_mtbf_hours=10.0, restart_s=60.0)
WORK = Workload(parameters=10**9, flops_per_image=3e12, kernels=1000, global_batch_size=8, grad_accum_steps=1, weight_bytes=2,
                reduce_bytes=4, reduce_bucket_size=250_000_000, image_bytes=1000.0)


def dit_l() -> tuple[Config, dict[str, Any]]:
    config = PRESETS["dit_l2_imagenet256"]()
    return config, load_ds_config(config.train.ds_config)
