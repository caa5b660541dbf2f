"""python -m largescale.train PRESET [--section.field VALUE ...]

Under torchrun or srun, one process a rank. To resume, run the same command again.
"""

import contextlib
import dataclasses
import faulthandler
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from largescale.checkpoint.files import CheckpointDir
from largescale.config.deepspeed import final_ds_config, precision
from largescale.config.presets import PRESETS, find_preset
from largescale.config.schema import Config, batch_layout, differences, from_dict, to_dict
from largescale.config.validation import ema_note, remarks, validate
from largescale.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeviceError,
    LargescaleError,
    StorageError,
    usable,
)
from largescale.host.files import LOCK, exclusive, require_writable, sources_sha256
from largescale.host.launch import (
    arguments,
    env_rank,
    env_world_size,
    heartbeat,
    leave,
    print_error,
    printable_lines,
    tell_torchrun,
    threads_per_rank,
)
from largescale.host.machine import check_process_memory, cores, keep_freed_memory
from largescale.host.signals import EXIT_REQUEUE, serve_stop_signals, stop_requested
from largescale.monitoring.run_record import note_end, read_starts

LOCAL_RANK_ARGUMENT = r"--local[-_]rank=\d+"
"""What DeepSpeed's launcher and torch.distributed.launch put first. They set the variable LOCAL_RANK too."""
LOCK_WAIT_S = 180  # a lease of NFS outlives the machine that held it

if TYPE_CHECKING:
    from largescale.data.shards import ShardDataset
    from largescale.distributed.ranks import Ranks
    from largescale.distributed.watchdog import Watch


def parse(args: list[str]) -> Config:
    """Typed overrides of a preset. Exits with a message for an unknown key, naming the nearest one, or a wrong type."""
    import tyro

    name, *overrides = [arg for arg in args if not re.fullmatch(LOCAL_RANK_ARGUMENT, arg)] or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__ + "\nPresets:\n  " + "\n  ".join(PRESETS) + "\n\nIts settings: PRESET --help")
        sys.exit(0)
    # One rank speaks for all.
    return tyro.cli(
        Config, default=find_preset(name), args=overrides, prog=f"python -m largescale.train {name}",
        config=(tyro.conf.AvoidSubcommands,), console_outputs=env_rank() == 0,
    )


def open_dataset(config: Config, rank: int = 0, world_size: int = 1) -> "ShardDataset":
    """The data set, checked against the model; ranks share the hashing. Raises DataError."""
    from largescale.data.shards import ShardDataset, check_flip
    from largescale.models.build import latent_shape

    dataset = ShardDataset(config.data.path, config.data.verify, slice(rank, None, world_size))
    if dataset.info.x_shape != latent_shape(config.model):
        raise DataError(
            f"{config.data.path} holds {dataset.info.kind} of shape {dataset.info.x_shape}, the model takes "
            f"{latent_shape(config.model)}; set --model.in-channels and --model.input-size, or choose other data"
        )
    check_condition(dataset, config)
    if config.data.horizontal_flip:
        check_flip(dataset.info, dataset.has_mirror)
    if config.data.augment and dataset.info.kind != "pixels":
        raise DataError(
            f"{config.data.path} holds {dataset.info.kind}, and augmentation is of pixels; set --data.augment 0")
    return dataset


def check_condition(dataset: "ShardDataset", config: Config) -> None:
    """Raises DataError for data that cannot tell the model what it wants to be told."""
    model, info, path = config.model, dataset.info, config.data.path
    if model.num_classes and not info.num_classes:
        raise DataError(f"{path} has no labels, the model wants {model.num_classes} classes; choose other data, or "
                        "train without: --model.num-classes 0 --model.class-dropout-prob 0")
    if 0 < model.num_classes < info.num_classes:
        raise DataError(f"{path} has labels up to {info.num_classes - 1}, the model's classes end at "
                        f"{model.num_classes - 1}; set --model.num-classes {info.num_classes}")
    if not model.caption_tokens:
        return
    if info.captions is None:
        raise DataError(f"{path} has no encoded captions; pack it with --text-encoder, or choose other data")
    wanted = (model.caption_tokens, model.caption_width, model.caption_pooled_width)
    if (found := dataclasses.astuple(info.captions)) != wanted:
        raise DataError(
            f"{path} has captions of (tokens, width, pooled width) {found}, the model takes {wanted}; "
            f"set --model.caption-tokens {found[0]} --model.caption-width {found[1]} "
            f"--model.caption-pooled-width {found[2]}")


