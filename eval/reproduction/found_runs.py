"""The training runs below a folder: what each is, how far it is, and whether it is the one that a row
of the paper asks for. Reads files only, without torch."""

import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.training_runs import Run
from largescale.checkpoint.files import checkpoints
from largescale.config.deepspeed import load_ds_config, precision
from largescale.config.schema import Config
from largescale.config.serialise import flatten, from_dict, to_dict
from largescale.data.format import read_manifest
from largescale.errors import LargescaleError, usable
from largescale.host.files import system_reason
from largescale.monitoring.run_record import read_starts

# A run that takes steps writes its record every few seconds.
SILENT_S = 900.0
# Kinds of training by curriculum.pacing, in the words of eval.compare.
KINDS = {"none": "vanilla", "fixed": "naive", "patience": "curriculum"}
# What two runs of one row may differ in: how they are carried out and watched, and the seed, which
# the table names. A setting is one of them if its name begins so.
_FREE = (
    "name",
    "output",
    "dry_run",
    "fit_ranks",
    "print_config",
    "verbose",
    "profile",
    "data.path",
    "data.validation",
    "data.prefetch",
    "data.stage",
    "data.verify",
    "checkpoint.",
    "telemetry.",
    "anomaly.",
    "optimizer.kernel",
    "optimizer.ema_widths",
    "train.compile",
    "train.kernels",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.threads",
    "train.ds_config",
    "train.device",
    "train.timeout_s",
    "train.seed",
    # The paper says fp32, and not which; the table says which it was.
    "train.tf32",
)


@dataclass(frozen=True)
class FoundRun:
    """A run directory, as its newest checkpoint, or else the record of its last start, has it."""

    folder: Path
    config: Config
    precision: str
    step: int
    """The last step that is known."""
    saved_step: int
    """The step of the newest checkpoint; 0 without one."""
    alive: bool
    """Whether its record was written lately by a start that has not ended."""
    dataset: str | None
    """The fingerprint of the data set; None before the first checkpoint."""
    num_classes: int | None
    curriculum: dict[str, Any] | None
    """Where its curriculum stands at that checkpoint; with it samples are known to be of this run."""

    @property
    def kind(self) -> str:
        """Vanilla, naive or curriculum: by its pacing, as a run does not record its method."""
        return KINDS[self.config.curriculum.pacing]

    @property
    def arithmetic(self) -> str:
        """The precision of the training, of fp32 on a GPU whether in TF32."""
        if self.precision == "fp32" and self.config.train.device == "cuda":
            return "fp32 (TF32)" if self.config.train.tf32 else "fp32 (no TF32)"
        return self.precision


@dataclass(frozen=True)
class FoundRuns:
    """All runs below a folder."""

    root: Path
    runs: Sequence[FoundRun]
    unreadable: Mapping[Path, str] = field(default_factory=dict)
    """Folders of runs that cannot be read, and why."""
    _fingerprints: dict[Path, str | None] = field(default_factory=dict, init=False, repr=False)
    """Of the data sets that were asked for: rows share them, and each is read once."""

    def claiming(self, name: str, kind: str) -> list[FoundRun]:
        """The runs that say that they are this training: by their name and pacing, wherever they
        lie."""
        return [run for run in self.runs if (run.config.name, run.kind) == (name, kind)]

    def dataset_at(self, path: Path) -> str | None:
        """The fingerprint of the data set that is packed at `path`; None where there is none."""
        if path not in self._fingerprints:
            self._fingerprints[path] = None
            with suppress(LargescaleError, OSError):
                self._fingerprints[path] = read_manifest(path)["fingerprint"]
        return self._fingerprints[path]


def find_runs(root: Path) -> FoundRuns:
    """The runs below `root`, in the order of their paths. The models of a difficulty study, each of
    one interval of noise levels, are none of them."""
    runs = []
    unreadable: dict[Path, str] = {}
    for folder in _run_folders(root, unreadable):
        try:
            with usable(folder):
                run = read_run(folder)
        except LargescaleError as error:
            unreadable[folder] = str(error)
            continue
        # A folder that was only prepared says nothing yet.
        if run is not None:
            runs.append(run)
    return FoundRuns(root, runs, unreadable)


def _run_folders(root: Path, unreadable: dict[Path, str]) -> list[Path]:
    """The folders of runs; those that cannot be listed are noted."""

    def note(error: OSError) -> None:
        unreadable[Path(error.filename)] = system_reason(error)

    found = []
    # Through links, as runs may lie on several disks; once, as links may lead in circles.
    seen = set()
    for path, folders, _ in os.walk(root, onerror=note, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(path)) in seen:
            folders.clear()
            continue
        seen.add(real)
        if {"checkpoints", "starts"} & {*folders}:
            found.append(Path(path))
            # What lies in a run are its samples and pictures.
            folders.clear()
        folders[:] = [name for name in folders if not re.fullmatch(r"interval_\d+", name)]
    return found


def read_run(folder: Path) -> FoundRun | None:
    """What is known of the run in a folder; None for one that has neither a checkpoint nor a record
    with settings."""
    starts = read_starts(folder)
    last = starts[-1] if starts else None
    # A start that was killed has no end on record; what gives it away is its silence.
    alive = last is not None and last.ended is None and time.time() - last.seen_unix_s < SILENT_S
    saved = checkpoints(folder)
    if saved:
        state = saved[0].manifest()["state"]
        return FoundRun(
            folder=folder,
            config=from_dict(state["config"]),
            precision=state["precision"],
            # Steps since the newest checkpoint are known by the record only.
            step=max(saved[0].step, last.step if last else 0),
            saved_step=saved[0].step,
            alive=alive,
            dataset=state["dataset"],
            num_classes=state["data_info"].get("num_classes"),
            curriculum=state.get("curriculum"),
        )
    if last is None or not last.settings:
        return None
    config = from_dict(last.settings)
    return FoundRun(
        folder=folder,
        config=config,
        precision=precision(load_ds_config(config.train.ds_config)),
        step=last.step,
        saved_step=0,
        alive=alive,
        dataset=None,
        num_classes=None,
        curriculum=None,
    )


def other_settings(run: FoundRun, wanted: Run) -> list[str]:
    """The settings of a run that are not those which a row asks for, as 'key: found, not wanted'."""
    ds = load_ds_config(wanted.config.train.ds_config)
    return setting_differences(
        to_dict(run.config) | {"precision": run.precision},
        to_dict(wanted.config) | {"precision": precision(ds)},
    )


def setting_differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The settings that differ, but for those that change no figure of a row."""
    before = dict(flatten(found))
    after = dict(flatten(wanted))
    changed = []
    for key in sorted(before.keys() | after.keys()):
        if not key.startswith(_FREE) and before.get(key) != after.get(key):
            changed.append(f"{key}: {before.get(key)}, not {after.get(key)}")
    return changed
