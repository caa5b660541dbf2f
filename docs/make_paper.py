"""python docs/make_paper.py [--check] [--results TABLE_JSON]: writes the rows of docs/paper.md, with
their commands and GPU hours.

Rows and commands are those of eval.paper (eval/reproduction/rows.py); GPU hours are computed here, by
the cost model of largescale/planning/cost.py. --results copies the table.json that `python -m
eval.paper table` wrote to docs/results/paper.json, from which the page has the figures of our own.
--check writes nothing, and ends with status 1 where the page is not current.
"""

import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from eval.reproduction.paper_size import MODELS, paper
from eval.reproduction.rows import FIGURES, Cell, Row, Scale
from eval.reproduction.sample_steps import Draw, ScoreOverTraining, ScoreSamples
from eval.reproduction.steps import Step, Train
from eval.reproduction.study_steps import StudyStage
from eval.training_runs import configure
from largescale.config.deepspeed import load_ds_config, precision
from largescale.config.derived import batch_layout
from largescale.config.presets import find_preset
from largescale.config.schema import Config, TrainConfig
from largescale.diffusion.build import build_objective
from largescale.diffusion.objective import SamplerName
from largescale.diffusion.samplers import evaluations
from largescale.planning.cost import Plan, Workload
from largescale.planning.hardware import HARDWARE
from largescale.planning.memory import largest_micro_batch
from largescale.training.dry_run import workload

PAGE = Path(__file__).parent / "paper.md"
OURS = Path(__file__).parent / "results" / "paper.json"
GPUS = 8
CARDS = ("a100", "h100")

# What is between these lines of the page is made here; the rest is written by hand.
BEGIN = "<!-- from here on made by docs/make_paper.py -->"


# ---- GPU hours


def config_of(train: Train) -> Config:
    """The config of a training but for its method: the curriculum costs nothing."""
    return _configured(train.preset, train.options)


@cache
def _configured(preset: str, options: tuple[str, ...]) -> Config:
    return configure(preset, options)


def plan(config: Config, card: str, tf32: bool = True) -> Plan:
    """The run on 8 GPUs, in as few micro batches as memory allows."""
    # What a step has to do depends on nothing else, and takes a moment to find out.
    train = TrainConfig(micro_batch_size="auto", ds_config=config.train.ds_config)
    alike = Config("", model=config.model, diffusion=config.diffusion, train=train)
    work = _work(alike, HARDWARE[card].usable_bytes)
    steps, every = config.train.steps, config.checkpoint.every
    found = Plan(work, HARDWARE[card], GPUS, steps, every)
    in_fp32 = precision(load_ds_config(config.train.ds_config)) == "fp32"
    return found.in_fp32(tf32=tf32) if in_fp32 else found


@cache
def _work(config: Config, usable_bytes: float) -> Workload:
    ds = load_ds_config(config.train.ds_config)
    micro = largest_micro_batch(config, ds, GPUS, usable_bytes)
    fitted = replace(config, train=replace(config.train, micro_batch_size=max(1, micro)))
    return workload(fitted, ds, batch_layout(fitted, GPUS)[1])


def of_training(config: Config, card: str, tf32: bool = True) -> float:
    """GPU hours of a run."""
    return GPUS * plan(config, card, tf32).hours


def of_samples(
    config: Config, card: str, n: int, sampler: SamplerName, steps: int, cfg_scale: float
) -> float:
    """GPU hours of n samples; guidance asks the model twice."""
    asked = evaluations(build_objective(config), sampler, steps) * (1 if cfg_scale == 1 else 2)
    return n * asked * plan(config, card).sampling_seconds / 3600


def hours(step: Step, card: str) -> float:
    """GPU hours of one step; none where what it computes is little."""
    if isinstance(step, Train):
        return of_training(config_of(step), card)
    if isinstance(step, Draw):
        config = config_of(step.train)
        return of_samples(config, card, step.num_samples, step.sampler, step.steps, step.cfg_scale)
    if isinstance(step, ScoreOverTraining):
        config = config_of(step.train)
        scale = step.train.data.cfg_scale
        each = of_samples(config, card, step.num_samples, step.sampler, step.steps, scale)
        return len(step.wanted) * each
    if isinstance(step, StudyStage):
        return _of_study(step, card)
    return 0.0


def _of_study(step: StudyStage, card: str) -> float:
    """A model for each interval and the full one; the samples with each of them."""
    study = step.plan
    o = study.options
    if step.stage == "train":
        return len(study.runs) * of_training(study.config, card)
    if step.stage == "denoise":
        objective = build_objective(study.config)
        sampler = o.sampler or objective.samplers[0]
        steps = o.sampler_steps or objective.default_steps
        each = of_samples(study.config, card, o.num_samples, sampler, steps, o.cfg_scale)
        return len(study.runs) * each
    return 0.0


