"""largescale: curriculum training of diffusion transformers on DeepSpeed ZeRO-2
(arXiv:2403.10348)."""

__version__ = "0.1.0"
