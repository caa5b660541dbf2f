"""largescale: curriculum training of diffusion transformers on DeepSpeed ZeRO-2
(arXiv:2403.10348)."""

import sys

__version__ = "0.1.0"


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
