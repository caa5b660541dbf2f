"""--dry-run: what would run, what it costs, and whether data and run directory fit; starts
nothing."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from largescale.checkpoint.files import checkpoints, newest_valid
from largescale.config.deepspeed import final_ds_config, load_ds_config, precision
from largescale.config.derived import batch_layout, cluster_edges, least_steps
from largescale.config.schema import Config, ModelConfig
from largescale.config.serialise import to_dict
from largescale.config.validation import remarks, validate
from largescale.data.shards import ShardDataset
from largescale.engine.optimizer import check_apex
from largescale.errors import DataError
from largescale.host.launch import env_world_size, printable_lines
from largescale.models.build import build_model, flops_per_image
from largescale.models.half_precision import IN_TRAINING, check_on_cpu
from largescale.monitoring.run_record import duration
from largescale.planning.cost import HARDWARE, PUBLISHED_MFU, Hardware, Plan, Workload
from largescale.planning.memory import check_memory, largest_micro_batch, memory

_DIFFUSERS_BYTES = 3e8  # of the library, loaded to decode previews: measured, 284 MiB
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def _kernels_per_block(config: Config) -> int:
    """Launched forward and backward: operations on tensors that are no views, counted on the meta
    device less what one attention kernel stands for; compiled, those of Inductor's code for a
    CPU."""
    compiled, captions = config.train.compile != "off", config.model.max_caption_tokens > 0
    if config.model.architecture == "ddpmpp":
        return 30 if compiled else 45  # compiled: assumed
    return {(False, False): 80, (False, True): 120, (True, False): 55, (True, True): 80}[
        compiled, captions
    ]


def workload(config: Config, ds: dict[str, Any], grad_accum_steps: int) -> Workload:
    """What a step of this run has to do. `ds`: the JSON, or the final settings."""

    def forward(model: ModelConfig) -> int:
        with torch.device("meta"):
            return flops_per_image(build_model(model))

    with torch.device("meta"):
        model = build_model(config.model)
    zero, c, again = ds["zero_optimization"], config.model, 0
    if config.train.activation_checkpointing:
        again = flops_per_image(model)  # but for a little outside of the blocks
        if c.architecture == "dit":
            again = c.depth * (forward(replace(c, depth=2)) - forward(replace(c, depth=1)))
    caption = c.max_caption_tokens * c.caption_width + (
        c.caption_pooled_width if c.max_caption_tokens else 0
    )
    pixels = c.in_channels * c.input_size**2
    return Workload(
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        flops_per_image=3 * flops_per_image(model),
        flops_again=again,
        kernels=len(model.blocks) * _kernels_per_block(config) * (4 / 3 if again else 1),
        global_batch_size=config.train.global_batch_size,
        grad_accum_steps=grad_accum_steps,
        weight_bytes=_BYTES[precision(ds)],
        reduce_bytes=_BYTES[ds.get("communication_data_type", precision(ds))],
        reduce_bucket_size=zero.get("reduce_bucket_size", 500_000_000),
        # uint8 for a network of pixels; else float16: moments, and a caption that is full
        image_bytes=pixels if c.architecture == "ddpmpp" else 2 * (2 * pixels + caption),
        overlap=config.train.device == "cuda" and zero.get("overlap_comm", False),
        all_reduce=zero.get("use_multi_rank_bucket_allreduce", True)
        or not zero.get("reduce_scatter", True),
    )


def print_memory(
    config: Config, ds: dict[str, Any], world_size: int, micro: int, hardware: Hardware | None
) -> None:
    parts = memory(config, ds, world_size, micro)
    needed, on = sum(parts.values()), config.train.activation_checkpointing
    other = replace(config, train=replace(config.train, activation_checkpointing=not on))
    else_needed = sum(memory(other, ds, world_size, micro).values())
    print(f"memory per rank: about {needed / 2**30:.2f} GiB")
    for name, size in parts.items():
        print(f"  {size / 2**30:7.2f} GiB  {name}")
    print(
        f"  {else_needed / 2**30:7.2f} GiB  in all "
        f"{'without' if on else 'with --train.activation-checkpointing'}"
        + ("" if on else ", for a third more work")
    )
    if hardware and needed > hardware.usable_bytes:
        fits = largest_micro_batch(config, ds, world_size, hardware.usable_bytes)
        ways = [f"--train.micro-batch-size {fits} (or auto)"] if 0 < fits < micro else []
        ways += [] if on else ["--train.activation-checkpointing"]
        print(
            f"  that is too much for the {hardware.memory_bytes / 2**30:.0f} GiB of one "
            f"{hardware.name}: try " + " or ".join([*ways, "more GPUs"])
        )


def span(hours: float) -> str:
    return f"{hours:,.0f} h" if hours >= 2 else duration(3600 * hours)


def print_cost(plan: Plan) -> None:
    """The model of cost.py for a run on GPUs. What it assumes is said: nothing has been measured on
    one."""
    hardware, step = plan.hardware, plan.step
    largest, published = step.bottleneck, [plan.at(mfu) for mfu in PUBLISHED_MFU]
    print(
        f"time: {span(plan.hours)} at {100 * hardware.mfu:.0f} % of the peak, "
        f"{' to '.join(span(p.hours) for p in published)} at "
        f"{' to '.join(f'{100 * p.hardware.mfu:.0f}' for p in published)} %, which published "
        f"trainers reach, on {plan.gpus} x {hardware.name}; assumed, never measured on a GPU here; "
        "previews come on top"
    )
    print(
        f"      at {100 * hardware.mfu:.0f} %: {step.images_per_s:,.0f} images/s; compute "
        f"{100 * step.share('compute'):.0f} % of a step, first bottleneck beside it: {largest}, "
        f"{100 * step.share(largest):.1f} %; data: up to {step.data_rate / 1e6:,.0f} MB/s; with a "
        f"failure every {plan.mtbf_s / 3600:,.0f} h (assumed, nodes: {hardware.nodes(plan.gpus)}), "
        f"checkpoints are best every {plan.best_every:,} steps (Daly); configured: {plan.every:,}, "
        f"which wastes {100 * plan.wasted(plan.every):.2f} % of the time (best: "
        f"{100 * plan.wasted(plan.best_every):.2f} %)"
    )


def print_disk(config: Config, checkpoint_bytes: float) -> None:
    c = config.checkpoint
    for_ever = config.train.steps // math.lcm(c.every, c.keep_every) if c.keep_every else 0
    kept = c.keep_last + for_ever + 1  # the last is one that was written on a stop
    print(
        f"disk: {checkpoint_bytes / 1e9:.3g} GB a checkpoint, {kept * checkpoint_bytes / 1e9:,.3g} "
        f"GB for the {kept} that are kept: the last {c.keep_last}, {for_ever} for ever, 1 of a stop"
    )


def print_data(config: Config) -> ShardDataset | None:
    """None where there is no data set yet."""
    from largescale.data.compatibility import open_dataset

    try:
        dataset = open_dataset(config)
    except DataError as error:
        if Path(config.data.path, "manifest.json").exists():
            raise
        print(f"data: {error}")
        return None
    print(
        f"data: {config.data.path}, {len(dataset):,} images of {dataset.info.kind} "
        f"{dataset.info.shape}"
        + (f", {dataset.info.num_classes:,} classes" if dataset.info.num_classes else "")
    )
    per_epoch = len(dataset) / config.train.global_batch_size
    print(f"steps per epoch: {per_epoch:,.1f}, {config.train.steps / per_epoch:,.1f} epochs in all")
    return dataset


def print_previews(config: Config, dataset: ShardDataset) -> None:
    from largescale.training.preview import load_decoder, shows_latents

    if shows_latents(config, dataset):
        vae, why = load_decoder(dataset)
        if vae is None:
            print(f"previews: latents, not decoded: {why}")
            return
        decoding = vae.nbytes + vae.decoding_bytes(vae.downsampling * config.model.input_size)
        print(
            f"previews: decoded by {vae.identity}; rank 0 holds "
            f"{(vae.nbytes + _DIFFUSERS_BYTES) / 2**30:.2f} GiB more of host memory, and of the "
            f"device's, while it decodes, about {decoding / 2**30:.2f} GiB"
        )


def print_run_directory(config: Config, ds: dict[str, Any], dataset: ShardDataset | None) -> None:
    """Raises CheckpointError as a start would, for a run there that is another; hashes of files are
    not compared."""
    from largescale.training.run_directory import (
        check_checkpoints_still_exist,
        check_same_run,
        finished_message,
    )
    from largescale.training.startup import resolve_auto

    def say(text: str) -> None:
        print(printable_lines(text))

    run_dir = config.run_dir
    newest, _ = newest_valid(
        run_dir, checkpoints(run_dir), say, lambda found: found.check(slice(0))
    )
    if newest is None:
        check_checkpoints_still_exist(run_dir)
        print(f"run directory: {run_dir}, without a checkpoint")
        return
    fingerprint = dataset.fingerprint if dataset else newest.manifest()["state"]["dataset"]
    identity = {
        "config": to_dict(resolve_auto(config)),
        "precision": precision(ds),
        "dataset": fingerprint,
    }
    check_same_run(newest, identity, dataset, say)
    print(
        "run directory: "
        + (
            finished_message(config, newest)
            if newest.step >= config.train.steps
            else f"{run_dir}, would be resumed at step {newest.step:,}"
        )
    )


def print_work(config: Config, work: Workload) -> None:
    """The curriculum, the parameters and the floating-point operations."""
    print(f"clusters: {', '.join(f'{edge:.4g}' for edge in cluster_edges(config))}")
    if least := least_steps(config):
        print(f"curriculum: complete after {least:,} steps or more, of {config.train.steps:,}")
    print(f"parameters: {work.parameters:,} trainable")
    again = ""
    if work.flops_again:
        again = f", {work.flops_again / 1e9:.1f} more to compute activations again"
    per_step = (work.flops_per_image + work.flops_again) * config.train.global_batch_size
    print(
        f"compute: {work.flops_per_image / 1e9:.1f} GFLOP per image{again}, "
        f"{per_step / 1e12:.3f} TFLOP per step"
    )
    total = per_step * config.train.steps
    print(f"         {total / 1e18:.3f} EFLOP for {config.train.steps:,} steps")


def dry_run(config: Config) -> int:
    world_size = env_world_size()
    validate(config, world_size)
    check_apex(wanted=config.optimizer.kernel == "apex")
    hardware = HARDWARE["h100"] if config.train.device == "cuda" else None
    fitted = config
    if config.train.micro_batch_size == "auto" and hardware:
        fits = largest_micro_batch(
            config, load_ds_config(config.train.ds_config), world_size, hardware.usable_bytes
        )
        fitted = replace(config, train=replace(config.train, micro_batch_size=max(1, fits)))
    ds = final_ds_config(fitted, world_size)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # only its settings are read
    from largescale.engine.deepspeed_engine import check_ds_config

    check_ds_config(ds)
    if config.train.device == "cpu":
        check_on_cpu(precision(ds), IN_TRAINING)
    micro, accumulation = batch_layout(fitted, world_size)
    work = workload(config, ds, accumulation)
    print(f"ranks: {world_size} (from WORLD_SIZE; set it to see another number)")
    print(
        f"batch: {config.train.global_batch_size} = {micro} x {accumulation} accumulation steps x "
        f"{world_size} ranks"
    )
    if config.train.micro_batch_size == "auto":
        by = f"by the estimate below, on one {hardware.name}" if hardware else "if all of it fits"
        print(f"       auto: {micro} {by}; a run finds the largest for which there is memory")
    print_work(config, work)
    if hardware and precision(ds) != "fp32":
        print_cost(Plan(work, hardware, world_size, config.train.steps, config.checkpoint.every))
    print_disk(config, work.checkpoint_bytes)
    print_memory(config, ds, world_size, micro, hardware)
    check_memory(config, ds, world_size)
    dataset = print_data(config)
    if dataset:
        print_previews(config, dataset)
    for remark in remarks(config, dataset.info.num_classes if dataset else 0):
        print(f"note: {remark}")
    if config.verbose:
        print("config:", json.dumps(to_dict(config), indent=2))
        print("deepspeed:", json.dumps(ds, indent=2))
    print_run_directory(config, ds, dataset)
    print(
        "dry run: nothing was started"
        + ("" if config.verbose else "; --verbose prints all settings")
    )
    return 0
