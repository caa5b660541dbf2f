"""python -m eval.curve RUN ... --reference REFERENCE: a score for every kept checkpoint, against
steps and images.

    RUN/curve/results.jsonl     a row a checkpoint; it stays when the checkpoint goes
    RUN/curve/1a2b3c4d/         while drawing only (or with --keep-samples): samples; named by the
                                protocol
    curve.png, curve.json       of all runs in one: the curves, with the transitions of their stages

For a RUN that may only be read, OUT/RUN-5e6f/ takes the place of RUN/curve.

A small protocol, the same for all: 10,000 samples by DDIM in 50 steps (SiT and EDM: Heun, 18). A
checkpoint that has a row of this protocol is left alone: run it again while training continues, and
it adds what is new. Under torchrun or srun the ranks share the drawing, and rank 0 scores.
"""

import hashlib
import itertools
import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from eval.sample import Sample, Sampler, folder_of
from eval.score import RESULTS, Score, Scorer
from eval.scoring.figures import GROUPS
from largescale.checkpoint.ema_snapshots import snapshots
from largescale.checkpoint.files import CheckpointDir, checkpoints, require_outside_checkpoints
from largescale.config.command_line import parse_options, run_program
from largescale.config.schema import Config
from largescale.config.serialise import from_dict
from largescale.config.validation import ema_note
from largescale.diffusion.build import build_objective
from largescale.diffusion.objective import SamplerName
from largescale.diffusion.samplers import quick_sampler
from largescale.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    StorageError,
    usable,
)
from largescale.host.files import append_line, from_json, require_writable, write_atomically
from largescale.host.launch import env_rank, leave
from largescale.host.signals import serve_stop_signals
from largescale.models.half_precision import check_on_cpu
from largescale.power_ema import WIDEST

Row = dict[str, Any]

# The options that change what a score is: rows that differ in one of them lie on other curves.
# Widths of the averages in a range of --ema-widths.
SCANNED = 8
PROTOCOL = (
    "reference",
    "num_samples",
    "cfg_scale",
    "guidance_interval",
    "sampler",
    "steps",
    "seed",
    "extractor",
    "inception_weights",
    "prompts_file",
    "captions",
    "precision",
    "device",
)


