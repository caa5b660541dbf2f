"""From a config to a running Trainer: what is checked, opened and built, in the order in which it can be refused."""

import contextlib
import dataclasses
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

import largescale
from largescale.checkpoint.files import CheckpointDir
from largescale.config.deepspeed import final_ds_config, precision
from largescale.config.schema import Config
from largescale.config.serialise import to_dict
from largescale.config.validation import ema_note, remarks, validate
from largescale.data.compatibility import open_dataset
from largescale.data.shards import ShardDataset
from largescale.distributed.ranks import Ranks, is_lost_contact
from largescale.distributed.watchdog import Watch, end_at_once, lost_rank
from largescale.engine.optimizer import choose_kernel
from largescale.errors import ConfigError, DeviceError
from largescale.host.files import sources_sha256
from largescale.host.launch import env_world_size, printable_lines, tell_torchrun, threads_per_rank
from largescale.host.machine import cores, keep_freed_memory
from largescale.host.signals import EXIT_REQUEUE, stop_requested
from largescale.models.compile import failure, what_to_compile
from largescale.models.half_precision import IN_TRAINING, check_on_cpu
from largescale.monitoring.run_record import note_end
from largescale.planning.memory import check_memory
from largescale.training.run_directory import (
    check_nothing_is_gone,
    check_same_run,
    check_writable,
    claim,
    finished_already,
    rounding_changes,
)

if TYPE_CHECKING:
    from largescale.checkpoint.checkpointer import Checkpointer
    from largescale.training.trainer import Trainer


def settled(config: Config) -> Config:
    """With what `auto` stands for here: that is the run's setting, which a later start is compared with."""
    device = config.train.device
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, kernel=choose_kernel(config.optimizer, device)),
        train=dataclasses.replace(config.train, compile=what_to_compile(
            config.train.compile, device, config.model.architecture)),
    )


def run(config: Config, began_unix_s: float, *, warned_of_memory: bool) -> int:
    """Train; the process's exit status. `warned_of_memory`: this rank has said that memory is short."""
    validate(config, env_world_size())
    config = settled(config)
    ds = final_ds_config(config, env_world_size())
    with Watch(config.train.timeout_s) as watch:
        ranks = watch.ranks = Ranks(config.train.device, watch.limit_s)
        try:
            if config.train.threads or config.train.device == "cpu":
                threads = ranks.together(lambda: threads_per_rank(config.train.threads, os.environ, cores()))
                torch.set_num_threads(threads)
            if config.train.device == "cpu":
                keep_freed_memory()
                ranks.together(lambda: check_on_cpu(precision(ds), IN_TRAINING))
            ranks.together(lambda: None if warned_of_memory else check_memory(config, ds, ranks.world_size))
            return train(config, ds, ranks, watch, began_unix_s)
        except DeviceError as error:
            end_at_once(error)  # the other ranks are in some collective, and notice as they do with a crash
        except RuntimeError as error:
            watch.wait_if_ending()
            if is_lost_contact(error):
                killed = watch.killed()
                lost = lost_rank(ranks, watch.where, "lost contact", killed)
                if killed and not lost.agreed:  # rank 0, which keeps the record, may be the one
                    with contextlib.suppress(OSError):
                        note_end(config.run_dir, began_unix_s, killed)
                end_at_once(lost)
            if why := failure(error):
                end_at_once(ConfigError(f"{why}; train without it: --train.compile off"))
            raise
        finally:
            ranks.close()


def require_one_version(ranks: Ranks) -> None:
    """Raises ConfigError where ranks run different sources of this package, as after an upgrade on some nodes only."""
    folder = Path(largescale.__file__).parent
    found = ranks.all_gather_json([sources_sha256(folder), str(folder), socket.gethostname()])
    for rank, (version, where, host) in enumerate(found):
        if version != found[0][0]:
            raise ConfigError(
                f"rank {rank} runs another version of largescale than rank 0: {where} on {host} and {found[0][1]} on "
                f"{found[0][2]} differ; install the same on all nodes")


def train(config: Config, ds: dict[str, Any], ranks: Ranks, watch: Watch, began_unix_s: float) -> int:
    def say(text: str) -> None:
        if ranks.rank == 0:
            print(printable_lines(text), file=sys.stderr, flush=True)

    require_one_version(ranks)
    watch.at("start-up: data set")
    dataset = ranks.together(lambda: open_dataset(config, ranks.rank, ranks.world_size))
    watch.at("start-up: run directory")
    ranks.together(lambda: check_writable(config.run_dir))
    lock = ranks.together(lambda: claim(config.run_dir, say) if ranks.rank == 0 else None)
    with lock or contextlib.nullcontext():
        return train_claimed(config, ds, ranks, dataset, watch, began_unix_s, say, lock)


