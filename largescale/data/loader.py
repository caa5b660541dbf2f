"""The batches of one rank: the rows of each step, read ahead by threads, and the stored values
turned into x_start."""

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from largescale.condition import Captions, Condition
from largescale.data.order import ORDERS, Extent, indices_in_extents
from largescale.data.read_ahead import ReadAhead
from largescale.data.shards import ShardDataset
from largescale.encoders.normalization import Normalization
from largescale.encoders.text import EncodedCaption
from largescale.errors import ConfigError
from largescale.randomness import host_draws
from largescale.registry import look_up

# Steps whose order is computed at once: a call costs more than a step's rows.
_STEPS_A_BLOCK = 16

Batch = dict[str, Tensor]
"""One rank's rows of one step, on the host, as `ShardDataset.gather` names and gives them: (accum,
micro, ...) each."""


class Loader(AbstractContextManager["Loader"]):
    """The batches of one rank, a function of (seed, step): `loader.batch(step)`.

    Row g of step s has position s * global_batch_size + g of the order. The rows are laid out as
    (accum, world, micro): micro step k of rank r takes [k, r], so every world size sees the same
    global batch. `flip`: half of the rows are those of mirrored images; `captions`: with one of
    each row's captions. Both are drawn anew at every step. `order`: as data.order has it; in blocks
    the rank's chunks are read ahead too.
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
        order: str = "full",
        start_step: int = 0,
        prefetch: int = 4,
        pin_memory: bool = False,
        extents: Sequence[Extent] = (),
    ) -> None:
        """`extents`: how many rows the set has from which position on, where it has grown while the
        run trained."""
        each = micro_batch_size * world_size
        if global_batch_size % each:
            raise ConfigError(
                f"global_batch_size={global_batch_size} is not a multiple of "
                f"micro_batch_size*world_size={each}; try --train.global-batch-size "
                f"{-(-global_batch_size // each) * each}"
            )
        self.dataset = dataset
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.flip = flip
        self.captions = captions
        self.prefetch = prefetch
        self.pin_memory = pin_memory
        self._extents = extents or (Extent(0, len(dataset)),)

        # This rank's rows of the global batch, (accum, micro).
        layout = np.arange(global_batch_size).reshape(-1, world_size, micro_batch_size)
        self._rows = layout[:, rank]
        # The order of the last blocks of steps, and the batches of the current step and of the
        # `prefetch` steps after it.
        self._rows_at = look_up(ORDERS, order, "data.order")
        self._order: dict[int, npt.NDArray[np.int64]] = {}
        self._pending: dict[int, Future[Batch]] = {}

        self._threads = _threads(pin_memory)
        self._chunks: ReadAhead | None = None
        if order == "blocks":
            self._chunks = ReadAhead(
                dataset,
                seed,
                global_batch_size,
                self._rows,
                mirrors=flip,
                captions=captions,
                extents=self._extents,
            )
        self._read_ahead(start_step)

    def batch(self, step: int) -> Batch:
        """The rows of `step`; asked again (an fp16 overflow retries), the same object. Any step may
        follow any other.

        Raises the error that reading the rows raised in a thread; asked again, reads them again.
        """
        self._read_ahead(step)
        try:
            return self._pending[step].result()
        except Exception:
            del self._pending[step]
            raise

    def if_ready(self, step: int) -> Batch | None:
        """The rows of `step` if they have been read already. Waits for nothing and raises
        nothing."""
        pending = self._pending.get(step)
        if pending and pending.done() and not pending.exception():
            return pending.result()
        return None

    def _read_ahead(self, step: int) -> None:
        """Starts reading `step` and the `prefetch` steps after it, and drops all others."""
        if self._chunks:
            self._chunks.advance(step)
        wanted = range(step, step + 1 + self.prefetch)
        for stale in self._pending.keys() - set(wanted):
            self._pending.pop(stale).cancel()
        for ahead in wanted:
            if ahead not in self._pending:
                self._pending[ahead] = self._threads.submit(self._load, ahead)

    def _load(self, step: int) -> Batch:
        indices = self._indices(step)
        flip = choice = None
        if self.flip or self.captions:
            # Drawn for the global batch, so that they do not depend on the number of ranks.
            flips, choices = host_draws(self.seed, step, self.global_batch_size)
            mine = self._rows.ravel()
            flip = flips[mine] if self.flip else None
            choice = choices[mine] if self.captions else None
        rows = self.dataset.gather(indices, flip, choice)

        # (accum * micro, ...) -> (accum, micro, ...)
        batch: Batch = {}
        for name, values in rows.items():
            tensor = torch.from_numpy(values.reshape(*self._rows.shape, *values.shape[1:]))
            batch[name] = tensor.pin_memory() if self.pin_memory else tensor
        return batch

    def _indices(self, step: int) -> npt.NDArray[np.int64]:
        """The indices of this rank's rows in the data set."""
        block, within = divmod(step, _STEPS_A_BLOCK)
        order = self._order.get(block)
        if order is None:
            steps = np.arange(block * _STEPS_A_BLOCK, (block + 1) * _STEPS_A_BLOCK)
            positions = steps[:, None] * self.global_batch_size + self._rows.ravel()
            order = indices_in_extents(positions, self._extents, self._order_of)

            # Two threads may read on both sides of a block's edge. A new dict, as the other one
            # may be looking into this.
            near = {b: known for b, known in self._order.items() if abs(b - block) < 2}
            self._order = {**near, block: order}
        return order[within]

    def _order_of(self, positions: npt.NDArray[np.int64], n_rows: int) -> npt.NDArray[np.int64]:
        return self._rows_at(positions, n_rows, self.seed, self.global_batch_size)

    def close(self) -> None:
        """Ends the threads; a batch that one is reading is finished first."""
        if self._chunks:
            self._chunks.close()
        self._threads.shutdown(cancel_futures=True)
        self._pending.clear()

    def __exit__(self, *error: Any) -> None:
        self.close()


