"""The only file that imports torch.distributed: ranks, the agreed vector, and small exchanges between hosts."""

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from largescale.errors import ConfigError
from largescale.launch import env_local_rank, env_rank, env_world_size


class Ranks:
    """The process group of a run: training collectives over NCCL or gloo, exchanges of Python objects over gloo."""

    def __init__(self, device: str, timeout_s: float = 600):
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("train.device=cuda, but torch sees no CUDA device; to train here: --train.device cpu")
        self.rank, self.world_size = env_rank(), env_world_size()
        local_rank = env_local_rank()
        for key, value in {"RANK": self.rank, "WORLD_SIZE": self.world_size, "LOCAL_RANK": local_rank}.items():
            os.environ.setdefault(key, str(value))
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0" if self.world_size == 1 else "29500")
        if device == "cuda":
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
            self.device = torch.device("cuda", torch.cuda.current_device())
        else:
            self.device = torch.device("cpu")
        timeout = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timeout)
        # Groups of their own: the agreed vector does not queue behind gradients, objects need no GPU.
        self._vectors: Any = dist.new_group(timeout=timeout)
        self._objects: Any = dist.new_group(backend="gloo", timeout=timeout)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order. Blocks; for start-up and checkpoints, never for a step."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._objects)
        return values

    def all_gather_flat(self, tensor: Tensor) -> Tensor:
        """Concatenate equal-length 1-D tensors in rank order, on every rank."""
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self._vectors)
        return tensor

    def launch(self, vector: Tensor) -> "PendingVector":
        """Start the sum of a small float64 vector over ranks; nobody waits until `PendingVector.read`."""
        return PendingVector.launch(vector, self._vectors)

    def barrier(self) -> None:
        dist.barrier(group=self._objects)

    def close(self) -> None:
        dist.destroy_process_group()


@dataclass
class PendingVector:
    work: Any
    vector: Tensor
    event: Any = None

    @classmethod
    def launch(cls, vector: Tensor, group: Any) -> "PendingVector":
        if vector.device.type == "cpu":
            return cls(dist.all_reduce(vector, group=group, async_op=True), vector)
        # On a GPU the sum and its copy to pinned memory run on a side stream: reading waits for these two only,
        # where `.item()` would wait for everything queued since.
        side = _side_stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            dist.all_reduce(vector, group=group, async_op=True).wait()
            host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
            host.copy_(vector, non_blocking=True)
            vector.record_stream(side)
            event = torch.cuda.Event()
            event.record(side)
        return cls(None, host, event)

    def read(self) -> list[float]:
        if self.event is not None:
            self.event.synchronize()
        elif self.work is not None:
            self.work.wait()
        values: list[float] = self.vector.tolist()
        return values


_stream: Any = None


def _side_stream() -> Any:
    global _stream
    if _stream is None:
        _stream = torch.cuda.Stream()
    return _stream
