"""--dry-run: what would run, what it costs, and whether data and run directory fit; starts
nothing."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from largescale.checkpoint.files import checkpoints, newest_valid
from largescale.config.deepspeed import final_ds_config, load_ds_config, precision
from largescale.config.derived import batch_layout, cluster_edges, least_steps, resolved_kernels
from largescale.config.learning_rate import described
from largescale.config.schema import Config, ModelConfig
from largescale.config.serialise import to_dict
from largescale.config.validation import remarks, validate
from largescale.data.order import CHUNK_ROWS
from largescale.data.shards import ShardDataset
from largescale.data.stage import StagedCopy, paths_to_copy
from largescale.engine.optimizer import check_apex
from largescale.errors import DataError
from largescale.host.launch import env_world_size, printable_lines
from largescale.host.machine import file_system, is_shared
from largescale.host.sizes import size_text
from largescale.models.build import build_model, flops_per_image
from largescale.models.half_precision import IN_TRAINING, check_on_cpu
from largescale.monitoring.run_record import duration
from largescale.planning.cost import (
    ASSUMED_MFU,
    BLOCK_CODE,
    PUBLISHED_MFU,
    Blocks,
    Plan,
    Workload,
    compute_parts,
)
from largescale.planning.hardware import ATTENTION_SHARE, HARDWARE, PRODUCT_SHARE, Hardware
from largescale.planning.memory import check_memory, largest_micro_batch, memory
from largescale.training.ema_snapshots import snapshot_every
from largescale.training.first_weights import FirstWeights, check_resumed, started_from

# Host memory of the diffusers library, loaded to decode previews: measured, 284 MiB.
_DIFFUSERS_BYTES = 3e8
# A data set that is read so soon that its order does not matter.
_SOON_CACHED_BYTES = 1e9
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def forward_flops(model: ModelConfig) -> tuple[int, int]:
    """Operations of a DiT's forward pass for one image: (of one block, of what is around the
    blocks)."""

    def at_depth(depth: int) -> int:
        with torch.device("meta"):
            return flops_per_image(build_model(replace(model, depth=depth)))

    one = at_depth(1)
    two = at_depth(2)
    return two - one, 2 * one - two


def _blocks(config: Config) -> Blocks:
    """The work of a DiT's blocks for one image."""
    model = config.model
    tokens = (model.input_size // model.patch_size) ** 2
    of_block, around = forward_flops(model)
    code = "eager" if config.train.compile == "off" else resolved_kernels(config.train)
    # Two products of (tokens, width) with the keys, which are the tokens, and the caption's.
    attention = 4 * tokens * (tokens + model.max_caption_tokens) * model.hidden_size
    return Blocks(
        product_flops=model.depth * (of_block - attention),
        attention_flops=model.depth * attention,
        other_flops=around,
        elements=model.depth * tokens * model.hidden_size,
        code=BLOCK_CODE[code, model.max_caption_tokens > 0],
    )


def _image_bytes(model: ModelConfig) -> int:
    """Bytes of a row on disk."""
    # uint8 for a network of pixels; else float16, with the moments of a latent (twice its channels)
    # and a caption of full length.
    pixels = model.in_channels * model.input_size**2
    if model.architecture == "ddpmpp":
        return pixels
    caption = model.max_caption_tokens * model.caption_width
    if model.max_caption_tokens:
        caption += model.caption_pooled_width
    return 2 * (2 * pixels + caption)


def workload(config: Config, ds: dict[str, Any], grad_accum_steps: int) -> Workload:
    """What a step of this run has to do. `ds`: the JSON, or the final settings."""
    with torch.device("meta"):
        model = build_model(config.model)
    zero = ds["zero_optimization"]
    blocks = _blocks(config) if config.model.architecture == "dit" else None

    # Activation checkpointing computes the blocks' forward pass twice. Of a U-Net, what is computed
    # outside of its blocks is neglected.
    again = 0.0
    if config.train.activation_checkpointing:
        again = flops_per_image(model)
        if blocks is not None:
            again = blocks.product_flops + blocks.attention_flops

    # Of a U-Net's block: counted eager, compiled assumed.
    kernels = 45 if config.train.compile == "off" else 30
    if blocks is not None:
        kernels = blocks.code.kernels

    return Workload(
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        # A backward pass takes twice the operations of the forward pass.
        flops_per_image=3 * flops_per_image(model),
        flops_again=again,
        kernels=len(model.blocks) * kernels * (4 / 3 if again else 1),
        global_batch_size=config.train.global_batch_size,
        grad_accum_steps=grad_accum_steps,
        weight_bytes=_BYTES[precision(ds)],
        reduce_bytes=_BYTES[ds.get("communication_data_type", precision(ds))],
        reduce_bucket_size=zero.get("reduce_bucket_size", 500_000_000),
        image_bytes=_image_bytes(config.model),
        overlap=config.train.device == "cuda" and zero.get("overlap_comm", False),
        all_reduce=zero.get("use_multi_rank_bucket_allreduce", True)
        or not zero.get("reduce_scatter", True),
        fused_update=config.optimizer.kernel == "fused",
        averages=len(config.optimizer.ema_widths),
        blocks=blocks,
    )


def print_memory(
    config: Config, ds: dict[str, Any], world_size: int, micro: int, hardware: Hardware | None
) -> None:
    """Print the memory of a rank by its parts, and what to change where it is too much."""
    parts = memory(config, ds, world_size, micro)
    needed = sum(parts.values())
    print(f"memory per rank: about {needed / 2**30:.2f} GiB")
    for name, size in parts.items():
        print(f"  {size / 2**30:7.2f} GiB  {name}")

    # The same run with the other setting of activation checkpointing, to compare.
    on = config.train.activation_checkpointing
    other = replace(config, train=replace(config.train, activation_checkpointing=not on))
    other_needed = sum(memory(other, ds, world_size, micro).values())
    how = "without" if on else "with --train.activation-checkpointing, for a third more work"
    print(f"  {other_needed / 2**30:7.2f} GiB  in all {how}")

    if hardware and needed > hardware.usable_bytes:
        remedies = []
        fits = largest_micro_batch(config, ds, world_size, hardware.usable_bytes)
        if 0 < fits < micro:
            remedies.append(f"--train.micro-batch-size {fits} (or auto)")
        if not on:
            remedies.append("--train.activation-checkpointing")
        remedies.append("more GPUs")
        print(
            f"  that is too much for the {hardware.memory_bytes / 2**30:.0f} GiB of one "
            f"{hardware.name}: try " + " or ".join(remedies)
        )


def span(hours: float) -> str:
    return f"{hours:,.0f} h" if hours >= 2 else duration(3600 * hours)


def print_cost(plan: Plan) -> None:
    """Print the time of a run on GPUs by the model of cost.py, with what it assumes: nothing has
    been measured on one."""
    hardware = plan.hardware
    step = plan.step
    largest = step.bottleneck

    # MFU (the share of the peak that is reached) decides the time: the model's, then the range of
    # published trainers.
    times = []
    shares = []
    for mfu in PUBLISHED_MFU:
        times.append(span(plan.at(mfu).hours))
        shares.append(f"{100 * mfu:.0f}")
    origin = "predicted" if plan.work.blocks else "assumed"
    print(
        f"time: {span(plan.hours)} at an MFU of {100 * plan.mfu:.0f} %, {origin}; "
        f"{' to '.join(times)} where forward and backward reach {' to '.join(shares)} % of the "
        f"peak, as in published trainers; on {plan.gpus} x {hardware.name}, never measured on a "
        "GPU here; previews come on top"
    )
    print(f"      {prediction_source(plan)}")
    # What limits a step, and how often to save at the assumed rate of failures.
    print(
        f"      so {step.images_per_s:,.0f} images/s; compute "
        f"{100 * step.share('compute'):.0f} % of a step, first bottleneck beside it: {largest}, "
        f"{100 * step.share(largest):.1f} %; data: up to {size_text(step.data_rate)}/s; with a "
        f"failure every {plan.mtbf_s / 3600:,.0f} h (assumed, nodes: {hardware.nodes(plan.gpus)}), "
        f"checkpoints are best every {plan.best_every:,} steps (Daly); configured: {plan.every:,}, "
        f"which wastes {100 * plan.wasted(plan.every):.2f} % of the time (best: "
        f"{100 * plan.wasted(plan.best_every):.2f} %)"
    )


def prediction_source(plan: Plan) -> str:
    """What the time of forward and backward passes is predicted from."""
    blocks = plan.work.blocks
    rates = plan.hardware.rates
    parts = compute_parts(plan.work, plan.hardware, plan.gpus)
    # Without what a block computes and what the card reaches, a share of the peak is assumed.
    if blocks is None or rates is None or len(parts) == 1:
        share = ASSUMED_MFU if plan.hardware.mfu is None else plan.hardware.mfu
        return f"assumed: forward and backward reach {100 * share:.0f} % of the peak"
    shown = []
    for name, seconds in parts.items():
        shown.append(f"{name} {100 * seconds / plan.step.seconds:.0f} %")
    moved = blocks.code.forward_bytes + blocks.code.backward_bytes
    return (
        f"predicted from {moved:.0f} bytes per residual element and block, counted in the code of "
        f"its kernels (benchmarks/roofline.py), and {rates.products / 1e12:.0f} TFLOP/s and "
        f"{rates.copies / 1e12:.1f} TB/s "
        f"({'measured on such a card' if rates.measured else 'assumed'})"
        f", of which products are assumed to reach {100 * PRODUCT_SHARE:.0f} %, attention "
        f"{100 * ATTENTION_SHARE:.0f} %; of a step: {', '.join(shown)}"
    )


def print_disk(config: Config, checkpoint_bytes: float) -> None:
    c = config.checkpoint
    # Of the checkpoints, those whose step is also a multiple of keep_every are kept for ever.
    for_ever = config.train.steps // math.lcm(c.every, c.keep_every) if c.keep_every else 0
    # One more for a checkpoint that was written on a stop, and for the best.
    best = c.keep_best != "none"
    kept = c.keep_last + for_ever + 1 + best
    print(
        f"disk: {size_text(checkpoint_bytes)} a checkpoint, {size_text(kept * checkpoint_bytes)} "
        f"for the {kept} that are kept: the last {c.keep_last}, {for_ever} for ever, 1 of a stop"
        + ", the best"
        * best
    )


def print_ema_snapshots(config: Config, parameters: int) -> None:
    """Print the disk that snapshots of the averages take."""
    widths = config.optimizer.ema_widths
    if not widths:
        return
    every = snapshot_every(config)
    steps = math.ceil(config.train.steps / every)
    kept = min(steps, config.checkpoint.ema_snapshots or steps)
    each = 2 * parameters * len(widths)
    print(
        f"      {size_text(each)} for snapshots of {len(widths)} averages every {every:,} steps, "
        f"{size_text(kept * each)} for the {kept} that are kept"
    )


def print_data(config: Config) -> ShardDataset | None:
    """Print the data set's size, and return it; None where there is no data set yet."""
    from largescale.data.compatibility import open_dataset, open_validation
    from largescale.data.fixed_noise_set import LEVELS

    # A dry run may come before packing; a data set that exists and does not fit is an error.
    try:
        dataset = open_dataset(config)
    except DataError as error:
        if Path(config.data.path, "manifest.json").exists():
            raise
        print(f"data: {error}")
        return None

    info = dataset.info
    classes = f", {info.num_classes:,} classes" if info.num_classes else ""
    print(f"data: {config.data.path}, {len(dataset):,} images of {info.kind} {info.shape}{classes}")
    per_epoch = len(dataset) / config.train.global_batch_size
    print(f"steps per epoch: {per_epoch:,.1f}, {config.train.steps / per_epoch:,.1f} epochs in all")
    print_copies(config)
    print_order(config, dataset)
    if validation := open_validation(config, dataset):
        images = config.telemetry.validation_images * (config.curriculum.n_clusters + LEVELS)
        print(
            f"validation: {config.data.validation}, {len(validation):,} images; every "
            f"{config.telemetry.validation_every:,} steps {2 * images:,} forward passes"
        )
    return dataset


def print_copies(config: Config) -> None:
    """Print what data.stage takes of a node's disk; what is there is known of this machine only."""
    if config.data.stage is None:
        return
    folder = Path(config.data.stage)
    copies = [StagedCopy(Path(path), folder) for path in paths_to_copy(config)]
    total = sum(copy.nbytes for copy in copies)
    to_copy = sum(copy.bytes_to_copy() for copy in copies)
    here = f"on this machine {size_text(to_copy)} are to be copied"
    if folder.is_dir():
        here += f", {size_text(shutil.disk_usage(folder).free)} are free"
    print(f"copies: {size_text(total)} in {folder} on each node; {here}")


def print_order(config: Config, dataset: ShardDataset) -> None:
    """Print how a step's rows lie in the files, and what suits the file system better."""
    batch = config.train.global_batch_size
    row = dataset.nbytes / len(dataset)
    kind = file_system(Path(config.data.stage or config.data.path))
    where = f" of {kind}" * bool(kind)
    if config.data.order == "blocks":
        print(
            f"order: blocks, {batch} x {CHUNK_ROWS} neighbouring rows at a time, each read ahead "
            f"by the rank that needs them in pieces of {CHUNK_ROWS * row / 2**20:,.2f} MiB{where}"
        )
        return
    print(
        f"order: full, each step {batch} reads of {row / 2**10:,.1f} KiB anywhere in "
        f"{size_text(dataset.nbytes)}{where}"
    )
    # Small sets are in the page cache soon.
    if is_shared(kind) and dataset.nbytes > _SOON_CACHED_BYTES:
        print(
            f"note: small reads are slow on {kind}: take --data.stage DIR, a folder on each node's "
            "own disk, or where the data do not fit there --data.order blocks, which reads ahead"
        )


def print_previews(config: Config, dataset: ShardDataset) -> None:
    """Print whether previews are decoded, and the memory that this takes."""
    from largescale.training.preview import load_decoder, shows_latents

    if not shows_latents(config, dataset):
        return
    vae, why = load_decoder(dataset)
    if vae is None:
        print(f"previews: latents, not decoded: {why}")
        return
    # The VAE lies in host memory, and is on the device only while it decodes.
    decoding = vae.nbytes + vae.decoding_bytes(vae.downsampling * config.model.input_size)
    print(
        f"previews: decoded by {vae.identity}; rank 0 holds "
        f"{(vae.nbytes + _DIFFUSERS_BYTES) / 2**30:.2f} GiB more of host memory, and of the "
        f"device's, while it decodes, about {decoding / 2**30:.2f} GiB"
    )


def print_run_directory(config: Config, ds: dict[str, Any], dataset: ShardDataset | None) -> None:
    """Print whether the run would start, be resumed or is finished. Raises CheckpointError, as a
    start would, where another run is there."""
    from largescale.training.run_directory import (
        check_checkpoints_still_exist,
        check_same_run,
        finished_message,
        require_run_directory,
    )
    from largescale.training.startup import resolve_auto

    def log(text: str) -> None:
        print(printable_lines(text))

    require_run_directory(config.run_dir)
    # Sizes of the checkpoint's files are compared, not their hashes, which would take minutes.
    run_dir = config.run_dir
    newest, _ = newest_valid(
        run_dir, checkpoints(run_dir), log, lambda found: found.check(slice(0))
    )
    if newest is None:
        check_checkpoints_still_exist(run_dir)
        print(f"run directory: {run_dir}, without a checkpoint")
        print_first_weights(config, dataset)
        return

    # What a start would put into a checkpoint. Without a data set there is nothing to compare.
    fingerprint = dataset.fingerprint if dataset else newest.manifest()["state"]["dataset"]
    identity = {
        "config": to_dict(resolve_auto(config)),
        "precision": precision(ds),
        "dataset": fingerprint,
        **({"data_info": dataset.info.plain()} if dataset else {}),
    }
    check_same_run(newest, identity, dataset, log)
    check_resumed(config, newest)

    if newest.step >= config.train.steps:
        print(f"run directory: {finished_message(config, newest)}")
    else:
        print(f"run directory: {run_dir}, would be resumed at step {newest.step:,}")


def print_first_weights(config: Config, dataset: ShardDataset | None) -> None:
    """Print what the run would start from, and what of it was trained for something else. Raises
    ConfigError where it does not fit."""
    if config.train.init_from is None:
        return
    first = FirstWeights.read(config)
    first.check(config)
    print(started_from(first.record()))
    for note in first.notes(config, dataset.info.plain()) if dataset else ():
        print(f"note: {note}")


def print_work(config: Config, work: Workload) -> None:
    """The curriculum, the parameters and the floating-point operations."""
    edges = ", ".join(f"{edge:.4g}" for edge in cluster_edges(config))
    print(f"clusters: {edges}")
    if least := least_steps(config):
        print(f"curriculum: complete after {least:,} steps or more, of {config.train.steps:,}")
    print(f"learning rate: {described(config)}")
    print(f"parameters: {work.parameters:,} trainable")

    # The first line is of useful work; what activation checkpointing repeats is listed apart.
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


def print_batch(
    config: Config, hardware: Hardware | None, world_size: int, micro: int, accumulation: int
) -> None:
    """Print how the global batch is shared among ranks and accumulation steps."""
    print(f"ranks: {world_size} (from WORLD_SIZE; set it to see another number)")
    print(
        f"batch: {config.train.global_batch_size} = {micro} x {accumulation} accumulation steps x "
        f"{world_size} ranks"
    )
    if config.train.micro_batch_size == "auto":
        by = f"by the estimate below, on one {hardware.name}" if hardware else "if all of it fits"
        print(f"       auto: {micro} {by}; a run finds the largest for which there is memory")


def fit_micro_batch(config: Config, hardware: Hardware | None, world_size: int) -> Config:
    """The config with the micro batch that `auto` would find, by the estimate of memory."""
    if config.train.micro_batch_size != "auto" or hardware is None:
        return config
    ds = load_ds_config(config.train.ds_config)
    fits = largest_micro_batch(config, ds, world_size, hardware.usable_bytes)
    return replace(config, train=replace(config.train, micro_batch_size=max(1, fits)))


def dry_run(config: Config) -> int:
    """Check the settings as a start would, and print what would run; the process's exit status."""
    # What a start would refuse comes before any output.
    world_size = env_world_size()
    validate(config, world_size)
    check_apex(wanted=config.optimizer.kernel == "apex")
    hardware = HARDWARE["h100"] if config.train.device == "cuda" else None
    fitted = fit_micro_batch(config, hardware, world_size)
    ds = final_ds_config(fitted, world_size)
    # DeepSpeed is loaded to check its settings only, so any accelerator will do.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from largescale.engine.deepspeed_engine import check_ds_config

    check_ds_config(ds)
    if config.train.device == "cpu":
        check_on_cpu(precision(ds), IN_TRAINING)

    # What it costs: operations, hours, disk and memory.
    micro, accumulation = batch_layout(fitted, world_size)
    work = workload(config, ds, accumulation)
    print_batch(config, hardware, world_size, micro, accumulation)
    print_work(config, work)
    if hardware and precision(ds) != "fp32":
        print_cost(Plan(work, hardware, world_size, config.train.steps, config.checkpoint.every))
    print_disk(config, work.checkpoint_bytes)
    print_ema_snapshots(config, work.parameters)
    print_memory(config, ds, world_size, micro, hardware)
    check_memory(config, ds, world_size)

    # What is there: the data set, the VAE for previews, an earlier start of the run.
    dataset = print_data(config)
    if dataset:
        print_previews(config, dataset)
    for remark in remarks(config, dataset.info.num_classes if dataset else 0):
        print(f"note: {remark}")
    if config.verbose:
        print("config:", json.dumps(to_dict(config), indent=2))
        print("deepspeed:", json.dumps(ds, indent=2))
    print_run_directory(config, ds, dataset)
    hint = "" if config.verbose else "; --verbose prints all settings"
    print(f"dry run: nothing was started{hint}")
    return 0