def _threads(pin_memory: bool) -> ThreadPoolExecutor:
    """The threads that read batches."""
    # A new thread starts on GPU 0. Left there, pinning memory would open a context on that GPU for
    # every rank.
    if pin_memory:
        device = torch.cuda.current_device()
        return ThreadPoolExecutor(2, "loader", torch.cuda.set_device, (device,))
    return ThreadPoolExecutor(2, "loader")


class DeviceBatches:
    """A loader's batches on a device. On a GPU the next batch is copied while a step is computed,
    on a stream of its own, if the loader has read it by then."""

    def __init__(self, loader: Loader, device: torch.device):
        self._loader, self._device = loader, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: dict[int, Batch] = {}  # of this step and the next

    def batch(self, step: int) -> Batch:
        """The rows of `step` on the device, ready for what is queued on its current stream from
        here on."""
        # Asked for also where it is copied already: this makes the loader read ahead.
        host = self._loader.batch(step)
        if step not in self._copied:
            self._copied[step] = self._copy(host)

        # The step's kernels wait for the copy, and the allocator must not reuse the memory of the
        # copy's stream while they run.
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in self._copied[step].values():
                tensor.record_stream(current)

        # After the wait, so that this step does not wait for the next one's copy.
        for other in self._copied.keys() - {step, step + 1}:
            del self._copied[other]
        ahead = self._loader.if_ready(step + 1)
        if ahead is not None and step + 1 not in self._copied:
            self._copied[step + 1] = self._copy(ahead)
        return self._copied[step]

    def _copy(self, host: Batch) -> Batch:
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            return {name: rows.to(self._device, non_blocking=True) for name, rows in host.items()}


def to_x_start(
    latent: Tensor, kind: str, normalization: Normalization, posterior_noise: Tensor | None
) -> Tensor:
    """The x_start that a network learns, from stored values; on any device, without a host
    synchronisation.

    latent: (B, C, H, W) as stored, moments (B, 2C, H, W); posterior_noise: (B, C, H, W) standard
    normal, for moments. Returns float32 (B, C, H, W). Raises ValueError for moments without noise.
    """
    if kind == "pixels":
        return latent.float() / 127.5 - 1
    if kind == "latents":
        return normalization.apply(latent.float())
    if posterior_noise is None:
        raise ValueError("moments need posterior_noise, standard normal of the mean's shape")
    # A draw from the LDM's DiagonalGaussianDistribution, with its bounds of the log-variance.
    mean, logvar = latent.float().chunk(2, dim=1)
    return normalization.apply(mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * posterior_noise)


def encoded_condition(
    captions: Sequence[EncodedCaption], max_tokens: int, width: int, pooled_width: int
) -> Condition:
    """The condition of captions that a text encoder has made just now, padded to `max_tokens` as
    those of a batch are. The widths are the model's."""
    n = len(captions)
    tokens = torch.zeros(n, max_tokens, width, dtype=torch.float16)
    length = torch.zeros(n, dtype=torch.int64)
    pooled = torch.zeros(n, pooled_width, dtype=torch.float16)
    for i, caption in enumerate(captions):
        length[i] = len(caption.tokens)
        tokens[i, : len(caption.tokens)] = torch.from_numpy(caption.tokens)
        pooled[i] = torch.from_numpy(caption.pooled)
    return to_condition(
        {"caption_tokens": tokens, "caption_length": length, "caption_pooled": pooled}
    )


def to_condition(rows: Mapping[str, Tensor]) -> Condition:
    """The condition of rows (B, ...): their captions where they were asked for, else their labels.
    None is dropped."""
    if "caption_tokens" not in rows:
        return rows["label"]
    length = rows["caption_length"]
    none_dropped = torch.zeros_like(length, dtype=torch.bool)
    return Captions(rows["caption_tokens"], length, rows["caption_pooled"], null=none_dropped)