def shown(value: float) -> str:
    """Hours with two figures that mean something."""
    if not value:
        return ""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


# ---- the page


def of_rows(scale: Scale, ours: dict[str, Any]) -> tuple[list[str], dict[str, float]]:
    """A section for each row, and the sum of all GPU hours by card."""
    lines: list[str] = []
    total = dict.fromkeys(CARDS, 0.0)
    first: dict[Step, str] = {}
    for row in scale.rows:
        lines += [f"## {row.name}", "", row.shows]
        if row.published:
            lines[-1] += f" The paper: {row.published}."
        commands: list[str] = []
        cells: list[str] = []
        for cell in row.cells:
            new = [step for step in cell.steps if step not in first]
            spent = {card: sum([hours(step, card) for step in new]) for card in CARDS}
            for card in CARDS:
                total[card] += spent[card]
            cells.append(cell_line(row, cell, ours, spent))
            commands += cell_commands(cell, first)
            first.update(dict.fromkeys(new, f"{row.name}, {cell.name}"))
        # Of the data there is nothing to compare.
        if row.name != "Data":
            lines += ["", "| | the paper | here | GPU hours, 8 A100 | 8 H100 |"]
            lines += ["|---|---|---|---:|---:|", *cells]
        lines += ["", *commands, ""]
    return lines, total


def cell_line(row: Row, cell: Cell, ours: dict[str, Any], spent: dict[str, float]) -> str:
    """One cell in the table of its row."""
    here = ours.get(row.name, {}).get(cell.name, {})
    words = [cell.name]
    for figures in (cell.published, here):
        each = [f"{name} {figures[name]:.2f}" for name in FIGURES if name in figures]
        words.append(", ".join(each))
    return f"| {' | '.join([*words, *[shown(spent[card]) for card in CARDS]])} |"


def cell_commands(cell: Cell, first: dict[Step, str]) -> list[str]:
    """The commands of a cell, but for those that a row above has."""
    lines = []
    for step in cell.steps:
        # The batch job that draws samples scores them too.
        if isinstance(step, ScoreSamples):
            continue
        if step in first:
            continue
        lines.append(f"    {step.job()}")
    known = [first[step] for step in cell.steps if step in first]
    title = f"    # {cell.name}"
    if known:
        title += f": trained for {known[0]}" if lines else f": made for {known[0]}"
    return [title, *lines]


def of_models() -> list[str]:
    """GPU hours of one training of each model, by precision."""
    lines = [
        "| model | steps | A100, half precision | TF32 | fp32 | H100, half precision | TF32 | fp32 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, model in MODELS.items():
        config = config_of(model.train(Path(), "vanilla"))
        half = find_preset(model.preset).train.ds_config
        words = [f"{model.title}, {model.data.name}", f"{config.train.steps:,}"]
        if name.endswith("_linear"):
            continue
        for card in CARDS:
            in_half = replace(config, train=replace(config.train, ds_config=half))
            words.append(shown(of_training(in_half, card)))
            for tf32 in (True, False):
                fp32 = "fp32" in config.train.ds_config
                words.append(shown(of_training(config, card, tf32)) if fp32 else "")
        lines.append(f"| {' | '.join(words)} |")
    return lines


def page(written: str) -> str:
    """The page, of which all before BEGIN stays as it is written."""
    ours = json.loads(OURS.read_text())["rows"]
    sections, total = of_rows(paper(Path("runs/paper")), ours)
    lines = [
        "## GPU hours",
        "",
        f"All rows: {total['a100']:,.0f} hours of an A100, {total['h100']:,.0f} of an H100. One training:",
        "",
        *of_models(),
        "",
        *sections,
    ]
    head, _, _ = written.partition(BEGIN)
    return "\n".join([f"{head}{BEGIN}", "", *lines]).rstrip("\n") + "\n"


def main() -> int:
    words = sys.argv[1:]
    if "--results" in words:
        given = Path(words[words.index("--results") + 1])
        found = json.loads(given.read_text())
        if found["scale"] != "paper":
            print(f"error: {given} is of {found['scale']} size, not the paper's", file=sys.stderr)
            return 2
        OURS.write_text(json.dumps(found, indent=1) + "\n")
    before = PAGE.read_text()
    text = page(before)
    if "--check" in words:
        if before != text:
            print(f"{PAGE} is not current; run python docs/make_paper.py", file=sys.stderr)
        return 0 if before == text else 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
