"""One start of a run: its newest checkpoint, the model and the engine, the loop, and what is logged
at the end.

Importing this loads DeepSpeed: DS_ACCELERATOR must be set to the run's device before.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from largescale.checkpoint.checkpointer import Checkpointer
from largescale.checkpoint.files import CheckpointDir
from largescale.checkpoint.run_lock import RunLock
from largescale.config.deepspeed import final_ds_config, precision
from largescale.config.schema import Config
from largescale.config.serialise import to_dict
from largescale.config.validation import ema_note, remarks
from largescale.config.yaml_files import to_yaml
from largescale.data.shards import ShardDataset
from largescale.diffusion.build import build_objective
from largescale.distributed.ranks import Ranks
from largescale.distributed.watchdog import Watchdog
from largescale.engine.deepspeed_engine import check_ds_config
from largescale.errors import CheckpointError
from largescale.host.files import write_atomically
from largescale.host.launch import tell_torchrun
from largescale.host.signals import EXIT_REQUEUE
from largescale.monitoring.goodput import Goodput
from largescale.monitoring.telemetry import Telemetry
from largescale.monitoring.trackers.build import start_services
from largescale.planning.batch_size import explain_out_of_memory, resolve_micro_batch_size
from largescale.training.early_stop import asked_to_stop
from largescale.training.first_weights import FirstWeights, check_resumed, started_from
from largescale.training.recorder import Recorder
from largescale.training.run_directory import (
    check_checkpoints_still_exist,
    check_same_run,
    finished_message,
    rounding_changes,
)
from largescale.training.state import TrainingState, load_checkpoint
from largescale.training.step import TrainStep
from largescale.training.trainer import Trainer

Log = Callable[[str], None]  # prints on rank 0


def train_run(
    config: Config,
    ds: dict[str, Any],
    ranks: Ranks,
    dataset: ShardDataset,
    validation: ShardDataset | None,
    watchdog: Watchdog,
    lock: RunLock | None,
    start_time: float,
    log: Log,
) -> int:
    """Train, from the newest checkpoint if there is one; the process's exit status.

    `ds`: DeepSpeed's settings. `validation`: held-out images. `lock`: rank 0's, on the run
    directory. `start_time`: the program's, in seconds since 1970."""
    # A finished run needs no model; a checkpoint of another run is refused before one is built.
    check_ds_config(ds)
    identity = run_identity(config, ds, dataset)
    watchdog.heartbeat("start-up: checkpoints")
    checkpointer = Checkpointer(
        config.run_dir, config.checkpoint, ranks, patience_s=config.train.timeout_s / 2, lock=lock
    )
    checkpoint = newest_to_resume(config, identity, checkpointer, ranks, dataset, log)
    if checkpoint is not None and checkpoint.step >= config.train.steps:
        log(finished_message(config, checkpoint))
        return 0

    # The checkpoint's config is that of this start, with the micro batch that `auto` found.
    watchdog.heartbeat("start-up: model")
    config = resolve_micro_batch_size(config, ds, ranks, log)
    ds = final_ds_config(config, ranks.world_size)
    identity["config"] = to_dict(config)
    first_weights = None
    if checkpoint is not None:
        identity["init"] = checkpoint.manifest()["state"].get("init")
    elif config.train.init_from is not None:
        first_weights = read_first_weights(config, identity, ranks, log)
    for remark in remarks(config, dataset.info.num_classes):
        log(f"note: {remark}")

    # Most memory is taken from here on: an error for lack of it names what to change.
    objective = build_objective(config)
    state = TrainingState(config, objective)
    with explain_out_of_memory(config, ranks.world_size, lambda: watchdog.where):
        train_step = TrainStep(config, ds, ranks, dataset, objective, state, first_weights)
        del first_weights
        if asked_to_stop(ranks, log, "while the model was built"):
            return EXIT_REQUEUE
        if checkpoint is not None:
            watchdog.heartbeat("start-up: resume")
            resume(checkpoint, train_step, state, log)
            take_over_growth(checkpoint, state, dataset, log)
        log(first_line(train_step, state, dataset, precision(ds)))
        finished, goodput = run_trainer(
            train_step, dataset, validation, checkpointer, identity, watchdog, lock, start_time
        )
    log_end(config, state, checkpointer.run_dir, goodput, finished, log)
    return 0 if finished else EXIT_REQUEUE


