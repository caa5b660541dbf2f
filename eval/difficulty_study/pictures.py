"""The pictures of a difficulty study."""

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.difficulty_study.relative_entropy import FEW_KERNELS, ONE_KERNEL

if TYPE_CHECKING:
    from eval.difficulty_study.findings import Findings

# Points of a loss curve at most: more of them cannot be seen.
SHOWN = 1000


def draw(found: "Findings") -> dict[str, bytes]:
    """The pictures of what has been measured: file name -> PNG."""
    import matplotlib

    # Without a display.
    matplotlib.use("Agg")
    # A study is looked at before it is complete: each picture needs its own stage only.
    pictures = {}
    if found.curves:
        pictures["losses.png"] = _losses(found)
    if found.scored.keys() - {0}:
        pictures["denoising.png"] = _denoising(found)
    if found.entropy:
        pictures["relative_entropy.png"] = _relative_entropy(found)
    return pictures


def _colours(found: "Findings") -> dict[int, Any]:
    """The colour of each interval: dark for little noise, light for much."""
    from matplotlib import colormaps

    last = len(found.edges) - 1
    colours = {}
    # The last twentieth of viridis is too light a yellow on white.
    for i in found.intervals:
        colours[i] = colormaps["viridis"](0.95 * (i - 1) / max(last - 1, 1))
    return colours


def _losses(found: "Findings") -> bytes:
    """losses.png: the loss of each model M_i, and how fast it converged."""
    from matplotlib import pyplot as plt

    colours = _colours(found)
    plots, (left, middle, right) = plt.subplots(
        1, 3, figsize=(15, 4.2), layout="constrained", width_ratios=(2, 1, 1)
    )

    # Left: the curves themselves.
    for i, curve in found.curves.items():
        some = slice(None, None, max(1, len(curve.step) // SHOWN))
        left.plot(
            curve.step[some], curve.normalised[some], color=colours[i], linewidth=1, label=f"C_{i}"
        )
    left.set(xlabel="step", ylabel="loss, smoothed, scaled to its range", ylim=(-0.02, 1.02))
    left.legend(fontsize="x-small", ncols=2, title="least noise: C_1", title_fontsize="x-small")

    # Middle: when each began to oscillate (hatched: not before the end), and had fallen.
    _bars_of_steps(middle, found, colours)

    # Right: the paper's count, on the smoothed loss.
    for i, c in found.convergence.items():
        right.bar(i, c.smoothed_rises, color=colours[i])
    right.set(xlabel="interval", ylabel="rises of the smoothed loss after step 100")
    for axis in (middle, right):
        _set_interval_ticks(axis, found)
    return _png(plots)


def _bars_of_steps(axis: Any, found: "Findings", colours: dict[int, Any]) -> None:
    """The step from which each loss oscillates, as bars, and the one at which 90 % of its fall are
    done, as a line."""
    fallen = {}
    for i, c in found.convergence.items():
        fallen[i] = c.falls_until
        still_falls = c.oscillates_from is None
        # A loss that falls to the end oscillates later, if at all: its bar reaches the last step.
        axis.bar(
            i,
            found.steps if still_falls else c.oscillates_from,
            color=colours[i],
            hatch="//" if still_falls else None,
            edgecolor="white",
        )
    axis.plot(
        list(fallen),
        list(fallen.values()),
        "D-",
        color="black",
        markersize=4,
        linewidth=0.7,
        label="90 % of the fall are done",
    )
    axis.legend(fontsize="x-small")
    axis.set(
        xlabel="interval",
        ylabel="step from which the loss oscillates",
        ylim=(0, 1.15 * found.steps),
    )


def _denoising(found: "Findings") -> bytes:
    """denoising.png: the Frechet distance with each M_i inside its interval."""
    from matplotlib import pyplot as plt

    colours = _colours(found)
    plots, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for i, row in found.scored.items():
        value, error = row["value"], row["error"]
        # A distance that was not finite has no place on the axis.
        if value is None:
            continue
        if i == 0:
            axis.axhline(value, color="black", linewidth=1, label="full model everywhere")
            axis.axhspan(value - error, value + error, color="black", alpha=0.1, linewidth=0)
            continue
        # Hollow: the sampler asks for no noise level of the interval.
        face = colours[i] if row["evaluations_inside"] else "none"
        axis.errorbar(
            i,
            value,
            error,
            fmt="o",
            color=colours[i],
            markerfacecolor=face,
            capsize=3,
        )
    axis.set(xlabel="interval of M_i", ylabel=next(iter(found.scored.values()))["figure"])
    _set_interval_ticks(axis, found)
    if 0 in found.scored:
        axis.legend(fontsize="small")
    return _png(plots)


def _relative_entropy(found: "Findings") -> bytes:
    """relative_entropy.png: D_KL by timestep, and how many kernels explain a sample."""
    from matplotlib import pyplot as plt

    assert found.entropy
    t = np.array(found.entropy["t"], float)
    value = np.array(found.entropy["value"], float)
    error = np.array(found.entropy["error"], float)
    kernels = np.array(found.entropy["kernels"], float)
    plots, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    left.plot(
        t,
        np.array(found.entropy["single"], float),
        color="grey",
        linestyle="--",
        linewidth=1,
        label="of one kernel: an upper bound",
    )

    # Coloured by how far an estimate can be trusted.
    kinds = {
        "one kernel explains a sample: an artefact": (kernels < ONE_KERNEL, "tab:red"),
        "few kernels: biased": ((kernels >= ONE_KERNEL) & (kernels < FEW_KERNELS), "tab:orange"),
        f"{FEW_KERNELS:.0f} kernels or more": (kernels >= FEW_KERNELS, "tab:blue"),
    }
    for name, (chosen, colour) in kinds.items():
        # The axis is logarithmic: an estimate below 0 has no place on it.
        chosen = chosen & (value > 0)
        if chosen.any():
            left.plot(t[chosen], value[chosen], ".", markersize=3, color=colour, label=name)
            low = np.maximum(value - error, 0.1 * value)
            left.fill_between(
                t, low, value + error, where=chosen, color=colour, alpha=0.2, linewidth=0
            )
        right.plot(t[chosen], kernels[chosen], ".", markersize=3, color=colour)
    left.set(xlabel="t", ylabel=r"$D_{KL}(p_{t-1} \| p_t)$, nats", yscale="log")
    left.legend(fontsize="small")
    for level in (ONE_KERNEL, FEW_KERNELS):
        right.axhline(level, color="grey", linestyle=":", linewidth=1)
    right.set(xlabel="t", ylabel="kernels that explain a sample", yscale="log")

    # Where the intervals of the study meet.
    for axis in (left, right):
        for edge in found.edges[1:-1]:
            axis.axvline(edge * (t[-1] + 1), color="lightgrey", linewidth=0.5, zorder=0)
    return _png(plots)


def _set_interval_ticks(axis: Any, found: "Findings") -> None:
    """An x-axis of intervals, with some ten ticks at most."""
    last = len(found.edges) - 1
    axis.set_xticks(range(1, last + 1, max(1, last // 10)))
    axis.set_xlim(0.3, last + 0.7)


def _png(plots: Any) -> bytes:
    from matplotlib import pyplot as plt

    buffer = io.BytesIO()
    plots.savefig(buffer, dpi=110, format="png")
    plt.close(plots)
    return buffer.getvalue()
