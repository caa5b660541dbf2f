"""Losses and gradients that are not finite, and losses that leap: found, named by rank and noise
cluster, and, where the config asks for it, left out of the run."""

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
    """The field of AnomalyConfig that decides what is done."""
    text: str
    ranks: list[int]
    clusters: list[int]
    """1 for C_1."""


# What to do about a run that was stopped for an anomaly, by the anomaly's kind.
STOP_REMEDIES = {
    "not_finite": "lower --optimizer.lr, or leave these inputs out with --anomaly.not-finite skip",
    "spike": "lower --optimizer.lr, or leave these inputs out with --anomaly.spike skip",
}


class Anomalies:
    """Finds losses and gradients that are not finite, and spikes of the loss; reads from the config
    what to do about each."""

    def __init__(
        self,
        config: AnomalyConfig,
        train_step: TrainStep,
        state: TrainingState,
        ranks: Ranks,
        heartbeat: Callable[[], None],
    ):
        """`heartbeat` is called often while a gradient is examined."""
        self._config = config
        self._train_step = train_step
        self._state = state
        self._ranks = ranks
        self._heartbeat = heartbeat
        # By this process: a run that is resumed has the windows it left out before in its state.
        self._num_rollbacks = 0

    def detect(
        self, report: StepReport, batch: Batch, *, applied: bool, can_retry: bool
    ) -> Anomaly | None:
        """The anomaly of the step that was just tried, or None. Collective.

        `can_retry`: a step that was not applied can be tried again at a lower loss scale.
        """
        where = f"step {self._state.step + 1}, curriculum index {self._state.curriculum.index}"
        if report.non_finite:
            return loss_not_finite(report, where)

        # A gradient that overflows in fp16 is normal, and the next try has a lower loss scale.
        if not applied and not can_retry:
            return self._examine_gradient(report, batch, where)

        # A step that was not applied is tried again: its loss must not be counted twice.
        spikes = self._state.spikes
        if applied and spikes.is_spike(report.loss):
            return spike(report, spikes.usual, where)
        return None

    def _examine_gradient(self, report: StepReport, batch: Batch, where: str) -> Anomaly:
        step = self._train_step
        loss_scale = step.engine.loss_scale
        # Eager, since nothing is compiled for a graph that runs once.
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
        """Count a roll back. Raises NonFiniteError where the run has left out as many windows of
        inputs as it may."""
        # The state loses windows that a later roll back includes; this count does not.
        limit = self._config.max_skips
        if self._num_rollbacks >= limit or len(self._state.skips) >= limit:
            raise NonFiniteError(
                f"{anomaly.text}; anomaly.max_skips={limit} windows of data were left out already; "
                f"the last good checkpoint is step {last_saved}"
            )
        self._num_rollbacks += 1


def loss_not_finite(report: StepReport, where: str) -> Anomaly:
    ranks = report.non_finite
    clusters = report.non_finite_clusters
    others = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
    text = (
        f"the loss is not finite at {where}, on rank {ranks[0]}{others}, in "
        f"{cluster_names(clusters)}"
    )
    return Anomaly("not_finite", text, ranks, clusters)


def spike(report: StepReport, usual: float, where: str) -> Anomaly:
    """A loss far above the usual one, with the rank and the cluster where it is highest."""
    # A cluster from which no row was drawn has no mean.
    means = []
    for loss, count in zip(report.cluster_loss, report.cluster_count, strict=True):
        means.append(loss / count if count else 0.0)

    rank = max(range(len(report.rank_loss)), key=report.rank_loss.__getitem__)
    cluster = max(range(len(means)), key=means.__getitem__)
    text = (
        f"the loss is {report.loss:.4g} at {where}, {report.loss / usual:.1f} times the usual; "
        f"highest on rank {rank} ({report.rank_loss[rank]:.4g}) and in C_{cluster + 1} "
        f"({means[cluster]:.4g})"
    )
    return Anomaly("spike", text, [rank], [cluster + 1])


def gradient_not_finite(
    report: StepReport, where: str, loss_scale: float, found: Sequence[tuple[str, list[int]] | None]
) -> Anomaly:
    """A gradient that is not finite, with the ranks, parameters and clusters that made it so.

    `found`: what `find_gradient` returned, by rank.
    """
    ranks: list[int] = []
    clusters: set[int] = set()
    places: list[str] = []
    for rank, entry in enumerate(found):
        if entry:
            name, rank_clusters = entry
            ranks.append(rank)
            clusters.update(rank_clusters)
            places.append(f"rank {rank} in {name}, from {cluster_names(rank_clusters)}")

    # Each rank's gradient can be finite where their sum overflows.
    where_found = "; ".join(places) or "finite on every rank before their sum"
    text = (
        f"the gradient is not finite at {where} (loss {report.loss:.6g}, loss scale "
        f"{loss_scale:g}): {where_found}"
    )
    return Anomaly("not_finite", text, ranks, sorted(clusters))


def find_gradient(
    model: nn.Module,
    micro_steps: Sequence[Callable[[], tuple[Tensor, Tensor]]],
    loss_scale: float,
) -> tuple[str, list[int]] | None:
    """The first parameter whose gradient, from this rank's rows alone, is not finite, and the
    clusters of these rows.

    `micro_steps`: each gives losses (B,) and clusters (B,), 1 for C_1.
    """
    # An error of the diagnosis must not prevent what is done about the gradient. The likeliest is
    # that there is no memory for it.
    try:
        return _find_gradient(model, micro_steps, loss_scale)
    except RuntimeError as error:
        return f"a parameter unknown, for the diagnosis failed ({str(error).splitlines()[0]})", []


def _find_gradient(
    model: nn.Module,
    micro_steps: Sequence[Callable[[], tuple[Tensor, Tensor]]],
    loss_scale: float,
) -> tuple[str, list[int]] | None:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for micro_step in micro_steps:
        # The graph is kept, as the rows to blame are found by going through it again.
        loss, clusters = micro_step()
        gradients = torch.autograd.grad(
            loss.mean() * loss_scale, list(trained.values()), retain_graph=True
        )
        for (name, p), gradient in zip(trained.items(), gradients, strict=True):
            if not torch.isfinite(gradient).all():
                return name, _clusters_of_bad_rows(loss, clusters, p, loss_scale)
    return None


def _clusters_of_bad_rows(
    loss: Tensor, clusters: Tensor, parameter: nn.Parameter, loss_scale: float
) -> list[int]:
    """The clusters of the rows whose own gradient of `parameter` is not finite."""
    bad: set[int] = set()
    # A backward pass for each row: 64 of them are enough to name clusters.
    for row_loss, cluster in zip(loss[:64], clusters, strict=False):
        (gradient,) = torch.autograd.grad(row_loss * loss_scale, parameter, retain_graph=True)
        if not torch.isfinite(gradient).all():
            bad.add(int(cluster))
    return sorted(bad)


def cluster_names(clusters: list[int]) -> str:
    return ", ".join(f"C_{c}" for c in clusters) or "no single row"
