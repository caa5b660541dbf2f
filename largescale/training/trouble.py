"""Numbers that have gone bad: which, where, and from which rank and noise cluster."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from largescale.distributed.step_report import Report


@dataclass(frozen=True)
class Trouble:
    kind: Literal["not_finite", "spike"]
    """The field of AnomalyConfig that says what is done."""
    text: str
    ranks: list[int]
    clusters: list[int]
    """1 for C_1."""


def loss_not_finite(report: Report, where: str) -> Trouble:
    ranks = report.non_finite
    others = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
    text = f"the loss is not finite at {where}, on rank {ranks[0]}{others}, in {_named(report.non_finite_clusters)}"
    return Trouble("not_finite", text, ranks, report.non_finite_clusters)


def spike(report: Report, usual: float, where: str) -> Trouble:
    """Of a loss that every rank has its part in: the worst rank and the worst cluster."""
    means = [loss / count if count else 0.0
             for loss, count in zip(report.cluster_loss, report.cluster_count, strict=True)]
    rank, cluster = (max(range(len(values)), key=values.__getitem__) for values in (report.rank_loss, means))
    text = (f"the loss is {report.loss:.4g} at {where}, {report.loss / usual:.1f} times the usual; highest on "
            f"rank {rank} ({report.rank_loss[rank]:.4g}) and in C_{cluster + 1} ({means[cluster]:.4g})")
    return Trouble("spike", text, [rank], [cluster + 1])


def gradient_not_finite(report: Report, where: str, loss_scale: float, found: Sequence[tuple[str, list[int]] | None],
                        ) -> Trouble:
    """`found`: what `find_gradient` returned, by rank."""
    culprits = {rank: entry for rank, entry in enumerate(found) if entry}
    told = "; ".join(f"rank {rank} in {name}, from {_named(clusters)}" for rank, (name, clusters) in culprits.items())
    text = (f"the gradient is not finite at {where} (loss {report.loss:.6g}, loss scale {loss_scale:g}): "
            + (told or "finite on every rank before their sum"))
    clusters = sorted({cluster for _, clusters in culprits.values() for cluster in clusters})
    return Trouble("not_finite", text, list(culprits), clusters)


def find_gradient(model: nn.Module, micro_steps: Sequence[Callable[[], tuple[Tensor, Tensor]]], loss_scale: float,
                  ) -> tuple[str, list[int]] | None:
    """The first parameter whose gradient, from this rank's rows alone, is not finite, and the clusters of these rows.

    `micro_steps`: each gives losses (B,) and clusters (B,), 1 for C_1. What goes wrong here must not stand in the way
    of what is done about the gradient."""
    try:
        return _find_gradient(model, micro_steps, loss_scale)
    except RuntimeError as error:  # memory, above all
        return f"a parameter unknown, for the diagnosis failed ({str(error).splitlines()[0]})", []


def _find_gradient(model: nn.Module, micro_steps: Sequence[Callable[[], tuple[Tensor, Tensor]]], loss_scale: float,
                   ) -> tuple[str, list[int]] | None:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for micro_step in micro_steps:
        loss, clusters = micro_step()
        gradients = torch.autograd.grad(loss.mean() * loss_scale, [p for _, p in named], retain_graph=True)
        for (name, p), gradient in zip(named, gradients, strict=True):
            if not torch.isfinite(gradient).all():
                rows = (torch.autograd.grad(row * loss_scale, p, retain_graph=True)[0] for row in loss[:64])
                bad = [not torch.isfinite(of_row).all() for of_row in rows]
                return name, sorted({int(c) for c, is_bad in zip(clusters, bad, strict=False) if is_bad})
    return None


def _named(clusters: list[int]) -> str:
    return ", ".join(f"C_{c}" for c in clusters) or "no single row"
