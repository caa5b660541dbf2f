"""The packages that `pip install largescale`, which is for the curriculum alone, leaves out."""

import sys
from types import TracebackType

from largescale.errors import LargescaleError
from largescale.host.launch import print_error

# What the extra `train` brings, by the names under which it is imported.
TRAIN = frozenset(
    ("PIL", "deepspeed", "pyarrow", "safetensors", "tensorboard", "torch", "tqdm", "tyro")
)


def name_the_extra(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """The sys.excepthook of programs: where a package is missing, one line names the extra that
    brings it. Any other error keeps its traceback."""
    if not (isinstance(error, ModuleNotFoundError) and error.name in TRAIN):
        sys.__excepthook__(kind, error, traceback)
        return
    # Not one that all ranks have: machines may differ in what is installed.
    missing = LargescaleError(
        f"{error.name} is not installed; pip install 'largescale[train]', in the clone: "
        "pip install -e '.[train]'"
    )
    print_error(missing)
    sys.exit(missing.exit_status)
