"""One library's side of benchmarks/loader.py, each call in a process of its own: writes the
samples, or reads them.

    loader_peers.py '{"task": "write" | "rate" | "halfway" | "seek", "library": ..., ...}'
      prints one line of JSON

Every library is used as its documentation shows for local files: its own writer, its own shuffle,
its own loader. `OPEN[library](job)` returns what is iterated once an epoch and yields (latent,
label) tensors of 256 rows.
"""

import ctypes
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 256
SHAPE = (8, 32, 32)
# The files of the samples, as benchmarks/loader.py makes them.
LATENTS = "latents.npy"
LABELS = "labels.npy"
# 64 MiB: streaming's default, and 4,096 rows, which is ours.
SHARD_BYTES = 1 << 26
# {library: (the module whose import is timed, the distribution whose version is shown)}; the order
# is the tables'
LIBRARIES = {
    "ours": ("largescale.data.loader", "largescale"),
    "gather": ("largescale.data.shards", "largescale"),
    "memcpy": ("numpy", "numpy"),
    "webdataset": ("webdataset",) * 2,
    "streaming": ("streaming", "mosaicml-streaming"),
    "litdata": ("litdata",) * 2,
    "datasets": ("datasets",) * 2,
    "datasets, arrow": ("datasets",) * 2,
}


@dataclass(frozen=True)
class Job:
    """What one process has to do."""

    task: str
    library: str
    samples: str  # folder of LATENTS and LABELS
    data: str  # folder of this library's files
    rows: int
    world: int = 1
    workers: int = 0  # of the DataLoader, in each process
    seconds: float = 0.0  # at least; epochs are read to their end
    start: int = 0  # row of the epoch to start at
    state: Any = None  # the loader's own, saved there; None where it has none

    @property
    def rank(self) -> int:
        return int(os.environ["RANK"])

    def epoch_order(self) -> Iterator[np.ndarray]:
        """For libraries that are given indices: this rank's share of a new permutation, epoch after
        epoch."""
        for epoch in range(1 << 30):
            order = np.random.default_rng(epoch).permutation(self.rows)
            yield order[self.start * (epoch == 0) + self.rank :: self.world]


class Epochs:
    """A loader whose every `iter()` is the next epoch of a generator of epochs, taken when it is
    first read (DataLoader makes one in vain)."""

    def __init__(self, epochs: Iterator[Iterable[Any]]) -> None:
        self.epochs = epochs

    def __iter__(self) -> Iterator[Any]:
        yield from next(self.epochs)


def slices(order: np.ndarray) -> list[np.ndarray]:
    """An order of rows in batches."""
    return [order[i : i + BATCH] for i in range(0, len(order), BATCH)]


# ----------------------------------------------------------------------------------------------------------------
# ours


def write_ours(job: Job, latents: np.ndarray, labels: np.ndarray) -> None:
    from largescale.data.format import DatasetInfo
    from largescale.data.writer import ShardWriter

    with ShardWriter(job.data, DatasetInfo("made-up", "moments", SHAPE, 1000)) as writer:
        for i, (latent, label) in enumerate(zip(latents, labels, strict=True)):
            writer.write(id=str(i), latent=latent, label=int(label))


def open_ours(job: Job) -> Epochs:
    from largescale.data.loader import Loader
    from largescale.data.shards import ShardDataset

    steps = job.rows // (BATCH * job.world)
    start = job.start // (BATCH * job.world)
    loader = Loader(
        ShardDataset(job.data),
        seed=0,
        global_batch_size=BATCH * job.world,
        micro_batch_size=BATCH,
        rank=job.rank,
        world_size=job.world,
        start_step=start,
    )

    def read_batch(step: int) -> tuple[Any, Any]:
        batch = loader.batch(step)
        return batch["latent"][0], batch["label"][0]

    def epochs() -> Iterator[Iterable[Any]]:
        # The first epoch is read from where the run is resumed.
        yield map(read_batch, range(start, steps))
        for epoch in range(1, 1 << 30):
            yield map(read_batch, range(epoch * steps, (epoch + 1) * steps))

    return Epochs(epochs())


def open_gather(job: Job) -> Epochs:
    import torch

    from largescale.data.shards import ShardDataset

    gather = ShardDataset(job.data).gather

    def batch(indices: np.ndarray) -> tuple[Any, Any]:
        rows = gather(indices)
        return torch.from_numpy(rows["latent"]), torch.from_numpy(rows["label"])

    return Epochs(map(batch, slices(order)) for order in job.epoch_order())


