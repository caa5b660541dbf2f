"""python -m eval.gradients RUN ... --validation DATA: how the noise clusters pull at the weights.

    RUN/gradients/results.jsonl    a row a checkpoint; it stays when the checkpoint goes
    OUT/gradients.json, .png       of all runs in one: norms over steps, cosines at the last step

For kept checkpoints of a run, the gradient of the unweighted loss of each noise cluster with respect
to the raw weights, on held-out images. Its norm says how far a cluster pulls; the cosine of two
gradients whether they pull the same way (1), at right angles (0) or against each other (-1). Both are
estimated from two halves of the images, whose errors are independent: chance alone gives 0. It
takes 8 bytes of memory for each weight and cluster.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import tyro
from torch.nn.utils import parameters_to_vector

from eval.curves.rows import Row, rows_of_protocol, steps_of
from eval.held_out_loss import held_out_set, training_set
from eval.log_axis import plain_log_axis
from eval.score import RESULTS
from largescale.checkpoint.files import checkpoints, require_outside_checkpoints
from largescale.checkpoint.weights import Trained, load_trained
from largescale.config.command_line import check_counts, parse_options, run_program
from largescale.config.derived import cluster_edges
from largescale.data.fixed_noise_set import VALIDATION_SEED, FixedNoiseSet
from largescale.distributed.ranks import check_cuda, local_device
from largescale.encoders.identity import library
from largescale.errors import CheckpointError, ConfigError
from largescale.host.files import append_line, require_writable, write_atomically
from largescale.host.launch import leave
from largescale.host.signals import serve_stop_signals, stop_requested
from largescale.models.build import latent_shape

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Gradients:
    """Options of eval.gradients."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories; their checkpoints are looked at."""
    validation: Path
    """A packed data set that was not trained on."""
    images: int = 512
    """Images of each cluster; the more, the smaller the error."""
    every: int | None = None
    """Look at the checkpoints whose step is a multiple of this only; by default at all."""
    out: Path | None = None
    """The folder of the picture; by default RUN/gradients of the first run."""
    batch_size: int = 128
    """Images at a time."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """What the gradients are computed on; by default a GPU if there is one."""

    def check(self) -> None:
        """Raises ConfigError, or CheckpointError, for options that cannot work."""
        if not self.runs:
            raise ConfigError("name at least one run directory")
        if self.out:
            require_outside_checkpoints(self.out, "--out")
        check_counts(self, "images", "every", "batch_size")
        if self.images % 2:
            raise ConfigError(f"images={self.images} must be even, as they are halved")
        check_cuda(self.device)


class ClusterGradients:
    """The gradients of one run's checkpoints on a fixed set of noised images."""

    def __init__(self, run: Path, options: Gradients) -> None:
        """Raises CheckpointError for a folder that is no run, and DataError for a set that is not like
        the training set, or shares rows with it."""
        config, training = training_set(run)
        data = held_out_set(options.validation, config, training)
        self.run = run
        self.options = options
        self.edges = cluster_edges(config)
        self.device = local_device(options.device)
        self._set = FixedNoiseSet(
            data,
            self.edges,
            options.images,
            seed=VALIDATION_SEED,
            shape=latent_shape(config.model),
            captions=config.model.max_caption_tokens > 0,
            device=torch.device("cpu"),
        )
        self._halve()
        self.protocol = {
            "data": data.fingerprint,
            "edges": list(self.edges),
            "images": options.images,
            "seed": VALIDATION_SEED,
        }

    def _halve(self) -> None:
        """Order the set by cluster and half: each half has every second noise level."""
        order = torch.arange(len(self._set.u)).view(-1, self.options.images // 2, 2)
        self._set.keep(order.transpose(1, 2).flatten())

    def rows(self) -> list[Row]:
        """What is known by this protocol, in the order of steps."""
        return rows_of_protocol(self.run / "gradients" / RESULTS, self.protocol)

    def missing(self) -> list[int]:
        """The steps of kept checkpoints that have no row yet."""
        known = steps_of(self.rows())
        every = self.options.every or 1
        steps = []
        # The newest checkpoint comes first.
        for found in reversed(checkpoints(self.run)):
            if found.step not in known and found.step % every == 0:
                steps.append(found.step)
        return steps

    def add(self, step: int) -> None:
        """Measure a checkpoint, and append its row. Raises Stopped."""
        # The raw weights are those that the gradients move.
        dots = dot_products(self.halves(load_trained(self.run, step, "raw")))
        row = {"step": step, "protocol": self.protocol, "dot_products": dots.tolist()}
        folder = self.run / "gradients"
        folder.mkdir(exist_ok=True)
        append_line(folder / RESULTS, json.dumps(row))
        shown = ", ".join(map("{:.3g}".format, norms(dots)))
        print(f"{self.run} at step {step:,}: norms by cluster, C_1 first: {shown}", flush=True)

    def halves(self, trained: Trained) -> torch.Tensor:
        """The gradient of each cluster's mean loss on each half of its images: (N, 2, weights)."""
        model = trained.model.to(self.device)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        half = self.options.images // 2
        found = []
        total: tuple[torch.Tensor, ...] = ()
        seen = 0
        # A batch lies in one half: batches are cut evenly from it.
        size = math.gcd(half, self.options.batch_size)
        for _, losses in self._set.losses(
            model, trained.objective, size, self.device, stop_requested
        ):
            gradient = torch.autograd.grad(losses.sum() / half, weights)
            total = tuple(map(torch.add, total, gradient)) if total else gradient
            seen += len(losses)
            if seen == half:
                found.append(parameters_to_vector(total).cpu())
                total = ()
                seen = 0
        return torch.stack(found).view(len(self.edges) - 1, 2, -1)


def dot_products(halves: torch.Tensor) -> Array:
    """The dot products of the clusters' gradients, (N, N), from two halves of each, (N, 2, weights):
    the first half of one with the second of the other, so that the errors of a half are no part of
    it."""
    first, second = halves.double().unbind(1)
    across = first @ second.T
    dots: Array = ((across + across.T) / 2).numpy()
    return dots


def norms(dots: Array) -> Array:
    """The norm of each gradient, (N,); NaN where the images are too few to tell it from 0."""
    squared = np.diag(dots)
    return np.sqrt(np.where(squared > 0, squared, np.nan))


def cosines(dots: Array) -> Array:
    """The cosine of each two gradients, (N, N); NaN where a norm is."""
    length = norms(dots)
    return dots / (length[:, None] * length)


def measure(options: Gradients) -> None:
    """Measure what is missing of all runs, and draw them."""
    options.check()
    library("matplotlib", "eval")
    found: dict[Path, list[Row]] = {}
    # What is wrong with any run is found before the first is measured.
    gradients = []
    out = options.out or options.runs[0] / "gradients"
    require_writable(out / "gradients.json", out / "gradients.png", remedy="choose another --out")
    for run in options.runs:
        each = ClusterGradients(run, options)
        if not each.rows() and not each.missing():
            raise CheckpointError(
                f"{run} keeps no checkpoint at a multiple of {options.every or 1} steps; set --every"
            )
        gradients.append(each)
    for each in gradients:
        for step in each.missing():
            each.add(step)
        found[each.run] = each.rows()
    out.mkdir(parents=True, exist_ok=True)
    plain = {str(run): rows for run, rows in found.items()}
    write_atomically(out / "gradients.json", json.dumps(plain, indent=1) + "\n")
    draw(found, out / "gradients.png")
    print(f"{summary(found)}: {out / 'gradients.png'}", flush=True)


def summary(found: dict[Path, list[Row]]) -> str:
    """One line on the last checkpoint of the first run."""
    run, rows = next(iter(found.items()))
    dots = np.array(rows[-1]["dot_products"])
    norm = norms(dots)
    apart = cosines(dots)[0, -1]
    return (
        f"{run} at step {rows[-1]['step']:,}: the gradient's norm is {norm[0]:.3g} in C_1 and "
        f"{norm[-1]:.3g} in C_{len(norm)}, their cosine {apart:.2f}"
    )


def draw(found: dict[Path, list[Row]], path: Path) -> None:
    """A row of two panels for each run: norms over steps, and cosines at its last step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plots, axes = plt.subplots(
        len(found), 2, squeeze=False, layout="constrained", figsize=(9, 3.6 * len(found))
    )
    for (left, right), (run, rows) in zip(axes, found.items(), strict=True):
        draw_norms(left, run, rows)
        draw_cosines(right, plots, rows[-1])
    temporary = path.with_name("gradients.tmp.png")
    plots.savefig(temporary, dpi=120)
    plt.close(plots)
    temporary.replace(path)


def draw_norms(axis: Any, run: Path, rows: list[Row]) -> None:
    """The norm of each cluster's gradient over steps."""
    steps = []
    of_steps = []
    for row in rows:
        steps.append(row["step"])
        of_steps.append(norms(np.array(row["dot_products"])))
    for number, values in enumerate(np.transpose(of_steps), 1):
        axis.plot(steps, values, marker=".", label=f"C_{number}")
    axis.set(xlabel="step", ylabel="norm of the gradient", yscale="log")
    axis.set_title(str(run), fontsize="small")
    plain_log_axis(axis.yaxis)
    axis.legend(fontsize="x-small")


def draw_cosines(axis: Any, plots: Any, row: Row) -> None:
    """The cosines between clusters at one step."""
    values = cosines(np.array(row["dot_products"]))
    picture = axis.imshow(values, vmin=-1, vmax=1, cmap="RdBu")
    plots.colorbar(picture, ax=axis)
    names = list(map("C_{}".format, range(1, len(values) + 1)))
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), names)
    axis.set_title(f"cosines at step {row['step']:,}")
    # Numbers where they can be read.
    if len(values) <= 10:
        for (i, j), value in np.ndenumerate(values):
            color = "white" if abs(value) > 0.6 else "black"
            axis.text(j, i, f"{value:.2f}", color=color, ha="center", va="center", fontsize=7)


def main(args: Sequence[str] | None = None) -> int:
    options = parse_options(Gradients, args, program="eval.gradients", description=__doc__)
    serve_stop_signals()
    remedy = "what is measured stays: correct the cause, and run the same command again"
    return run_program(lambda: measure(options), remedy)


if __name__ == "__main__":
    leave(main())
