"""Feeds one rank: the rows of each step, read ahead by threads, and the stored values turned into
x_start."""

import contextlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from largescale.condition import Captions, Condition
from largescale.data.order import sample_indices
from largescale.data.shards import ShardDataset
from largescale.errors import ConfigError
from largescale.randomness import host_draws

_STEPS_A_BLOCK = 16

Batch = dict[str, Tensor]
"""One rank's rows of one step, on the host, as `ShardDataset.gather` names and gives them: (accum,
micro, ...) each."""


class Loader(AbstractContextManager["Loader"]):
    """The batches of one rank, a function of (seed, step): `loader.batch(step)`.

    Row g of step s sits at position s * global_batch_size + g of the order. The rows are laid out
    as (accum, world, micro): micro step k of rank r takes [k, r], so every world size sees the same
    global batch. `flip`: half of the rows are those of mirrored images; `captions`: with one of
    each row's captions. Both are drawn anew at every step.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        flip: bool = False,
        captions: bool = False,
        start_step: int = 0,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        if global_batch_size % (each := micro_batch_size * world_size):
            raise ConfigError(
                f"global_batch_size={global_batch_size} is not a multiple of "
                f"micro_batch_size*world_size={each}; try --train.global-batch-size "
                f"{-(-global_batch_size // each) * each}"
            )
        self.dataset, self.seed, self.prefetch, self.pin_memory = (
            dataset,
            seed,
            prefetch,
            pin_memory,
        )
        self.global_batch_size, self.flip, self.captions = global_batch_size, flip, captions
        self._rows = np.arange(global_batch_size).reshape(-1, world_size, micro_batch_size)[
            :, rank
        ]  # (accum, micro)
        self._pending: dict[
            int, Future[Batch]
        ] = {}  # the current step and the `prefetch` steps after it
        # a new thread is on GPU 0 until told: without this, pinning would open a context there for
        # every rank
        on_gpu = (
            (torch.cuda.set_device, (torch.cuda.current_device(),)) if pin_memory else (None, ())
        )
        self._threads = ThreadPoolExecutor(2, "loader", *on_gpu)
        self._order: dict[int, npt.NDArray[np.int64]] = {}  # of the last blocks of steps
        self._read_ahead(start_step)

    def batch(self, step: int) -> Batch:
        """The rows of `step`; asked again (an fp16 overflow retries), the same object. Any step may
        follow any other.

        Raises what reading the rows raised in a thread; asked again, reads them again.
        """
        self._read_ahead(step)
        try:
            return self._pending[step].result()
        except Exception:
            del self._pending[step]
            raise

    def if_ready(self, step: int) -> Batch | None:
        """The rows of `step` where they have been read already; waits for nothing and raises
        nothing."""
        pending = self._pending.get(step)
        return pending.result() if pending and pending.done() and not pending.exception() else None

    def _read_ahead(self, step: int) -> None:
        wanted = range(step, step + 1 + self.prefetch)
        for stale in self._pending.keys() - set(wanted):
            self._pending.pop(stale).cancel()
        for ahead in wanted:
            if ahead not in self._pending:
                self._pending[ahead] = self._threads.submit(self._load, ahead)

    def _load(self, step: int) -> Batch:
        indices = self._indices(step)
        flip, choice = host_draws(self.seed, step, self.global_batch_size)
        mine = self._rows.ravel()
        rows = self.dataset.gather(
            indices, flip[mine] if self.flip else None, choice[mine] if self.captions else None
        )
        tensors = {
            name: torch.from_numpy(values.reshape(*self._rows.shape, *values.shape[1:]))
            for name, values in rows.items()
        }
        if self.pin_memory:
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return tensors

    def _indices(self, step: int) -> npt.NDArray[np.int64]:
        """Of this rank's rows; computed for some steps at once, as a call costs more than its
        rows."""
        block, within = divmod(step, _STEPS_A_BLOCK)
        order = self._order.get(block)
        if order is None:
            steps = np.arange(block * _STEPS_A_BLOCK, (block + 1) * _STEPS_A_BLOCK)
            positions = steps[:, None] * self.global_batch_size + self._rows.ravel()
            order = sample_indices(positions, len(self.dataset), self.seed)
            self._order = {b: kept for b, kept in self._order.items() if abs(b - block) < 2} | {
                block: order
            }
        return order[within]

    def close(self) -> None:
        """Ends the threads; a batch that one is reading is finished first."""
        self._threads.shutdown(cancel_futures=True)
        self._pending.clear()

    def __exit__(self, *error: Any) -> None:
        self.close()


class DeviceBatches:
    """A loader's batches on a device. On a GPU the next one is copied while a step is computed, on
    a stream of its own, if the loader has it by then."""

    def __init__(self, loader: Loader, device: torch.device):
        self._loader, self._device = loader, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: dict[int, Batch] = {}  # of this step and the next

    def batch(self, step: int) -> Batch:
        """As `Loader.batch`, on the device, and ready for what is queued on its current stream from
        here on."""
        host = self._loader.batch(
            step
        )  # also where it is copied already: this is what makes the loader read ahead
        if step not in self._copied:
            self._copied[step] = self._copy(host)
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in self._copied[step].values():
                tensor.record_stream(current)
        ahead = self._loader.if_ready(step + 1)
        self._copied = {s: batch for s, batch in self._copied.items() if s in (step, step + 1)}
        if ahead is not None and step + 1 not in self._copied:
            self._copied[step + 1] = self._copy(ahead)
        return self._copied[step]

    def _copy(self, host: Batch) -> Batch:
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            return {
                name: values.to(self._device, non_blocking=True) for name, values in host.items()
            }


def to_x_start(
    latent: Tensor, kind: str, scale_factor: float, posterior_noise: Tensor | None
) -> Tensor:
    """Stored values as the x_start that a network learns; on any device, without a host
    synchronisation.

    latent: (B, C, H, W) as stored, moments (B, 2C, H, W); posterior_noise: (B, C, H, W) standard
    normal, for moments. Returns float32 (B, C, H, W). Raises ValueError for moments without noise.
    """
    if kind == "pixels":
        return latent.float() / 127.5 - 1
    if kind == "latents":
        return latent.float() * scale_factor
    if posterior_noise is None:
        raise ValueError("moments need posterior_noise, standard normal of the mean's shape")
    mean, logvar = latent.float().chunk(2, dim=1)  # the LDM's DiagonalGaussianDistribution
    return (mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * posterior_noise) * scale_factor


def to_condition(rows: Mapping[str, Tensor]) -> Condition:
    """What rows (B, ...) tell a model: their captions where they were asked for, else their labels.
    None is dropped."""
    if "caption_tokens" not in rows:
        return rows["label"]
    tokens, length, pooled = (rows[f"caption_{part}"] for part in ("tokens", "length", "pooled"))
    return Captions(tokens, length, pooled, null=torch.zeros_like(length, dtype=torch.bool))