@dataclass(frozen=True)
class Curve:
    """Options of eval.curve."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories, such as runs/vanilla runs/curriculum."""
    reference: Path
    """Real images, or statistics of them (eval.score --save-reference)."""
    out: Path | None = None
    """The folder for curve.png and curve.json, and for everything of a run that may only be read;
    by default RUN/curve of the first run."""
    num_samples: int = 10_000
    """Samples drawn of each checkpoint."""
    cfg_scale: float = 1.0
    """Guidance scale; 1 is no guidance."""
    sampler: SamplerName | None = None
    """The sampler; by default ddim, or heun where the objective has no ddim."""
    steps: int | None = None
    """Sampling steps; by default 50 for ddim, 18 for heun."""
    seed: int = 0
    """Seed of the samples."""
    extractor: str = "inception"
    """The network whose features are compared: inception (FID), efficientnet-lite0 (comes with
    pip), clip:MODEL/WEIGHTS (open_clip) or dino:MODEL (timm)."""
    inception_weights: Path | None = None
    """A file with Inception's weights (torch-fidelity's weights-inception-2015-12-05-6726825d.pth),
    where there is no network to download them."""
    prompts_file: Path | None = None
    """Prompts of text-to-image models, as eval.prompts froze them."""
    captions: Path | None = None
    """A packed data set whose captions are the prompts of text-to-image models."""
    every: int = 1
    """Score only the checkpoints at multiples of this step, and the newest."""
    text_encoder: str | None = None
    """Where the text encoder of the data lies now, for prompts; by default where it was when the
    data were packed."""
    vae: str | None = None
    """Where the VAE of a latent model lies now; by default where it was when the data were packed.
    It decodes the samples."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guide only at noise levels between these two; 0 is no noise, 1 pure noise."""
    ema_widths: tuple[str, ...] = ()
    """Score power-function averages of these widths, such as 0.05 0.1, or 0.02:0.25, which is eight
    from one to the other, at each run's newest snapshot; in place of its checkpoints."""
    keep_samples: bool = False
    """Keep the samples; by default they are removed once they are scored."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What matrix products are computed in; auto: on a GPU the precision of the training, else
    fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether to use torch.compile; auto: where it is expected to pay."""
    batch_size: int | None = None
    """Images that each rank draws at a time; by default 128 on a GPU, 32 on a CPU."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """What this runs on; by default a GPU if there is one."""

    def check(self) -> None:
        """Raises ConfigError, or CheckpointError, for options that cannot work."""
        if self.out:
            require_outside_checkpoints(self.out, "--out")
        self.widths()
        if self.every < 1:
            raise ConfigError(f"every={self.every} must be at least 1; it counts training steps")
        # By resolved path: a run under two names would be scored twice.
        if len(set(map(Path.resolve, self.runs))) < len(self.runs):
            raise ConfigError("a run is named twice; name each once")
        for run in self.runs:
            if not checkpoints(run):
                raise CheckpointError(
                    f"{run} holds no checkpoint; give the folders of runs, such as runs/digits"
                )
        # The jackknife needs a sample in each of its groups.
        if self.num_samples < GROUPS:
            raise ConfigError(
                f"num_samples={self.num_samples} are too few for any figure; set --num-samples "
                f"{GROUPS} or more"
            )
        if self.device == "cpu" and self.precision != "auto":
            check_on_cpu(self.precision, "--precision {}")

    def widths(self) -> list[float]:
        """The widths of --ema-widths. Raises ConfigError."""
        found: list[float] = []
        for word in self.ema_widths:
            low, colon, high = word.partition(":")
            try:
                ends = [float(low), float(high or low)]
            except ValueError:
                ends = [0.0, 0.0]
            if not 0 < ends[0] <= ends[1] <= WIDEST or (colon and not high):
                raise ConfigError(
                    f"--ema-widths {word} must be a width above 0 and at most {WIDEST}, or two as in "
                    "0.02:0.25"
                )
            # By equal ratios, rounded to what a name can have.
            ratio = ends[1] / ends[0]
            for i in range(SCANNED if colon else 1):
                found.append(round(ends[0] * ratio ** (i / (SCANNED - 1)), 4))
        return sorted({*found})

    def protocol(self) -> Row:
        """The settings that rows must share to lie on one curve, as plain JSON."""
        settings = {name: getattr(self, name) for name in PROTOCOL}
        plain: Row = json.loads(json.dumps(settings, default=str))
        return plain


class Curves:
    """The scores of the checkpoints of some runs: those that are known, and those to be made."""

    def __init__(
        self, options: Curve, scorer: Scorer | None = None, width: float | None = None
    ) -> None:
        """`scorer`: one that `make_scorer` made, to be shared by several. `width`: score the average
        of this width, at the newest snapshot of each run."""
        options.check()
        self.width = width
        self.homes = {run: self.home(run, options.out) for run in options.runs}
        if options.runs:
            out = options.out or options.runs[0] / "curve"
            require_writable(out / "curve.json", out / "curve.png", remedy="choose another --out")
            # The sampler is part of the protocol, so all runs get the one of the first.
            objective = build_objective(config_of(options.runs[0]))
            sampler, steps = quick_sampler(objective, options.sampler, options.steps)
            options = replace(options, sampler=sampler, steps=steps)
        self.options = options
        self.rank = env_rank()
        self._scorer = scorer
        self._ready: dict[tuple[Path, int], Sampler] = {}

    @staticmethod
    def home(run: Path, out: Path | None) -> Path:
        """The folder of a run's rows and samples. Raises CheckpointError for a run that may only be
        read, without `out`."""
        try:
            require_writable(
                run / "curve" / RESULTS, run / "curve/new", remedy="give --out DIR, which is enough"
            )
        except (CheckpointError, StorageError):
            if not out:
                raise
            # Two runs of one name get two folders.
            digest = hashlib.sha256(str(run.resolve()).encode()).hexdigest()
            return out / f"{run.name}-{digest[:4]}"
        return run / "curve"

    def __call__(self) -> None:
        """Score what is missing, and draw the curves."""
        missing = []
        for run in self.options.runs:
            for step in self.missing(run):
                missing.append((run, step))

        # What is wrong with a model or the reference is an error before the work, not in it.
        existing = [(run, step) for run, step in missing if self.exists(run, step)]
        if existing:
            self._ready[existing[0]] = self.sampler(*existing[0])
        if self.rank == 0:
            self.remove_scored()
            if existing:
                self.scorer()

        # Training that is still under way may remove a checkpoint before its turn.
        for run, step in missing:
            if self.exists(run, step):
                self.add(run, step)
            elif self.rank == 0:
                print(
                    f"{run} at step {step:,}: left out, training has removed the checkpoint "
                    "meanwhile",
                    flush=True,
                )
        if self.rank == 0 and self.width is None:
            self.draw({run: self.rows(run) for run in self.options.runs})

    def exists(self, run: Path, step: int) -> bool:
        """Whether the weights of that step are still there."""
        return self.width is not None or CheckpointDir.at(run, step).exists

    def notes(self) -> list[str]:
        """Notes on the EMA at the earliest step of each run that is to be scored; on rank 0 only."""
        if self.rank != 0 or self.width is not None:
            return []
        found = []
        for run in self.options.runs:
            missing = self.missing(run)
            note = ema_note(config_of(run), missing[0]) if missing else None
            if note:
                found.append(f"{run}: {note}")
        return found

    def remove_scored(self) -> None:
        """Remove samples that a kill between their row and their removal has left."""
        if self.options.keep_samples:
            return
        for run in self.options.runs:
            for row in self.rows(run):
                shutil.rmtree(self.folder(run, row["step"]), ignore_errors=True)

    def folder(self, run: Path, step: int) -> Path:
        """The folder of the samples of one checkpoint, by this protocol."""
        protocol = hashlib.sha256(json.dumps(self.protocol()).encode()).hexdigest()[:8]
        return self.homes[run] / protocol / f"step_{step:08d}"

    def rows(self, run: Path) -> list[Row]:
        """The rows of this protocol, in the order of steps; of two of one step, the later."""
        return rows_of_protocol(self.homes[run] / RESULTS, self.protocol())

    def protocol(self) -> Row:
        """The protocol of the options, and the width."""
        width = {} if self.width is None else {"ema_width": self.width}
        return self.options.protocol() | width

    def missing(self, run: Path) -> list[int]:
        """The steps of the checkpoints that have no row of this protocol."""
        # A checkpoint that is gone but has a row stays on the curve.
        known = steps_of(self.rows(run))
        if self.width is not None:
            newest = newest_snapshot(run)
            return [] if newest in known else [newest]
        return steps_to_score(run, known, self.options.every)

    def sampler(self, run: Path, step: int) -> Sampler:
        """The sampler of one checkpoint. Raises ConfigError for one that would draw latents."""
        o = self.options
        sampler = Sampler(
            Sample(
                run,
                self.folder(run, step),
                num_samples=o.num_samples,
                cfg_scale=(o.cfg_scale,),
                sampler=o.sampler,
                steps=o.steps,
                seed=o.seed,
                prompts_file=o.prompts_file,
                captions=o.captions,
                precision=o.precision,
                compile=o.compile,
                batch_size=o.batch_size,
                step=step,
                device=o.device,
                vae=o.vae,
                text_encoder=o.text_encoder,
                guidance_interval=o.guidance_interval,
                ema_width=self.width,
            )
        )
        # A Frechet distance of latents is none that anybody knows.
        if sampler.info().kind == "latents":
            raise ConfigError(f"{run} draws latents, and its VAE is not known; give --vae")
        return sampler

    def add(self, run: Path, step: int) -> None:
        """Draw the samples of one checkpoint, on all ranks, and score them, on rank 0."""
        o = self.options
        out = self.folder(run, step)
        # The first sampler was made before the work, to find errors.
        sampler = self._ready.pop((run, step), None) or self.sampler(run, step)
        sampler()
        if self.rank != 0:
            return

        scored = self.scorer()(folder_of(out, o.cfg_scale))
        info = sampler.trained.info

        # All that a curve needs, as the checkpoint itself may be removed.
        row = {
            "run": str(run),
            "step": step,
            "images": info.get("samples_seen"),
            "protocol": self.protocol(),
            "transitions": (info.get("curriculum") or {}).get("transitions", []),
            "figures": scored["figures"],
            "notes": scored["notes"],
            "extractor": scored["extractor"],
            "n": scored["n"],
            "reference": scored["reference"],
        }
        append_line(self.homes[run] / RESULTS, json.dumps(row))

        shown = []
        for name, figure in row["figures"].items():
            shown.append(f"{name} {figure['value']:.5g} +- {figure['error']:.2g}")
        width = "" if self.width is None else f", width {self.width:g}"
        print(f"{run} at step {step:,}{width}: {', '.join(shown)}", flush=True)

        # Samples of a checkpoint take far more disk than its row.
        if not o.keep_samples:
            shutil.rmtree(out)
            # Not empty where another step's samples lie in it.
            with suppress(OSError):
                out.parent.rmdir()

    def scorer(self) -> Scorer:
        """The one scorer of all checkpoints: features of the reference are computed once."""
        if self._scorer is None:
            sizes = []
            for sampler in self._ready.values():
                _, height, width = sampler.info().shape
                sizes.append((height, width))
            self._scorer = make_scorer(self.options, sizes)
        return self._scorer

    def draw(self, of_runs: dict[Path, list[Row]]) -> None:
        """Write curve.json and curve.png, and print the summary."""
        out = self.options.out or self.options.runs[0] / "curve"
        out.mkdir(parents=True, exist_ok=True)
        # Nothing to draw: step 0 is not trained, so no score of it means anything.
        if not any(of_runs.values()):
            raise DataError("no checkpoint was scored; those of step 0 are not")
        plain = {str(run): rows for run, rows in of_runs.items()}
        write_atomically(out / "curve.json", json.dumps(plain, indent=1) + "\n")
        plot(of_runs, out / "curve.png")
        for line in summary(of_runs):
            print(line, flush=True)
        count = sum(map(len, of_runs.values()))
        print(f"{count} checkpoints on the curve: {out / 'curve.png'}", flush=True)


def scan_widths(options: Curve) -> None:
    """Score the averages of all widths of all runs, and write widths.json and widths.png."""
    scorer = None
    found: dict[Path, list[Row]] = {run: [] for run in options.runs}
    for width in options.widths():
        curves = Curves(options, scorer, width)
        curves()
        # The reference's features are computed once.
        scorer = curves._scorer
        for run in options.runs:
            for row in curves.rows(run):
                if row["step"] == newest_snapshot(run):
                    found[run].append({**row, "ema_width": width})
    if env_rank() != 0:
        return
    out = options.out or options.runs[0] / "curve"
    out.mkdir(parents=True, exist_ok=True)
    plain = {str(run): rows for run, rows in found.items()}
    write_atomically(out / "widths.json", json.dumps(plain, indent=1) + "\n")
    plot_widths(found, out / "widths.png")
    for run, rows in found.items():
        name = main_figure(rows)
        best = best_row(rows)
        figure = best["figures"][name]
        print(
            f"{run}: best {name} {figure['value']:.5g} +- {figure['error']:.2g} at width "
            f"{best['ema_width']:g} of step {best['step']:,}",
            flush=True,
        )
    print(f"{len(options.widths())} widths of {len(found)} runs: {out / 'widths.png'}", flush=True)


def newest_snapshot(run: Path) -> int:
    """The step of a run's newest snapshot of averages. Raises CheckpointError where there is
    none."""
    kept = snapshots(run)
    if not kept:
        raise CheckpointError(
            f"{run} has no snapshots of averages; train with --optimizer.ema-widths 0.05 0.1"
        )
    return kept[-1].step


def plot_widths(of_runs: dict[Path, list[Row]], path: Path) -> None:
    """The main figure of each run against the width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plots, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for run, rows in of_runs.items():
        name = main_figure(rows)
        figures = [row["figures"][name] for row in rows]
        axis.errorbar(
            [row["ema_width"] for row in rows],
            [figure["value"] for figure in figures],
            [figure["error"] for figure in figures],
            marker="o",
            markersize=3,
            capsize=2,
            label=f"{run}, step {rows[-1]['step']:,}",
        )
        axis.set(xlabel="width of the average (share of the training)", ylabel=name)
    axis.set_xscale("log")
    axis.legend(fontsize="small")
    temporary = path.with_name("widths.tmp.png")
    plots.savefig(temporary, dpi=120)
    plt.close(plots)
    temporary.replace(path)


