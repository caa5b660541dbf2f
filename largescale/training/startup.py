"""The start of a rank: what is checked and opened before DeepSpeed is loaded, and how an error that
ends the rank is handled."""

import contextlib
import dataclasses
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch

import largescale
from largescale.config.deepspeed import final_ds_config, precision
from largescale.config.derived import resolved_kernels
from largescale.config.schema import Config
from largescale.config.validation import validate
from largescale.data.compatibility import open_dataset, open_validation, read_copy
from largescale.distributed.ranks import Ranks, is_lost_contact
from largescale.distributed.watchdog import Watchdog, end_at_once, lost_rank
from largescale.engine.optimizer import choose_kernel
from largescale.errors import ConfigError, DeviceError, LargescaleError
from largescale.host.files import sources_sha256
from largescale.host.launch import (
    env_world_size,
    leave,
    print_error,
    printable_lines,
    threads_per_rank,
)
from largescale.host.machine import cores, keep_freed_memory
from largescale.host.signals import EXIT_REQUEUE
from largescale.models.compile import failure, what_to_compile
from largescale.models.half_precision import IN_TRAINING, check_on_cpu
from largescale.monitoring.run_record import note_end
from largescale.planning.memory import check_memory
from largescale.training.early_stop import asked_to_stop
from largescale.training.run_directory import check_writable, lock_run_dir
from largescale.training.staging import stage_data


def resolve_auto(config: Config) -> Config:
    """The config with what `auto` stands for on this machine: that is the run's setting, which a
    later start is compared with."""
    device = config.train.device
    kernel = choose_kernel(config.optimizer, device)
    compile = what_to_compile(config.train.compile, device, config.model.architecture)
    kernels = resolved_kernels(config.train)
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, kernel=kernel),
        train=dataclasses.replace(config.train, compile=compile, kernels=kernels),
    )


def start(config: Config, start_time: float, *, warned_of_memory: bool) -> int:
    """Train; the process's exit status. `warned_of_memory`: this rank has warned already that
    memory is short."""
    # Settings are checked before ranks wait for each other.
    validate(config, env_world_size())
    config = resolve_auto(config)
    ds = final_ds_config(config, env_world_size())
    with Watchdog(config.train.timeout_s) as watchdog:
        ranks = watchdog.ranks = Ranks(config.train.device, watchdog.limit_s)
        ranks.on_abort(lambda: print_error(lost_rank(ranks, watchdog.where, "a collective failed")))
        try:
            # Threads come first: what is measured or built later depends on their number.
            if config.train.threads or config.train.device == "cpu":
                threads = ranks.raise_on_all_ranks(
                    lambda: threads_per_rank(config.train.threads, os.environ, cores())
                )
                torch.set_num_threads(threads)
            if config.train.device == "cuda":
                use_tf32(config.train.tf32)

            # What this machine cannot do ends the run here, on all ranks.
            if config.train.device == "cpu":
                keep_freed_memory()
                ranks.raise_on_all_ranks(lambda: check_on_cpu(precision(ds), IN_TRAINING))
            ranks.raise_on_all_ranks(
                lambda: None if warned_of_memory else check_memory(config, ds, ranks.world_size)
            )
            status = open_and_train(config, ds, ranks, watchdog, start_time)
        except DeviceError as error:
            # The other ranks are in some collective, and notice as they do with a crash.
            end_at_once(error)
        except RuntimeError as error:
            watchdog.wait_if_ending()
            if is_lost_contact(error):
                end_after_lost_contact(config, ranks, watchdog, start_time)
            if why := failure(error):
                end_at_once(ConfigError(f"{why}; train without it: --train.compile off"))
            end_where_others_wait(ranks, error)
            raise
        except Exception as error:
            end_where_others_wait(ranks, error)
            raise
        ranks.close()
        return status


