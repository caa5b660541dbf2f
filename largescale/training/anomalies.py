"""Numbers that go bad: found, named by rank and noise cluster, and, where the config says so, left
out of the run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from largescale.config.schema import AnomalyConfig
from largescale.data.loader import Batch
from largescale.distributed.ranks import Ranks
from largescale.distributed.step_report import StepReport
from largescale.errors import NonFiniteError
from largescale.training.state import TrainingState
from largescale.training.step import TrainStep


@dataclass(frozen=True)
class Anomaly:
    kind: Literal["not_finite", "spike"]
    """The field of AnomalyConfig that says what is done."""
    text: str
    ranks: list[int]
    clusters: list[int]
    """1 for C_1."""


class Anomalies:
    """Finds numbers that have gone bad, and says what the config wants done about them."""

    def __init__(
        self,
        config: AnomalyConfig,
        train_step: TrainStep,
        state: TrainingState,
        ranks: Ranks,
        heartbeat: Callable[[], None],
    ):
        """`heartbeat` is called often while a gradient is examined."""
        self._config, self._train_step, self._state, self._ranks = config, train_step, state, ranks
        self._heartbeat = heartbeat
        self._num_rollbacks = 0  # by this process

    def detect(
        self, report: StepReport, batch: Batch, *, applied: bool, can_retry: bool
    ) -> Anomaly | None:
        """Collective. `can_retry`: a step that was not applied can be tried again at a lower loss
        scale."""
        where = f"step {self._state.step + 1}, curriculum index {self._state.curriculum.index}"
        if report.non_finite:
            return loss_not_finite(report, where)
        if not applied and not can_retry:
            return self._examine_gradient(report, batch, where)
        spikes = self._state.spikes
        if applied and spikes.is_spike(report.loss):
            return spike(report, spikes.usual, where)
        return None

    def _examine_gradient(self, report: StepReport, batch: Batch, where: str) -> Anomaly:
        step = self._train_step
        loss_scale = step.engine.loss_scale
        with step.compiled.eager():
            micro_steps = step.repeated_micro_steps(batch, self._heartbeat)
            found = self._ranks.all_gather_json(
                find_gradient(step.engine.module, micro_steps, loss_scale)
            )
        return gradient_not_finite(report, where, loss_scale, found)

    def policy(self, anomaly: Anomaly) -> Literal["count", "stop", "skip"]:
        policy: Literal["count", "stop", "skip"] = getattr(self._config, anomaly.kind)
        return policy

    def count_rollback(self, anomaly: Anomaly, last_saved: int) -> None:
        """Raises NonFiniteError where the run has left out as many windows of inputs as it may."""
        limit = self._config.max_skips
        if self._num_rollbacks >= limit or len(self._state.skips) >= limit:
            raise NonFiniteError(
                f"{anomaly.text}; anomaly.max_skips={limit} windows of data were left out already; "
                f"the last good checkpoint is step {last_saved}"
            )
        self._num_rollbacks += 1


def loss_not_finite(report: StepReport, where: str) -> Anomaly:
    ranks = report.non_finite
    others = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
    text = f"the loss is not finite at {where}, on rank {ranks[0]}{others}, in {_named(report.non_finite_clusters)}"
    return Anomaly("not_finite", text, ranks, report.non_finite_clusters)


def spike(report: StepReport, usual: float, where: str) -> Anomaly:
    """Of a loss that every rank has its part in: the worst rank and the worst cluster."""
    means = [
        loss / count if count else 0.0
        for loss, count in zip(report.cluster_loss, report.cluster_count, strict=True)
    ]
    rank, cluster = (
        max(range(len(values)), key=values.__getitem__) for values in (report.rank_loss, means)
    )
    text = (
        f"the loss is {report.loss:.4g} at {where}, {report.loss / usual:.1f} times the usual; "
        f"highest on rank {rank} ({report.rank_loss[rank]:.4g}) and in C_{cluster + 1} "
        f"({means[cluster]:.4g})"
    )
    return Anomaly("spike", text, [rank], [cluster + 1])


def gradient_not_finite(
    report: StepReport, where: str, loss_scale: float, found: Sequence[tuple[str, list[int]] | None]
) -> Anomaly:
    """`found`: what `find_gradient` returned, by rank."""
    culprits = {rank: entry for rank, entry in enumerate(found) if entry}
    told = "; ".join(
        f"rank {rank} in {name}, from {_named(clusters)}"
        for rank, (name, clusters) in culprits.items()
    )
    text = (
        f"the gradient is not finite at {where} (loss {report.loss:.6g}, loss scale "
        f"{loss_scale:g}): " + (told or "finite on every rank before their sum")
    )
    clusters = sorted({cluster for _, clusters in culprits.values() for cluster in clusters})
    return Anomaly("not_finite", text, list(culprits), clusters)


def find_gradient(
    model: nn.Module,
    micro_steps: Sequence[Callable[[], tuple[Tensor, Tensor]]],
    loss_scale: float,
) -> tuple[str, list[int]] | None:
    """The first parameter whose gradient, from this rank's rows alone, is not finite, and the
    clusters of these rows.

    `micro_steps`: each gives losses (B,) and clusters (B,), 1 for C_1. What goes wrong here must
    not stand in the way of what is done about the gradient."""
    try:
        return _find_gradient(model, micro_steps, loss_scale)
    except RuntimeError as error:  # memory, above all
        return f"a parameter unknown, for the diagnosis failed ({str(error).splitlines()[0]})", []


def _find_gradient(
    model: nn.Module,
    micro_steps: Sequence[Callable[[], tuple[Tensor, Tensor]]],
    loss_scale: float,
) -> tuple[str, list[int]] | None:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for micro_step in micro_steps:
        loss, clusters = micro_step()
        gradients = torch.autograd.grad(
            loss.mean() * loss_scale, [p for _, p in named], retain_graph=True
        )
        for (name, p), gradient in zip(named, gradients, strict=True):
            if not torch.isfinite(gradient).all():
                rows = (
                    torch.autograd.grad(row * loss_scale, p, retain_graph=True)[0]
                    for row in loss[:64]
                )
                bad = [not torch.isfinite(of_row).all() for of_row in rows]
                return name, sorted(
                    {int(c) for c, is_bad in zip(clusters, bad, strict=False) if is_bad}
                )
    return None


def _named(clusters: list[int]) -> str:
    return ", ".join(f"C_{c}" for c in clusters) or "no single row"
