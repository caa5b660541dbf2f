"""Feeds one rank: the rows of each step, read ahead by a thread, and the stored values turned into x_start."""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from largescale.data.order import sample_indices
from largescale.data.shards import DatasetInfo, ShardDataset
from largescale.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's rows of one step, on the host, as stored."""

    latent: Tensor                                      # (accum, micro, C, H, W) uint8 or float16
    label: Tensor                                       # (accum, micro) int64
    latent_mirror: Tensor | None                        # as latent


class Loader(AbstractContextManager["Loader"]):
    """The batches of one rank, a function of (seed, step): `loader.batch(step)`.

    Row g of step s sits at position s * global_batch_size + g of the order. The rows are laid out as (accum, world,
    micro): micro step k of rank r takes [k, r], so every world size sees the same global batch.
    """

    def __init__(self, dataset: ShardDataset, *, seed: int, global_batch_size: int, micro_batch_size: int, rank: int,
                 world_size: int, start_step: int = 0, prefetch: int = 4, pin_memory: bool = False) -> None:
        if global_batch_size % (each := micro_batch_size * world_size):
            raise ConfigError(f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size*world_size="
                              f"{each}; try --train.global-batch-size {-(-global_batch_size // each) * each}")
        self.dataset, self.seed, self.prefetch, self.pin_memory = dataset, seed, prefetch, pin_memory
        self.global_batch_size = global_batch_size
        self._rows = np.arange(global_batch_size).reshape(-1, world_size, micro_batch_size)[:, rank]  # (accum, micro)
        self._pending: dict[int, Future[Batch]] = {}    # the current step and the `prefetch` steps after it
        # a new thread is on GPU 0 until told: without this, pinning would open a context there for every rank
        on_gpu = (torch.cuda.set_device, (torch.cuda.current_device(),)) if pin_memory else (None, ())
        self._thread = ThreadPoolExecutor(1, "loader", *on_gpu)
        self._read_ahead(start_step)

    def batch(self, step: int) -> Batch:
        """The rows of `step`; asked again (an fp16 overflow retries), the same object. Any step may follow any other.

        Raises what reading the rows raised in the thread.
        """
        self._read_ahead(step)
        return self._pending[step].result()

    def _read_ahead(self, step: int) -> None:
        wanted = range(step, step + 1 + self.prefetch)
        for stale in self._pending.keys() - set(wanted):
            self._pending.pop(stale).cancel()
        for ahead in wanted:
            if ahead not in self._pending:
                self._pending[ahead] = self._thread.submit(self._load, ahead)

    def _load(self, step: int) -> Batch:
        positions = step * self.global_batch_size + self._rows
        rows = self.dataset.gather(sample_indices(positions.ravel(), len(self.dataset), self.seed))
        tensors = {name: torch.from_numpy(values.reshape(*positions.shape, *values.shape[1:]))
                   for name, values in rows.items()}
        if self.pin_memory:
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return Batch(tensors["latent"], tensors["label"], tensors.get("latent_mirror"))

    def close(self) -> None:
        """Ends the thread; a batch that it is reading is finished first."""
        self._thread.shutdown(cancel_futures=True)
        self._pending.clear()

    def __exit__(self, *error: Any) -> None:
        self.close()


def check_flip(info: DatasetInfo, has_mirror: bool, horizontal_flip: bool) -> None:
    """Raises DataError where flips are wanted and cannot be had: latents must be encoded from mirrored images."""
    if horizontal_flip and info.kind != "pixels" and not has_mirror:
        raise DataError(f"data set {info.name!r} has {info.kind} without a latent_mirror column, so images cannot be "
                        "flipped; try --data.no-horizontal-flip, or pack it with mirrors")


def to_x_start(latent: Tensor, mirror: Tensor | None, kind: str, scale_factor: float, flip: Tensor | None,
               posterior_noise: Tensor | None) -> Tensor:
    """Stored values as the x_start that a network learns; on any device, without a host synchronisation.

    latent, mirror: (B, C, H, W) as stored, moments (B, 2C, H, W); flip: (B,) bool, None for no flips;
    posterior_noise: (B, C, H, W) standard normal, for moments. Returns float32 (B, C, H, W).
    Raises ValueError for moments without noise, and for flips of latents or moments without a mirror.
    """
    if flip is not None:
        if kind == "pixels":
            mirror = latent.flip(-1)
        if mirror is None:
            raise ValueError(f"{kind} cannot be flipped without their mirror; pass flip=None, or call check_flip first")
        latent = torch.where(flip[:, None, None, None], mirror, latent)
    if kind == "pixels":
        return latent.float() / 127.5 - 1
    if kind == "latents":
        return latent.float() * scale_factor
    if posterior_noise is None:
        raise ValueError("moments need posterior_noise, standard normal of the mean's shape")
    mean, logvar = latent.float().chunk(2, dim=1)       # the LDM's DiagonalGaussianDistribution
    return (mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * posterior_noise) * scale_factor
