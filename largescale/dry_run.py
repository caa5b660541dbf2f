"""--dry-run: what would run, what it costs, and whether the data fit; starts nothing."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from largescale.build import blank_condition, build_model, latent_shape
from largescale.config import Config, batch_layout, cluster_edges, to_dict, validate
from largescale.ds_config import final_ds_config, precision
from largescale.errors import DataError
from largescale.launch import env_world_size
from largescale.models.dit import flops_per_image
from largescale.optim import check_apex

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def activation_bytes(model: nn.Module, config: Config) -> int:
    """What autograd keeps of the forward pass of one image, counted on the meta device."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.device("meta"):
        x, t = torch.empty(1, *latent_shape(config.model)), torch.zeros(1, dtype=torch.long)
        y = blank_condition(config.model, 1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(x, t, y)  # kept alive, so that no storage's id is used twice
    del output
    return sum(kept.values())


def memory(config: Config, ds: dict[str, Any], world_size: int) -> dict[str, float]:
    """Bytes per rank under ZeRO-2, from shapes. An estimate: kernels' workspaces and fragmentation come on top."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision(ds)]
    with torch.device("meta"):
        model = build_model(config.model).to(dtype)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    bucket = min(ds["zero_optimization"].get("reduce_bucket_size", 500_000_000), parameters)
    micro, _ = batch_layout(config, world_size)
    return {
        "weights": parameters * _BYTES[precision(ds)],
        "gradients (fp32: this rank's part, and two buckets)": 4 * (parameters / world_size + 2 * bucket),
        "master weights, two moments, EMA (fp32, this rank's part)": 4 * 4 * parameters / world_size,
        f"activations of {micro} images": micro * activation_bytes(model, config),
    }


def dry_run(config: Config) -> int:
    world_size = env_world_size()
    validate(config, world_size)
    check_apex(wanted=config.optimizer.kernel == "apex")
    ds = final_ds_config(config, world_size)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # only its settings are read
    from largescale.engine import check_ds_config

    check_ds_config(ds)
    micro, accumulation = batch_layout(config, world_size)
    with torch.device("meta"):
        model = build_model(config.model)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    forward = flops_per_image(model)
    per_step = 3 * forward * config.train.global_batch_size
    print("config:", json.dumps(to_dict(config), indent=2))
    print("deepspeed:", json.dumps(ds, indent=2))
    print(f"ranks: {world_size} (from WORLD_SIZE; set it to see another number)")
    print(f"batch: {config.train.global_batch_size} = {micro} x {accumulation} accumulation steps x {world_size} ranks")
    print(f"clusters: {', '.join(f'{edge:.4g}' for edge in cluster_edges(config))}")
    print(f"parameters: {parameters:,} trainable")
    print(f"compute: {3 * forward / 1e9:.1f} GFLOP per image, {per_step / 1e12:.3f} TFLOP per step")
    print(f"         {per_step * config.train.steps / 1e18:.3f} EFLOP for {config.train.steps:,} steps")
    parts = memory(config, ds, world_size)
    print(f"memory per rank: about {sum(parts.values()) / 2**30:.2f} GiB")
    for name, size in parts.items():
        print(f"  {size / 2**30:7.2f} GiB  {name}")
    try:
        from largescale.train import open_dataset

        dataset = open_dataset(config)
    except DataError as error:
        if Path(config.data.path, "manifest.json").exists():
            raise
        print(f"data: {error}")
    else:
        print(f"data: {config.data.path}, {len(dataset):,} rows of {dataset.info.kind} {dataset.info.shape}")
        per_epoch = len(dataset) / config.train.global_batch_size
        print(f"steps per epoch: {per_epoch:,.1f}, {config.train.steps / per_epoch:,.1f} epochs in all")
    print("dry run: nothing was started")
    return 0