def open_memcpy(job: Job) -> Epochs:
    import torch

    latents = np.load(Path(job.samples, LATENTS), mmap_mode="r")
    labels = np.load(Path(job.samples, LABELS))

    def batch(indices: np.ndarray) -> tuple[Any, Any]:
        return torch.from_numpy(latents[indices]), torch.from_numpy(labels[indices])

    return Epochs(map(batch, slices(order)) for order in job.epoch_order())


# ---------------------------------------------------------------------------------------------------------------
# peers


def write_webdataset(job: Job, latents: np.ndarray, labels: np.ndarray) -> None:
    import webdataset as wds

    Path(job.data).mkdir()
    # 1,000 samples a tar, as its own examples have: tars are what it shuffles and shares out among
    # processes
    with wds.ShardWriter(f"{job.data}/%05d.tar", maxcount=1000, verbose=0) as writer:
        for i, (latent, label) in enumerate(zip(latents, labels, strict=True)):
            writer.write({"__key__": f"{i:09d}", "npy": latent, "cls": int(label)})


def open_webdataset(job: Job) -> Any:
    import webdataset as wds

    tars = sorted(map(str, Path(job.data).glob("*.tar")))
    data = wds.WebDataset(tars, shardshuffle=100, nodesplitter=wds.split_by_node).shuffle(1000)
    loader = wds.WebLoader(
        data.decode().to_tuple("npy", "cls").batched(BATCH),
        batch_size=None,
        num_workers=job.workers,
        persistent_workers=job.workers > 0,
    )
    # it has no state to restore: a resumed run reads up to the place
    return Epochs(
        islice(loader, job.start * (epoch == 0) // BATCH, None) for epoch in range(1 << 30)
    )


def write_streaming(job: Job, latents: np.ndarray, labels: np.ndarray) -> None:
    from streaming import MDSWriter

    columns = {"latent": f"ndarray:float16:{','.join(map(str, SHAPE))}", "label": "int"}
    with MDSWriter(out=job.data, columns=columns, size_limit=SHARD_BYTES) as writer:
        for latent, label in zip(latents, labels, strict=True):
            writer.write({"latent": latent, "label": int(label)})


def open_streaming(job: Job) -> Any:
    from streaming import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(local=job.data, shuffle=True, shuffle_seed=0, batch_size=BATCH)
    loader = StreamingDataLoader(
        data, batch_size=BATCH, num_workers=job.workers, persistent_workers=job.workers > 0
    )
    if job.state:
        loader.load_state_dict(job.state)
    return loader


def litdata_row(samples: str, i: int) -> dict[str, Any]:
    return {
        "latent": np.load(Path(samples, LATENTS), mmap_mode="r")[i].copy(),
        "label": int(np.load(Path(samples, LABELS), mmap_mode="r")[i]),
    }


def write_litdata(job: Job, latents: np.ndarray, labels: np.ndarray) -> None:
    from litdata import optimize

    optimize(
        partial(litdata_row, job.samples),
        list(range(job.rows)),
        job.data,
        chunk_bytes=SHARD_BYTES,
        num_workers=1,
        keep_data_ordered=True,
        verbose=False,
    )


def open_litdata(job: Job) -> Any:
    from litdata import StreamingDataLoader, StreamingDataset

    loader = StreamingDataLoader(
        StreamingDataset(job.data, shuffle=True, seed=0),
        batch_size=BATCH,
        num_workers=job.workers,
        persistent_workers=job.workers > 0,
    )
    if job.state:
        loader.load_state_dict(job.state)
    return loader


def write_datasets(job: Job, latents: np.ndarray, labels: np.ndarray) -> None:
    import pyarrow as pa
    from datasets import Dataset

    # a column of lists of one length: its Array3D reads at an eighth of the speed
    column = pa.FixedSizeListArray.from_arrays(pa.array(latents.reshape(-1)), int(np.prod(SHAPE)))
    Dataset(pa.table({"latent": column, "label": labels})).save_to_disk(
        job.data, max_shard_size=SHARD_BYTES
    )


def open_datasets(job: Job, arrow: bool = False) -> Any:
    import torch
    from datasets import load_from_disk
    from torch.utils.data import DataLoader

    def from_numpy(rows: Any) -> tuple[Any, Any]:
        latent = torch.from_numpy(rows["latent"]).view(-1, *SHAPE)
        return latent, torch.from_numpy(rows["label"]).long()

    def from_arrow(rows: Any) -> tuple[Any, Any]:
        latent = rows["latent"].combine_chunks().flatten().to_numpy()
        return torch.from_numpy(latent).view(-1, *SHAPE), torch.from_numpy(rows["label"].to_numpy())

    # dtype is of every column: labels below 2,048 are exact in float16; without it, latents would
    # come as float32
    data = load_from_disk(job.data)
    data = data.with_format("arrow") if arrow else data.with_format("numpy", dtype=np.float16)
    batches = Epochs(
        [rows.tolist() for rows in slices(order)] for order in job.epoch_order()
    )  # a seek is arithmetic
    return DataLoader(
        data,
        sampler=batches,
        batch_size=None,
        collate_fn=from_arrow if arrow else from_numpy,
        num_workers=job.workers,
        persistent_workers=job.workers > 0,
    )


WRITE = {
    "ours": write_ours,
    "webdataset": write_webdataset,
    "streaming": write_streaming,
    "litdata": write_litdata,
    "datasets": write_datasets,
}
OPEN: dict[str, Callable[[Job], Any]] = {
    "ours": open_ours,
    "gather": open_gather,
    "memcpy": open_memcpy,
    "webdataset": open_webdataset,
    "streaming": open_streaming,
    "litdata": open_litdata,
    "datasets": open_datasets,
    "datasets, arrow": partial(open_datasets, arrow=True),
}


def pair(batch: Any) -> tuple[Any, Any]:
    """Latents and labels of a batch of any library."""
    return (batch["latent"], batch["label"]) if isinstance(batch, dict) else tuple(batch)


def read(job: Job) -> dict[str, Any]:
    """Read with one library; returns what the task asks for."""
    # The import of the library is timed with torch, which all of them need.
    begin = time.perf_counter()
    import torch
    import torch.distributed as dist
    import torch.utils.data

    module, distribution = LIBRARIES[job.library]
    importlib.import_module(module)
    result = {"import_s": time.perf_counter() - begin, "version": version(distribution)}
    if job.world > 1:
        dist.init_process_group("gloo")

    begin = time.perf_counter()
    loader = OPEN[job.library](job)
    batches = iter(loader)
    latent, label = pair(next(batches))
    # Where the job starts in the middle of an epoch, this is the seek.
    result["first_s"] = time.perf_counter() - begin

    # All have to give the same, or less work would look like speed.
    what = (latent.shape, latent.dtype)
    assert latent.shape == (BATCH, *SHAPE) and latent.dtype == torch.float16, what
    assert label.shape == (BATCH,) and label.dtype == torch.int64, (label.shape, label.dtype)
    if job.task == "seek":
        return result | {"labels": label.tolist()}
    # What a checkpoint would hold there, and the rows that follow.
    if job.task == "halfway":
        for _ in range(job.rows // 2 // BATCH - 1):
            next(batches)
        state = loader.state_dict() if hasattr(loader, "state_dict") else None
        return {"state": state, "labels": pair(next(batches))[1].tolist()}

    # Complete epochs, until every rank has had its seconds (a rank that stops alone would leave others
    # in a barrier). The clock stands still from an epoch's last batch to the next one's first: here
    # epochs are 64 times as short as ImageNet's, where starting one costs next to nothing. That
    # favours libraries that are slow to start an epoch; for ours, whose thread reads on from epoch
    # to epoch, the clock continues.
    images = 0
    spent = 0.0
    more = torch.ones(1)
    if job.world > 1:
        dist.barrier()
    while more:
        begin = end = time.perf_counter()
        for batch in batches:
            images += len(pair(batch)[0])
            end = time.perf_counter()
        spent += end - begin
        more.fill_(spent < job.seconds)
        if job.world > 1:
            dist.all_reduce(more, dist.ReduceOp.MAX)
        if more:
            batches = iter(loader)
            next(batches)
            if job.library == "ours":
                images += BATCH
                spent += time.perf_counter() - end
    if job.world > 1:
        dist.destroy_process_group()
    return result | {"images_s": images / spent}


def keep_freed_memory() -> None:
    """Have glibc keep the memory that is freed, as largescale.train does on a CPU; for all libraries.
    Each batch would be of new pages otherwise, which the kernel has to clear."""
    libc = ctypes.CDLL(None)
    # M_MMAP_MAX and M_TRIM_THRESHOLD
    libc.mallopt(-4, 0)
    libc.mallopt(-1, 2**31 - 1)


def main() -> None:
    keep_freed_memory()
    job = Job(**json.loads(sys.argv[1]))
    if job.task == "write":
        arrays = [np.load(Path(job.samples, name), mmap_mode="r") for name in (LATENTS, LABELS)]
        WRITE[job.library](job, *arrays)
        result = {}
    else:
        result = read(job)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
