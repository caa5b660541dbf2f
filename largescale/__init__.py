"""largescale: curriculum training of diffusion transformers on DeepSpeed ZeRO-2
(arXiv:2403.10348)."""

import sys

# As typing has it, which takes longer to import than all of this.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from largescale.pipeline import Pipeline

__version__ = "0.1.0"


def load(source: "str | Path", **options: "Any") -> "Pipeline":
    """A trained model to draw images with, of a run directory, an export, a name on the hub or
    published weights. `options` are those of `largescale.pipeline.load`."""
    from largescale.host.extras import require_training

    # torch is loaded with the first model, not with the package.
    require_training()
    from largescale import pipeline

    return pipeline.load(source, **options)


def _started_as_program() -> bool:
    """Whether Python runs a module of this project, as in python -m largescale.train."""
    words = [*sys.orig_argv, ""]
    module = words[words.index("-m") + 1] if "-m" in words else ""
    return module.startswith(("largescale.", "data_prep.", "eval."))


# `pip install largescale` brings numpy alone, which is enough for the curriculum. Programs import
# more in their first lines, so what says that it is missing is set before.
if _started_as_program():
    from largescale.host.extras import name_the_extra

    sys.excepthook = name_the_extra
