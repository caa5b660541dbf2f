"""Losses and times between two lines of the log. Times are the host's: on a GPU, where it
waited."""

import contextlib
import resource
import time
from collections import defaultdict
from collections.abc import Iterator

import torch

from largescale.distributed.ranks import Ranks
from largescale.distributed.step_report import StepReport
from largescale.monitoring.telemetry import peak_flops

_COMPUTE = ("forward", "backward", "optimizer")
_ASIDE = {  # not part of a step
    "checkpoint": "checkpoint",
    "reference": "evaluation",
    "preview": "evaluation",
    "profile": "evaluation",
}
_KIND = {**_ASIDE, "data": "data"}  # of run_record.KINDS; all else is training


class StepTimer:
    def __init__(
        self,
        images_per_step: int,
        flops_per_step: float,
        ranks: Ranks,
        precision: str,
        n_clusters: int,
    ):
        self._images, self._flops = images_per_step, flops_per_step
        self._device, self._n_clusters = ranks.device, n_clusters
        name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"
        peak = peak_flops(name, precision)
        self._peak = peak and peak * ranks.world_size
        self.lifetime: dict[str, float] = defaultdict(
            float
        )  # seconds by run_record.KINDS, since this start began
        self._first_step = True
        self.restart()

    def begin(self, start_time: float) -> None:
        """The first step is about to be taken. `start_time`: when the program was started, in
        seconds since 1970."""
        self.lifetime["start-up"] = max(0.0, time.time() - start_time - sum(self.lifetime.values()))
        self.restart()

    def restart(self) -> None:
        """Begin a window of the log."""
        self._since, self._steps = time.perf_counter(), 0
        self._seconds: dict[str, float] = defaultdict(float)
        self._losses = [0.0, 0.0, 0.0]
        self._cluster_loss = [0.0] * self._n_clusters
        self._cluster_count = [0.0] * self._n_clusters

    @contextlib.contextmanager
    def lap(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._seconds[name] += seconds
        self.lifetime[_KIND.get(name, "compile" if self._first_step else "training")] += seconds

    def count(self, report: StepReport) -> None:
        self._first_step = False
        self._steps += 1
        for i, value in enumerate((report.loss, report.mse, report.vb)):
            self._losses[i] += value
        for i, (loss, count) in enumerate(
            zip(report.cluster_loss, report.cluster_count, strict=True)
        ):
            self._cluster_loss[i] += loss
            self._cluster_count[i] += count

    def read(self) -> dict[str, float | None]:
        """Means over the steps since the last call, which starts the next window."""
        elapsed, steps = time.perf_counter() - self._since, self._steps
        mean = [value / steps if steps else None for value in self._losses]
        compute = sum(self._seconds.get(name, 0.0) for name in _COMPUTE)
        stepping = elapsed - sum(self._seconds.get(name, 0.0) for name in _ASIDE)
        metrics: dict[str, float | None] = {
            "loss": mean[0],
            "mse": mean[1],
            "vb": mean[2],
            "images_per_s": steps * self._images / elapsed,
            "mfu": steps * self._flops / elapsed / self._peak if self._peak else None,
            "memory_gib": self._memory() / 2**30,
            "time/data_wait_share": self._seconds.get("data", 0.0) / elapsed,
            "time/overhead_share": (stepping - compute)
            / stepping,  # of a step, outside forward, backward, optimizer
            **{f"time/{name}_ms": 1e3 * s / max(steps, 1) for name, s in self._seconds.items()},
            **{
                f"cluster/C{i + 1}": loss / count
                for i, (loss, count) in enumerate(
                    zip(self._cluster_loss, self._cluster_count, strict=True)
                )
                if count
            },
        }
        self.restart()
        return metrics

    def _memory(self) -> float:
        """The peak so far, in bytes: of the GPU where there is one."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
