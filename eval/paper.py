"""python -m eval.paper ACTION [--scale paper|toy] [--root DIR]: the paper's tables and figures, row by
row.

    status      what is there of each row: done, running at step n, or missing, with the next command
    table       Table A and the main text's tables beside the paper's figures: ROOT/table.md, .json
    figures     the figures in the paper's layout: ROOT/figures/
    run         with --scale toy: every step that is missing, then the table and the figures

Rows, their commands and their GPU hours are listed in docs/paper.md. A run is told by its name and
its pacing, wherever it lies below ROOT; one with other settings, samples by another protocol, scores
by another network, and two runs for one cell are listed and not counted.

At toy size every row is made of digits, emoji and, given its packed set, CIFAR-10, in minutes on two
cores: it shows that a row can be made, and nothing about the paper. Stopped or killed, it continues
when the same command is run again.
"""

import importlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from eval.reproduction.found_runs import FoundRuns, find_runs
from eval.reproduction.paper_size import paper
from eval.reproduction.pictures import write_pictures
from eval.reproduction.progress import status_lines, steps, with_row_filter
from eval.reproduction.rows import Scale
from eval.reproduction.steps import Standing, Step, Train
from eval.reproduction.table import read_tables, table_lines
from eval.reproduction.toy import toy
from largescale.checkpoint.files import require_outside_checkpoints
from largescale.config.command_line import parse_options, run_program
from largescale.data.format import read_manifest
from largescale.errors import ConfigError, LargescaleError, Stopped
from largescale.host.files import require_writable, write_atomically
from largescale.host.launch import env_world_size, leave
from largescale.host.signals import serve_stop_signals, stop_requested

Action = Literal["status", "table", "figures", "run"]


class StepFailed(LargescaleError, RuntimeError):
    """A program that a row is made by ended with another status than 0; its error is printed
    above."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.exit_status = status


@dataclass(frozen=True)
class Paper:
    """Options of eval.paper."""

    action: Annotated[Action, tyro.conf.Positional]
    """What to do: status, table, figures, or run."""
    scale: Literal["paper", "toy"] = "paper"
    """The size of the rows: the paper's, or that of a trial."""
    root: Path | None = None
    """The folder that runs, tables and figures lie in; by default runs/paper, at toy size
    runs/paper_toy."""
    rows: tuple[str, ...] = ()
    """Only these rows, such as "Table A" "Figure F"; by default all."""
    cifar10: Path | None = None
    """CIFAR-10, packed by data_prep.parquet, for its rows at toy size; without it they are left
    out."""

    @property
    def folder(self) -> Path:
        """The root, also where it was not given."""
        return self.root or Path("runs/paper_toy" if self.scale == "toy" else "runs/paper")

    def check(self) -> None:
        """Raises ConfigError for options that cannot work, CheckpointError for a root in the
        checkpoints of a run, and DataError for a --cifar10 that is no packed set."""
        require_outside_checkpoints(self.folder, "--root")
        if self.action == "run" and self.scale == "paper":
            raise ConfigError(
                "run at the paper's size would take this machine years; status shows the batch job of "
                "each step, --scale toy runs them all small"
            )
        if self.cifar10 and self.scale == "paper":
            raise ConfigError("--cifar10 is of --scale toy; the paper's rows read data/cifar10")
        if self.cifar10:
            read_manifest(self.cifar10)
        if self.root and self.action != "run" and not self.root.is_dir():
            raise ConfigError(f"--root {self.root} is no folder; give the one that holds the runs")
        # Under torchrun or srun every rank would do every step.
        if env_world_size() > 1:
            raise ConfigError(
                f"this is one process, not {env_world_size()}; start it without torchrun or srun"
            )

    def chosen(self) -> Scale:
        """The rows that were asked for. Raises ConfigError for one that is not there."""
        scale = toy(self.folder, self.cifar10) if self.scale == "toy" else paper(self.folder)
        if not self.rows:
            return scale
        known = [row.name for row in scale.rows]
        for name in self.rows:
            if name not in known:
                raise ConfigError(f"--rows {name!r} is none of {', '.join(known)}")
        return with_row_filter(scale, self.rows)


def status(options: Paper) -> None:
    """Print how every cell stands."""
    print("\n".join(status_lines(options.chosen(), find_runs(options.folder))), flush=True)


def table(options: Paper) -> None:
    """Write table.md and table.json, and print the tables."""
    root = options.folder
    require_writable(root / "table.md", root / "table.json", remedy="choose another --root")
    tables = read_tables(options.chosen(), find_runs(root))
    text = "\n".join(table_lines(tables))
    root.mkdir(parents=True, exist_ok=True)
    write_atomically(root / "table.md", text + "\n")
    write_atomically(root / "table.json", json.dumps(tables.plain(), indent=1) + "\n")
    print(text, flush=True)
    print(f"{root / 'table.md'}: {len(tables.scored)} rows have figures", flush=True)


def figures(options: Paper) -> None:
    """Write the figures for which something is there."""
    out = options.folder / "figures"
    # All pictures lie in one folder, so one file stands for all of them.
    require_writable(out / "figure_a.png", remedy="choose another --root")
    written, missing = write_pictures(options.chosen(), find_runs(options.folder), out)
    for line in missing:
        print(f"missing: {line}", flush=True)
    for path in written:
        print(path, flush=True)
    print(f"{out}: {len(written)} pictures, {len(missing)} missing", flush=True)


def run(options: Paper) -> None:
    """Do every step that is missing, then write the table and the figures."""
    scale = options.chosen()
    # Steps that several cells share come once, where they are needed first.
    todo = list(dict.fromkeys(steps(scale)))
    # What is there is nobody's to remove but a person's, and said before anything is done.
    found = find_runs(options.folder)
    for step in todo:
        _require_usable(step.standing(found))
    start = time.monotonic()
    for number, step in enumerate(todo, 1):
        if stop_requested():
            raise Stopped
        # Looked for anew each time: the step before may have made a run.
        found = find_runs(options.folder)
        standing = step.standing(found)
        if standing.state == "done":
            continue
        _require_usable(standing)
        program, arguments = step.call(found)
        minutes = (time.monotonic() - start) / 60
        print(
            f"[{number} of {len(todo)}, {minutes:.1f} min] {program} {' '.join(arguments)}",
            flush=True,
        )
        do(step, found)
    table(options)
    figures(options)


def _require_usable(standing: Standing) -> None:
    """Raises ConfigError for what lies in the way of a step."""
    if standing.state in ("refused", "running"):
        raise ConfigError(f"{standing.text}; choose another --root")


def do(step: Step, found: FoundRuns) -> None:
    """Do one step: a training in a process of its own, everything else in this one. Raises
    StepFailed, TrainingFailed, Stopped."""
    # A process can train once: DeepSpeed takes no second process group.
    if isinstance(step, Train):
        step.run_in(step.place(found)).train(1)
        return
    program, arguments = step.call(found)
    status = importlib.import_module(program).main(arguments)
    if status:
        raise StepFailed(
            f"{program} ended with status {status}; correct the error printed above, and run the "
            "same command again",
            status,
        )


ACTIONS: dict[Action, Callable[[Paper], None]] = {
    "status": status,
    "table": table,
    "figures": figures,
    "run": run,
}


def main(args: Sequence[str] | None = None) -> int:
    options = parse_options(Paper, args, program="eval.paper", description=__doc__)
    serve_stop_signals()

    def act() -> None:
        options.check()
        ACTIONS[options.action](options)

    return run_program(act, "what is done stays: correct the cause, and run the same command again")


if __name__ == "__main__":
    leave(main())
