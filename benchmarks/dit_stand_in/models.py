"""What benchmarks/train_step_peers.py takes from a checkout of facebookresearch/DiT or fast-DiT,
made of our own parts: benchmarks/gpu_check.py --rehearse has no checkout."""

from largescale.models.dit import DiT

__all__ = ["DiT"]