def rows_of_protocol(path: Path, protocol: Row) -> list[Row]:
    """The rows of one protocol in a file, in the order of steps; of two of one step, the later."""
    found = {}
    for row in lines(path):
        if row.get("protocol") == protocol:
            found[row["step"]] = row
    return [found[step] for step in sorted(found)]


def steps_of(rows: Sequence[Row]) -> list[int]:
    """The steps of some rows."""
    return [row["step"] for row in rows]


def steps_to_score(run: Path, known: Sequence[int], every: int) -> list[int]:
    """The steps of a run's checkpoints that are not `known`: multiples of `every`, and the newest,
    but never step 0, at which nothing is trained."""
    steps = sorted([checkpoint.step for checkpoint in checkpoints(run)])
    found = []
    for step in steps:
        wanted = step % every == 0 or step == steps[-1]
        if wanted and step > 0 and step not in known:
            found.append(step)
    return found


def config_of(run: Path) -> Config:
    """The config of a run's newest checkpoint."""
    newest = checkpoints(run)[0]
    with usable(newest.path):
        return from_dict(newest.manifest()["state"]["config"])


def make_scorer(o: Curve, sizes: Sequence[tuple[int, int]] = ()) -> Scorer:
    """The scorer for samples of these sizes. Raises DataError for what is wrong with the reference
    or the extractor."""
    score = Score(
        samples=(),
        reference=o.reference,
        extractor=o.extractor,
        inception_weights=o.inception_weights,
        device=o.device,
    )
    return Scorer(score, sizes)


