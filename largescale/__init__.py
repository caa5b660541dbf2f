"""largescale: curriculum training of diffusion transformers on DeepSpeed ZeRO-2
(arXiv:2403.10348)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from largescale.pipeline import Pipeline

__version__ = "0.1.0"


def load(source: "str | Path", **options: Any) -> "Pipeline":
    """A trained model to draw images with: a run directory, an export, or the name of one on the
    hub. `options` are those of `largescale.pipeline.load`."""
    # torch is loaded with the first model, not with the package.
    from largescale import pipeline

    return pipeline.load(source, **options)