def run_trainer(
    train_step: TrainStep,
    dataset: ShardDataset,
    validation: ShardDataset | None,
    checkpointer: Checkpointer,
    identity: dict[str, Any],
    watchdog: Watchdog,
    lock: RunLock | None,
    start_time: float,
) -> tuple[bool, Goodput]:
    """Train with telemetry: (whether the run is finished, where its time went). Collective."""
    config = train_step.config
    ranks = train_step.ranks
    state = train_step.state

    # The state is final, so telemetry and its clocks can start at its step.
    watchdog.heartbeat("start-up: telemetry")
    telemetry = ranks.raise_on_all_ranks(lambda: open_telemetry(config, ranks, state.step, lock))
    with telemetry:
        recorder = Recorder(
            config,
            ranks,
            state,
            telemetry,
            watchdog,
            precision=identity["precision"],
            flops_per_step=train_step.flops,
            start_time=start_time,
        )
        # For a person, and for --config of another run; nothing reads it to resume.
        if ranks.rank == 0:
            with telemetry.tolerate_disk_errors():
                telemetry.require_lock()
                write_atomically(config.run_dir / "config.yaml", to_yaml(config))
        trainer = Trainer(
            config,
            ranks,
            dataset,
            train_step,
            state,
            checkpointer,
            recorder,
            identity,
            validation,
        )
        finished = trainer.run()
        telemetry.summarise(
            "finished" if finished else "stopped",
            step=state.step,
            saved_step=checkpointer.last_saved,
            curriculum_index=state.curriculum.index,
            skipped_steps=state.skipped_steps,
            goodput=str(recorder.goodput.account()),
        )
        return finished, recorder.goodput


def open_telemetry(config: Config, ranks: Ranks, step: int, lock: RunLock | None) -> Telemetry:
    # Only rank 0 writes; the others have the same object, so that the loop need not ask.
    return Telemetry(
        config.run_dir,
        active=ranks.rank == 0,
        tensorboard="tensorboard" in config.telemetry.trackers,
        step=step,
        steps=config.train.steps,
        require_lock=lock.require if lock else lambda: None,
        trackers=partial(start_services, config, step),
    )


def log_end(
    config: Config, state: TrainingState, run_dir: Path, goodput: Goodput, finished: bool, log: Log
) -> None:
    """Log how the run ended; where it is not finished, torchrun reports it too."""
    text = last_line(state, run_dir, goodput, finished)
    log(text)
    # A short run's EMA still contains much of the first weights.
    if finished and (note := ema_note(config)):
        log(f"note: {note}")
    if not finished:
        tell_torchrun(text)


def run_identity(config: Config, ds: dict[str, Any], dataset: ShardDataset) -> dict[str, Any]:
    """What a checkpoint records of its run besides the progress: a resumed run is compared with
    it."""
    # "made_with" is where the data set's encoders were found, for sampling.
    return {
        "config": to_dict(config),
        "precision": precision(ds),
        "dataset": dataset.fingerprint,
        "data_info": dataset.info.plain(),
        "made_with": dataset.manifest.get("made_with", {}),
    }


def newest_to_resume(
    config: Config,
    identity: dict[str, Any],
    checkpointer: Checkpointer,
    ranks: Ranks,
    dataset: ShardDataset,
    log: Log,
) -> CheckpointDir | None:
    """The newest checkpoint that is valid; None in a new run. Collective.

    Raises CheckpointError where it is another run's, or where there were checkpoints and none is
    left.
    """
    checkpoint = checkpointer.newest(log)
    # Never start over silently: a folder that is not mounted looks like a new run.
    if checkpoint is None:
        ranks.raise_on_all_ranks(lambda: check_checkpoints_still_exist(config.run_dir))
    else:
        ranks.raise_on_all_ranks(lambda: check_same_run(checkpoint, identity, dataset, log))
        # To hash gigabytes once is enough.
        ranks.raise_on_all_ranks(
            lambda: check_resumed(config, checkpoint) if ranks.rank == 0 else None
        )
    return checkpoint