def train_claimed(config: Config, ds: dict[str, Any], ranks: Ranks, dataset: ShardDataset, watch: Watch,
                  began_unix_s: float, say: Callable[[str], None], lock: IO[str] | None) -> int:
    def asked_to_stop(at: str) -> bool:
        if stop := ranks.any(stop_requested()):
            text = f"asked to stop {at}; nothing is lost, run again to go on"
            tell_torchrun(text)
            say(text)
        return stop

    if asked_to_stop("before DeepSpeed was loaded"):
        return EXIT_REQUEUE
    # DeepSpeed's import takes seconds: what is wrong with the settings or the data is said before it.
    os.environ["DS_ACCELERATOR"] = config.train.device
    from largescale.checkpoint.checkpointer import Checkpointer
    from largescale.engine.deepspeed_engine import check_ds_config
    from largescale.monitoring.telemetry import Telemetry
    from largescale.planning.batch_size import saying_what_to_do, with_micro_batch_size
    from largescale.training.trainer import Trainer

    check_ds_config(ds)
    identity = run_identity(config, ds, dataset)
    watch.at("start-up: checkpoints")
    checkpointer = Checkpointer(
        config.run_dir, config.checkpoint, ranks, patience_s=config.train.timeout_s / 2, lock=lock)
    checkpoint = checkpointer.newest(say)
    if checkpoint is None:
        ranks.together(lambda: check_nothing_is_gone(config.run_dir))
    else:
        ranks.together(lambda: check_same_run(checkpoint, identity, dataset, say))
        if checkpoint.step >= config.train.steps:
            say(finished_already(config, checkpoint))
            return 0

    watch.at("start-up: model")
    config = with_micro_batch_size(config, ds, ranks, say)
    ds, identity["config"] = final_ds_config(config, ranks.world_size), to_dict(config)
    for remark in remarks(config, dataset.info.num_classes):
        say(f"note: {remark}")
    with saying_what_to_do(config, ranks.world_size, lambda: watch.where):
        trainer = Trainer(config, ds, ranks, dataset, checkpointer, watch, identity, began_unix_s)
        if asked_to_stop("while the model was built"):
            return EXIT_REQUEUE
        if checkpoint is not None:
            watch.at("start-up: resume")
            resume(trainer, checkpoint, say)
        say(first_line(trainer, precision(ds)))
        watch.at("start-up: telemetry")
        with ranks.together(lambda: Telemetry(
            config.run_dir, active=ranks.rank == 0, tensorboard=config.telemetry.tensorboard,
            step=trainer.step, steps=config.train.steps,
        )) as telemetry:
            finished = trainer.run(telemetry)
    say(text := last_line(trainer, checkpointer, finished))
    if finished and (note := ema_note(config)):
        say(f"note: {note}")
    if not finished:
        tell_torchrun(text)
    return 0 if finished else EXIT_REQUEUE


def run_identity(config: Config, ds: dict[str, Any], dataset: ShardDataset) -> dict[str, Any]:
    """What a checkpoint says about its run besides the progress: a resumed run is compared with it."""
    return {
        "config": to_dict(config), "precision": precision(ds),
        "dataset": dataset.fingerprint, "data_info": dataset.info.plain(),
        "made_with": dataset.manifest.get("made_with", {}),  # where the encoders were, for sampling
    }


def resume(trainer: "Trainer", checkpoint: CheckpointDir, say: Callable[[str], None]) -> None:
    """Collective. Load the checkpoint, and say what makes the rest of the run differ in rounding."""
    config, manifest = trainer.config, checkpoint.manifest()
    trainer.resume(checkpoint)
    for change in rounding_changes(manifest, config, trainer.ranks.world_size, trainer.micro_batch_size):
        say(f"changed on resume, so the same up to rounding, not bitwise: {change}")
    say(f"resumed {config.run_dir} at step {trainer.step}, curriculum index {trainer.curriculum.index}")


def first_line(trainer: "Trainer", precision: str) -> str:
    config, ranks = trainer.config, trainer.ranks
    n = torch.get_num_threads()
    threads = f" with {n} thread{'s' if n > 1 else ''}" if config.train.device == "cpu" else ""
    return (
        f"training {config.run_dir} to step {config.train.steps}: {trainer.engine.numel:,} parameters, "
        f"{len(trainer.dataset):,} rows, {ranks.world_size} x {config.train.device}{threads}, {precision}, "
        f"batch {config.train.global_batch_size} = {trainer.micro_batch_size} x {trainer.grad_accum_steps} x "
        f"{ranks.world_size}, AdamW of {config.optimizer.kernel}, compiled: {config.train.compile}"
        + (", activations computed again" if config.train.activation_checkpointing else "")
    )


def last_line(trainer: "Trainer", checkpointer: "Checkpointer", finished: bool) -> str:
    return (f"{'finished' if finished else 'stopped'} {checkpointer.run_dir} at step {trainer.step}, "
            f"curriculum index {trainer.curriculum.index}, {trainer.skipped_steps} skipped steps; "
            f"{trainer.goodput.account()}" + ("" if finished else "; run again to go on"))