def use_tf32(wanted: bool) -> None:
    """Have a GPU compute float32 matrix products and convolutions in TF32, or exactly."""
    # torch's own defaults are no for products and yes for convolutions.
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    torch.backends.cudnn.allow_tf32 = wanted


def end_where_others_wait(ranks: Ranks, error: Exception) -> None:
    """Report an error that this rank has alone, and end the process; for one that all ranks have,
    close the process group."""
    # The other ranks wait in a collective, and NCCL's process group waits for them before it closes:
    # the error would be printed after their time limit, or never.
    agreed = isinstance(error, LargescaleError) and error.agreed
    if ranks.world_size > 1 and not agreed:
        if isinstance(error, LargescaleError):
            end_at_once(error)
        traceback.print_exception(error)
        leave(1)
    ranks.close()


def end_after_lost_contact(
    config: Config, ranks: Ranks, watchdog: Watchdog, start_time: float
) -> NoReturn:
    """End this process because another rank is gone, and record why where that is known."""
    killed = watchdog.killed()
    lost = lost_rank(ranks, watchdog.where, "lost contact", killed)
    # Rank 0, which keeps the record, may be the one that is gone.
    if killed and not lost.agreed:
        with contextlib.suppress(OSError):
            note_end(config.run_dir, start_time, killed)
    end_at_once(lost)


def require_one_version(ranks: Ranks) -> None:
    """Raise ConfigError where ranks run different sources of this package, as after an upgrade on
    some nodes only."""
    # Sources are compared, not version numbers: those stay while a checkout is edited.
    folder = Path(largescale.__file__).parent
    found = ranks.all_gather_json([sources_sha256(folder), str(folder), socket.gethostname()])
    first_version, first_folder, first_host = found[0]
    for rank, (version, where, host) in enumerate(found):
        if version != first_version:
            raise ConfigError(
                f"rank {rank} runs another version of largescale than rank 0: {where} on {host} and "
                f"{first_folder} on {first_host} differ; install the same on all nodes"
            )


def open_and_train(
    config: Config, ds: dict[str, Any], ranks: Ranks, watchdog: Watchdog, start_time: float
) -> int:
    """Open the data set and the run directory, then train; the process's exit status."""

    def log(text: str) -> None:
        if ranks.rank == 0:
            print(printable_lines(text), file=sys.stderr, flush=True)

    require_one_version(ranks)
    watchdog.heartbeat("start-up: data set")
    dataset = ranks.raise_on_all_ranks(lambda: open_dataset(config, ranks.rank, ranks.world_size))

    # The set is one that the model can be trained on: it is worth the time to copy it.
    watchdog.heartbeat("start-up: copies of the data")
    copies = stage_data(config, ranks, log)
    if copies is None:
        return EXIT_REQUEUE
    copy = copies.get(config.data.path)
    if copy is not None:
        ranks.raise_on_all_ranks(lambda: read_copy(config, dataset, copy))
    copy_of_validation = copies.get(config.data.validation or "")

    validation = ranks.raise_on_all_ranks(
        lambda: open_validation(config, dataset, ranks.rank, ranks.world_size, copy_of_validation)
    )

    # Every rank writes there; rank 0 holds the lock for all.
    watchdog.heartbeat("start-up: run directory")
    ranks.raise_on_all_ranks(lambda: check_writable(config.run_dir))
    lock = ranks.raise_on_all_ranks(
        lambda: lock_run_dir(config.run_dir, log) if ranks.rank == 0 else None
    )
    with lock or contextlib.nullcontext():
        if asked_to_stop(ranks, log, "before DeepSpeed was loaded"):
            return EXIT_REQUEUE
        # DeepSpeed's import takes seconds: errors of the settings or the data are raised before it.
        # It reads DS_ACCELERATOR when it is imported.
        os.environ["DS_ACCELERATOR"] = config.train.device
        from largescale.training.run import train_run

        return train_run(config, ds, ranks, dataset, validation, watchdog, lock, start_time, log)
