"""The packages that `pip install largescale`, which is for the curriculum alone, leaves out."""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from types import TracebackType

from largescale.errors import ConfigError, LargescaleError
from largescale.host.launch import print_error

# What the extra `train` brings, by the names under which it is imported.
TRAIN = frozenset(
    ("PIL", "deepspeed", "pyarrow", "safetensors", "tensorboard", "torch", "tqdm", "tyro", "yaml")
)


def require_training() -> None:
    """Raise LargescaleError unless all is installed that training imports, some of it late."""
    for name in sorted(TRAIN):
        if find_spec(name) is None:
            raise not_installed(name)


def require_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError unless the packages of these trackers are installed, and mlflow knows its
    server."""
    for name in names:
        if name != "tensorboard" and find_spec(name) is None:
            raise ConfigError(
                f"telemetry.trackers has {name}, which is not installed; pip install "
                f"'largescale[{name}]', in the clone: pip install -e '.[{name}]'"
            )
    # Without it, mlflow would write files wherever the program was started.
    if "mlflow" in names and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError(
            "telemetry.trackers has mlflow, and MLFLOW_TRACKING_URI is not set; export "
            "MLFLOW_TRACKING_URI=http://HOST:PORT"
        )


def not_installed(name: str) -> LargescaleError:
    # Not one that all ranks have: machines may differ in what is installed.
    return LargescaleError(
        f"{name} is not installed; pip install 'largescale[train]', in the clone: "
        "pip install -e '.[train]'"
    )


def name_the_extra(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """The sys.excepthook of programs: where a package is missing, one line names the extra that
    brings it. Any other error keeps its traceback."""
    if isinstance(error, ModuleNotFoundError) and error.name in TRAIN:
        missing = not_installed(error.name)
        print_error(missing)
        sys.exit(missing.exit_status)
    sys.__excepthook__(kind, error, traceback)