def lines(path: Path) -> list[Row]:
    """The rows of a file of JSON lines; a line that was cut short is left out."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        # A crash while writing leaves a part of the last line.
        with suppress(ValueError):
            row = from_json(line)
            if isinstance(row, dict):
                found.append(row)
    return found


def main_figure(rows: Sequence[Row]) -> str:
    """The Frechet distance, by the name that it has for this extractor."""
    return next(iter(rows[0]["figures"]))


def steps_to_match_best_of(one: Sequence[Row], other: Sequence[Row]) -> tuple[int, int] | None:
    """The first step at which `one` is at least as good as `other` ever was, and the step of that
    best of the other; None where it never is."""
    name = main_figure(other)
    best = best_row(other)
    for row in one:
        if row["figures"][name]["value"] <= best["figures"][name]["value"]:
            return row["step"], best["step"]
    return None


def best_row(rows: Sequence[Row]) -> Row:
    """The row with the least Frechet distance."""
    name = main_figure(rows)
    return min(rows, key=lambda row: row["figures"][name]["value"])


def overlap(one: Row, other: Row) -> bool:
    """Whether two figures, with their errors, leave open which is the greater."""
    return bool(abs(one["value"] - other["value"]) <= one["error"] + other["error"])


def summary(of_runs: dict[Path, list[Row]]) -> list[str]:
    """Lines on the best of each run, and on which run reaches another's best how much earlier."""
    scored = {run: rows for run, rows in of_runs.items() if rows}
    found = list(map(best_text, scored, scored.values()))
    for one, other in itertools.permutations(scored, 2):
        # Distances of two extractors have nothing to do with each other.
        if main_figure(scored[one]) != main_figure(scored[other]):
            continue
        if pair := steps_to_match_best_of(scored[one], scored[other]):
            found.append(f"{one} reaches the best of {other} {match_text(*pair)}")
    return found