def take_over_growth(
    checkpoint: CheckpointDir, state: TrainingState, dataset: ShardDataset, log: Log
) -> None:
    """Note in the state where images were added to the data set since the checkpoint, which
    check_same_run has allowed. All ranks do so alike."""
    saved = checkpoint.manifest()["state"]
    name = saved.get("data_info", {}).get("name", "")
    if dataset.has_fingerprint(saved["dataset"], name):
        return
    rows = dataset.rows_when(saved["dataset"], name)
    assert rows is not None
    extent = state.data_has_grown(rows, len(dataset))
    log(
        f"the data set has grown from {rows:,} to {len(dataset):,} rows: this epoch is finished in the "
        f"old order, and from sample {extent.start:,} on, in step "
        f"{extent.start // state.global_batch_size + 1:,} of the inputs, each epoch has all rows"
    )


def read_first_weights(
    config: Config, identity: dict[str, Any], ranks: Ranks, log: Log
) -> FirstWeights:
    """The weights that a new run starts with; they become part of its identity. Collective."""
    first = ranks.raise_on_all_ranks(lambda: FirstWeights.read(config))
    record = ranks.raise_on_all_ranks(first.record)
    # Read from a file system that has not shown a new file everywhere, for example.
    if len({found["sha256"] for found in ranks.all_gather_json(record)}) > 1:
        raise CheckpointError(
            f"--train.init-from {first.source} is not the same on all ranks; copy it anew"
        )
    identity["init"] = record
    log(started_from(record))
    for note in first.notes(config, identity["data_info"]):
        log(f"note: {note}")
    return first


def resume(
    checkpoint: CheckpointDir, train_step: TrainStep, state: TrainingState, log: Log
) -> None:
    """Load the checkpoint, and log what makes the rest of the run differ in rounding.
    Collective."""
    config = train_step.config
    ranks = train_step.ranks
    load_checkpoint(checkpoint, ranks, train_step.engine, state)
    # These changes are allowed, and are the reason where two logs differ in the last digits.
    changes = rounding_changes(
        checkpoint.manifest(), config, ranks.world_size, train_step.micro_batch_size
    )
    for change in changes:
        log(f"changed on resume, so the same up to rounding, not bitwise: {change}")
    log(f"resumed {config.run_dir} at step {state.step}, curriculum index {state.curriculum.index}")


def first_line(
    train_step: TrainStep, state: TrainingState, dataset: ShardDataset, precision: str
) -> str:
    """What this start trains, on what, and with which settings that `auto` may have chosen."""
    config = train_step.config
    ranks = train_step.ranks
    if precision == "fp32" and config.train.device == "cuda" and config.train.tf32:
        precision = "fp32 (products in TF32)"
    threads = ""
    if config.train.device == "cpu":
        n = torch.get_num_threads()
        threads = f" with {n} thread{'s' if n > 1 else ''}"
    again = ", activations computed again" if config.train.activation_checkpointing else ""

    # The batch is micro batch x accumulation steps x ranks.
    return (
        f"training {config.run_dir} to step {config.train.steps}: {train_step.engine.numel:,} "
        f"parameters, {len(dataset):,} rows, {ranks.world_size} x {config.train.device}{threads}, "
        f"{precision}, batch {config.train.global_batch_size} = {train_step.micro_batch_size} x "
        f"{train_step.grad_accum_steps} x {ranks.world_size}, AdamW of {config.optimizer.kernel}, "
        f"compiled: {config.train.compile}{again}"
        + ", fused kernels"
        * (config.train.kernels == "fused")
    )


def last_line(state: TrainingState, run_dir: Path, goodput: Goodput, finished: bool) -> str:
    """Where the run ended, and what its time was spent on."""
    # The account shows what was lost to kills, waits and checkpoints.
    ended = "finished" if finished else "stopped"
    remedy = "" if finished else "; run again to continue"
    return (
        f"{ended} {run_dir} at step {state.step}, curriculum index {state.curriculum.index}, "
        f"{state.skipped_steps} skipped steps; {goodput.account()}{remedy}"
    )
