"""The trackers of a run."""

import uuid
from collections.abc import Callable
from pathlib import Path

from largescale.config.schema import Config
from largescale.config.serialise import to_dict
from largescale.host.files import write_atomically
from largescale.monitoring.telemetry import rows_from
from largescale.monitoring.trackers.background import Background
from largescale.monitoring.trackers.service import RunInfo, Service

# Seconds for which the end of a run waits for a service at most.
DEADLINE_S = 15.0


def _wandb() -> Service:
    from largescale.monitoring.trackers.wandb import Wandb

    return Wandb()


def _mlflow() -> Service:
    from largescale.monitoring.trackers.mlflow import Mlflow

    return Mlflow()


# By the names in telemetry.trackers. Each is called in its thread: importing a client takes seconds.
SERVICES: dict[str, Callable[[], Service]] = {"wandb": _wandb, "mlflow": _mlflow}


def start_services(
    config: Config, step: int, run_dir: Callable[[], Path], message: Callable[[str], None]
) -> list[Background]:
    """A thread for each service of telemetry.trackers. `step`: where the run stands; `run_dir`: the
    run directory under its present name; `message` prints a line."""

    def folder() -> Path:
        return run_dir() / "trackers"

    def run() -> RunInfo:
        return RunInfo(run_id(folder()), config.name, to_dict(config), folder())

    # The other ranks wait for this one.
    deadline_s = min(DEADLINE_S, config.train.timeout_s / 2)
    started = []
    for name in config.telemetry.trackers:
        if name in SERVICES:
            service = Background(
                name,
                SERVICES[name],
                run,
                folder=folder,
                step=step,
                logged=lambda first: rows_from(run_dir(), first),
                message=message,
                deadline_s=deadline_s,
            )
            started.append(service)
    return started


def run_id(folder: Path) -> str:
    """What services know the run by: made in its first start, and kept in RUN/trackers/id."""
    path = folder / "id"
    if path.exists() and (known := path.read_text().strip()):
        return known
    folder.mkdir(exist_ok=True)
    made = uuid.uuid4().hex[:16]
    write_atomically(path, made + "\n")
    return made