def best_text(run: Path, rows: Sequence[Row]) -> str:
    """The best of one run, with the steps that it cannot be distinguished from."""
    name = main_figure(rows)
    best = best_row(rows)
    figure = best["figures"][name]
    text = (
        f"{run}: best {name} {figure['value']:.5g} +- {figure['error']:.2g} at step "
        f"{best['step']:,}"
    )
    # The best of noisy scores is often chance: name what is as good within the errors.
    alike = []
    for row in rows:
        if row is not best and overlap(figure, row["figures"][name]):
            alike.append(f"{row['step']:,}")
    if alike:
        text += f", not told apart from step {', '.join(alike)}: errors overlap"
    return text


def match_text(reached: int, at: int) -> str:
    """When a run reached the best that another had at step `at`."""
    if reached < at:
        return f"at step {reached:,}, {at - reached:,} steps earlier ({1 - reached / at:.0%})"
    return f"at step {reached:,}, {reached - at:,} steps later"


def plot(of_runs: dict[Path, list[Row]], path: Path) -> None:
    """One picture for each figure, three in a row; dotted lines are transitions of a run's stages,
    in its colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # The figures that any run has, in the order of the first that has them.
    all_rows = list(itertools.chain.from_iterable(of_runs.values()))
    names: dict[str, None] = {}
    for row in all_rows:
        names.update(dict.fromkeys(row["figures"]))
    columns = min(3, len(names))
    down = -(-len(names) // columns)
    plots, axes = plt.subplots(
        down, columns, figsize=(5 * columns, 4 * down), squeeze=False, layout="constrained"
    )
    # A grid has more places than there are figures.
    for unused in axes.flat[len(names) :]:
        unused.set_axis_off()

    # With one batch size for all runs, a step is the same number of images everywhere.
    batch_sizes = {row["images"] / row["step"] for row in all_rows if row["images"]}
    for name, axis in zip(names, axes.flat, strict=False):
        for run, rows in of_runs.items():
            plot_run(axis, run, rows, name)
        axis.set(xlabel="step", ylabel=name)
        if len(batch_sizes) == 1:
            add_image_axis(axis, *batch_sizes)
        axis.legend(fontsize="small")

    # Under another name until it is complete.
    temporary = path.with_name("curve.tmp.png")
    plots.savefig(temporary, dpi=120)
    plt.close(plots)
    temporary.replace(path)


def plot_run(axis: Any, run: Path, rows: Sequence[Row], name: str) -> None:
    """One run's curve of one figure, with the transitions of its stages."""
    # A run that was scored with other metrics has no point of this figure.
    steps, values, errors = [], [], []
    for row in rows:
        if name in row["figures"]:
            steps.append(row["step"])
            values.append(row["figures"][name]["value"])
            errors.append(row["figures"][name]["error"])
    if not steps:
        return
    line = axis.errorbar(steps, values, errors, marker="o", markersize=3, capsize=2, label=str(run))

    # Where a stage of the curriculum ended.
    for step, _index in rows[-1]["transitions"]:
        axis.axvline(step, color=line[0].get_color(), linestyle=":", linewidth=0.6)


def add_image_axis(axis: Any, batch_size: float) -> None:
    """A second x-axis, of images."""
    scales = (lambda step: step * batch_size, lambda images: images / batch_size)
    axis.secondary_xaxis("top", functions=scales).set_xlabel("images")


def main(args: Sequence[str] | None = None) -> int:
    options = parse_options(Curve, args, program="eval.curve", description=__doc__)
    serve_stop_signals()

    def score() -> None:
        if options.ema_widths:
            options.check()
            scan_widths(options)
            return
        curves = Curves(options)
        for note in curves.notes():
            print(f"note: {note}", file=sys.stderr, flush=True)
        curves()

    remedy = "what is scored stays: correct the cause, and run the same command again"
    return run_program(score, remedy)


if __name__ == "__main__":
    leave(main())
