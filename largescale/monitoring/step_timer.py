"""Means of losses and times between two rows of the log. Times are the host's: on a GPU, where it
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
# Parts of the loop that are not part of a step, and their kinds in run_record.KINDS.
_ASIDE = {
    "checkpoint": "checkpoint",
    "reference": "evaluation",
    "validation": "evaluation",
    "preview": "evaluation",
    "profile": "evaluation",
}
# All other parts are training.
_KIND = {**_ASIDE, "data": "data"}


class StepTimer:
    """Times the parts of a step, and sums the losses of the steps of a window."""

    def __init__(
        self,
        images_per_step: int,
        flops_per_step: float,
        ranks: Ranks,
        precision: str,
        n_clusters: int,
    ):
        self._images = images_per_step
        self._flops = flops_per_step
        self._device = ranks.device
        self._n_clusters = n_clusters
        name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"
        peak = peak_flops(name, precision)
        self._peak = peak and peak * ranks.world_size
        # Seconds by run_record.KINDS, since this start began.
        self.lifetime: dict[str, float] = defaultdict(float)
        self._first_step = True
        self.restart()

    def begin(self, start_time: float) -> None:
        """Account for the start-up, before the first step. `start_time`: when the program was
        started, in seconds since 1970."""
        # Without what is accounted for already, such as the first checkpoint.
        self.lifetime["start-up"] = max(0.0, time.time() - start_time - sum(self.lifetime.values()))
        self.restart()

    def restart(self) -> None:
        """Begin a window of the log."""
        self._since = time.perf_counter()
        self._steps = 0
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
        # The first step loads and compiles kernels.
        kind = _KIND.get(name, "compile" if self._first_step else "training")
        self.lifetime[kind] += seconds

    def count(self, report: StepReport) -> None:
        """Count an applied step."""
        self._first_step = False
        self._steps += 1
        for i, value in enumerate((report.loss, report.mse, report.vb)):
            self._losses[i] += value
        for i in range(self._n_clusters):
            self._cluster_loss[i] += report.cluster_loss[i]
            self._cluster_count[i] += report.cluster_count[i]

    def read(self) -> dict[str, float | None]:
        """Means over the steps since the last call, which starts the next window."""
        elapsed = time.perf_counter() - self._since
        steps = self._steps
        loss, mse, vb = (value / steps if steps else None for value in self._losses)

        # Of the time in which steps were taken, the share outside forward, backward and optimizer.
        compute = sum(self._seconds.get(name, 0.0) for name in _COMPUTE)
        stepping = elapsed - sum(self._seconds.get(name, 0.0) for name in _ASIDE)
        metrics: dict[str, float | None] = {
            "loss": loss,
            "mse": mse,
            "vb": vb,
            "images_per_s": steps * self._images / elapsed,
            "mfu": steps * self._flops / elapsed / self._peak if self._peak else None,
            "memory_gib": self._memory() / 2**30,
            "time/data_wait_share": self._seconds.get("data", 0.0) / elapsed,
            "time/overhead_share": (stepping - compute) / stepping,
        }

        # Milliseconds a step of each part, and the mean loss of each cluster that was drawn from.
        for name, seconds in self._seconds.items():
            metrics[f"time/{name}_ms"] = 1e3 * seconds / max(steps, 1)
        for i, count in enumerate(self._cluster_count):
            if count:
                metrics[f"cluster/C{i + 1}"] = self._cluster_loss[i] / count
        self.restart()
        return metrics

    def _memory(self) -> float:
        """The peak so far, in bytes: of the GPU where there is one."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        # Linux counts it in KiB.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