def settled(config: Config) -> Config:
    """With what `auto` stands for here: that is the run's setting, which a later start is compared with."""
    from largescale.engine.optimizer import choose_kernel
    from largescale.models.compile import what_to_compile

    device = config.train.device
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, kernel=choose_kernel(config.optimizer, device)),
        train=dataclasses.replace(config.train, compile=what_to_compile(
            config.train.compile, device, config.model.architecture)),
    )


def run(config: Config, began_unix_s: float) -> int:
    """Train; the process's exit status."""
    warned = check_process_memory(config.train.device)
    import torch

    from largescale.distributed.ranks import Ranks, is_lost_contact
    from largescale.distributed.watchdog import Watch, end_at_once, lost_rank
    from largescale.models.compile import failure
    from largescale.models.half_precision import IN_TRAINING, check_on_cpu
    from largescale.planning.memory import check_memory

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
            ranks.together(lambda: None if warned else check_memory(config, ds, ranks.world_size))
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


def train(config: Config, ds: dict[str, Any], ranks: "Ranks", watch: "Watch", began_unix_s: float) -> int:
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


def train_claimed(config: Config, ds: dict[str, Any], ranks: "Ranks", dataset: "ShardDataset", watch: "Watch",
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
    import torch

    from largescale.checkpoint.checkpointer import Checkpointer
    from largescale.engine.deepspeed_engine import check_ds_config
    from largescale.monitoring.telemetry import Telemetry
    from largescale.planning.batch_size import saying_what_to_do, with_micro_batch_size
    from largescale.training.trainer import Trainer

    check_ds_config(ds)
    identity = {
        "config": to_dict(config), "precision": precision(ds),
        "dataset": dataset.fingerprint, "data_info": dataset.info.plain(),
        "made_with": dataset.manifest.get("made_with", {}),  # where the encoders were, for sampling
    }
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
            trainer.resume(checkpoint)
            for change in rounding_changes(checkpoint.manifest(), config, ranks.world_size, trainer.micro_batch_size):
                say(f"changed on resume, so the same up to rounding, not bitwise: {change}")
            say(f"resumed {config.run_dir} at step {trainer.step}, curriculum index {trainer.curriculum.index}")
        n = torch.get_num_threads()
        threads = f" with {n} thread{'s' if n > 1 else ''}" if config.train.device == "cpu" else ""
        say(
            f"training {config.run_dir} to step {config.train.steps}: {trainer.engine.numel:,} parameters, "
            f"{len(dataset):,} rows, {ranks.world_size} x {config.train.device}{threads}, {precision(ds)}, "
            f"batch {config.train.global_batch_size} = {trainer.micro_batch_size} x {trainer.grad_accum_steps} x "
            f"{ranks.world_size}, AdamW of {config.optimizer.kernel}, compiled: {config.train.compile}"
            + (", activations computed again" if config.train.activation_checkpointing else "")
        )
        watch.at("start-up: telemetry")
        with ranks.together(lambda: Telemetry(
            config.run_dir, active=ranks.rank == 0, tensorboard=config.telemetry.tensorboard,
            step=trainer.step, steps=config.train.steps,
        )) as telemetry:
            finished = trainer.run(telemetry)
    text = (f"{'finished' if finished else 'stopped'} {checkpointer.run_dir} at step {trainer.step}, "
            f"curriculum index {trainer.curriculum.index}, {trainer.skipped_steps} skipped steps; "
            f"{trainer.goodput.account()}" + ("" if finished else "; run again to go on"))
    say(text)
    if finished and (note := ema_note(config)):
        say(f"note: {note}")
    if not finished:
        tell_torchrun(text)
    return 0 if finished else EXIT_REQUEUE


def check_writable(run_dir: Path) -> None:
    """Make the run directory, and prove that this rank can write there, also what lies there. Raises CheckpointError
    where it never can."""
    names = (LOCK, "metrics.jsonl", *(f"{folder}/new" for folder in ("checkpoints", "starts")))
    require_writable(*(run_dir / name for name in names), remedy="choose another --output")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write to {run_dir} at present: {error}") from error


def check_nothing_is_gone(run_dir: Path) -> None:
    """Never a silent restart: checkpoints that were there once, and are not found, stop the run."""
    if (saved := max((start.saved_step for start in read_starts(run_dir)), default=-1)) >= 0:
        raise CheckpointError(
            f"{run_dir} has no checkpoint any more, but step {saved} was saved: restore {run_dir}/checkpoints; to "
            f"begin again, delete {run_dir}, or give another --output DIR"
        )


def claim(run_dir: Path, say: Callable[[str], None]) -> IO[str]:
    """Of two processes only one may train a run. Waits for one that is about to end, as after a requeue.

    Raises StorageError where it does not end."""
    for second in range(LOCK_WAIT_S):
        if lock := exclusive(run_dir / LOCK):
            return lock
        if stop_requested():
            break
        if second == 0:
            say(f"another process trains {run_dir}: waiting for it, for {LOCK_WAIT_S} s")
        heartbeat()
        time.sleep(1)
    raise StorageError(f"another process trains {run_dir}; stop it, or start another run with --output DIR")


def finished_already(config: Config, checkpoint: CheckpointDir) -> str:
    return (f"finished already: {config.run_dir} is at step {checkpoint.step} of train.steps={config.train.steps}; "
            "to train on, raise --train.steps; for another run, --output DIR")


def check_same_run(checkpoint: CheckpointDir, identity: dict[str, Any], dataset: "ShardDataset | None",
                   say: Callable[[str], None]) -> None:
    """A run directory belongs to one run: refuse what would make it another, say what is changed."""
    def comparable(state: dict[str, Any]) -> dict[str, Any]:
        config = to_dict(from_dict(state["config"]))  # fields that are new since then have their defaults
        return {**config, "precision": state["precision"], "dataset": state["dataset"]}

    with usable(checkpoint.path):
        saved = checkpoint.manifest()["state"]
        if dataset and dataset.has_fingerprint(saved["dataset"], saved.get("data_info", {}).get("name", "")):
            saved["dataset"] = identity["dataset"]  # packed anew, or under another name
        refused, said = differences(comparable(saved), comparable(identity))
    if refused:
        raise CheckpointError(
            f"{checkpoint.path.parent.parent} belongs to a run that differs in what may not change:\n  "
            + "\n  ".join(refused) + "\nresume it with its own settings, or start another run with --output DIR"
        )
    for change in said:
        say(f"changed on resume, in force from here on: {change}")


def rounding_changes(manifest: dict[str, Any], config: Config, world_size: int, micro: int) -> Iterator[str]:
    """What is not as it was when the checkpoint was written, and changes the order in which numbers are added."""
    import torch

    saved, before = from_dict(manifest["state"]["config"]), manifest["world_size"]
    # What dropout draws differs by micro batch too, which `differences` says.
    dropout = config.model.architecture == "ddpmpp" and config.model.unet.dropout > 0
    if before != world_size:
        yield f"ranks: {before} -> {world_size}"
    elif not dropout and saved.train.micro_batch_size != "auto" and (was := batch_layout(saved, before)[0]) != micro:
        yield f"micro batch: {was} -> {micro}"
    cpu = torch.backends.cpu.get_cpu_capability()
    if config.train.device == "cpu" and manifest.get("cpu", cpu) != cpu:
        yield f"the CPU's instructions: {manifest['cpu']} -> {cpu}"


def require_one_version(ranks: "Ranks") -> None:
    """Raises ConfigError where ranks run different sources of this package, as after an upgrade on some nodes only."""
    folder = Path(__file__).parent
    found = ranks.all_gather_json([sources_sha256(folder), str(folder), socket.gethostname()])
    for rank, (version, where, host) in enumerate(found):
        if version != found[0][0]:
            raise ConfigError(
                f"rank {rank} runs another version of largescale than rank 0: {where} on {host} and {found[0][1]} on "
                f"{found[0][2]} differ; install the same on all nodes")


def main(args: list[str] | None = None) -> int:
    began_unix_s = time.time()
    serve_stop_signals()
    try:
        config = parse(arguments(args))
        if config.dry_run:
            from largescale.planning.dry_run import dry_run

            return dry_run(config) if env_rank() == 0 else 0
        return run(config, began_unix_s)
    except LargescaleError as error:
        print_error(error)
        return error.exit_status


if __name__ == "__main__":
    faulthandler.enable()  # a shard that is cut short while it is mapped is a bus error, which Python does not see
    leave(main())
