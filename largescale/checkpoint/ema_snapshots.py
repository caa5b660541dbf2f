"""Snapshots of power-function averages in a run directory, and the average of any width from them.

RUN/ema_snapshots/step_00001000_width_0.05.safetensors    weights by name, in half precision (as EDM2
                                                          keeps them), written whole or not at all
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from largescale.checkpoint.files import (
    CheckpointDir,
    find_checkpoint,
    fixed_weights,
    named_weights,
)
from largescale.errors import CheckpointError, ConfigError
from largescale.host.files import safetensors_disk_errors
from largescale.power_ema import WIDEST, Profile, Reconstruction, reconstruct, state_key

FOLDER = "ema_snapshots"
_NAME = re.compile(r"step_(\d+)_width_(\d+(?:\.\d+)?(?:e-\d+)?)\.safetensors")
# Snapshots whose share of the sum is smaller are not read.
_NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Average:
    """An average of the weights of a run."""

    profile: Profile
    weights: dict[str, Tensor]
    """By name, fp32, on the CPU."""
    reconstruction: Reconstruction
    sources: int
    """How many snapshots were kept up to its step."""

    def describe(self) -> dict[str, float | int]:
        """What an export and a sample set record of it."""
        return {
            "width": self.profile.width,
            "residual": self.reconstruction.residual,
            "snapshots": self.sources,
        }


def path_of(run_dir: Path, profile: Profile) -> Path:
    return run_dir / FOLDER / f"step_{profile.step:08d}_width_{profile.width:g}.safetensors"


def snapshots(run_dir: Path) -> list[Profile]:
    """The averages of which there are snapshots, in the order of their steps."""
    found = []
    for path in (run_dir / FOLDER).glob("step_*.safetensors"):
        if match := _NAME.fullmatch(path.name):
            found.append(Profile(int(match[1]), float(match[2])))
    return sorted(found)


def newest_step(run_dir: Path) -> int:
    """The newest step with a snapshot of every width that was kept; of one that a full disk, or a
    kill, has left with some of them little could be made. Raises CheckpointError where there is no
    snapshot."""
    kept = snapshots(run_dir)
    if not kept:
        what = f"has no snapshots of averages in {FOLDER}" if run_dir.is_dir() else "is no folder"
        raise CheckpointError(
            f"{run_dir} {what}; give the folder of a run that was trained with "
            "--optimizer.ema-widths 0.05 0.1"
        )
    counts = Counter(each.step for each in kept)
    widths = {each.width for each in kept}
    whole = [step for step, count in counts.items() if count == len(widths)]
    return max(whole, default=kept[-1].step)


def write(run_dir: Path, profile: Profile, weights: dict[str, Tensor]) -> None:
    """Write a snapshot: whole, or not at all. Raises OSError."""
    from safetensors.torch import save_file

    path = path_of(run_dir, profile)
    path.parent.mkdir(exist_ok=True)
    # Hidden, and under a name that `snapshots` does not take for one.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with safetensors_disk_errors(path):
            save_file(weights, temporary, metadata={"format": "pt"})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove(run_dir: Path, *, after: int | None = None, newest: int = 0) -> None:
    """Remove the snapshots of steps later than `after`, and all but those of the `newest` steps;
    0: keep all. Raises OSError."""
    kept = snapshots(run_dir)
    steps = sorted({each.step for each in kept})
    first = steps[-newest] if 0 < newest < len(steps) else 0
    for each in kept:
        if each.step < first or (after is not None and each.step > after):
            path_of(run_dir, each).unlink(missing_ok=True)


def average(run_dir: Path, width: float, step: int | None = None) -> Average:
    """The average of some width at a step, by default that of the newest snapshots, as a sum of the
    snapshots. Raises ConfigError for a width that no average has, CheckpointError where snapshots
    are missing or damaged."""
    if not 0 < width <= WIDEST:
        raise ConfigError(
            f"ema_width={width} must be above 0 and at most {WIDEST}; EDM2's best lie from 0.03 to 0.2"
        )
    newest = newest_step(run_dir)
    step = newest if step is None else step
    kept = snapshots(run_dir)
    used = [each for each in kept if each.step <= step]
    # An average ends with the weights of its step, which only snapshots of that step have.
    if not used or used[-1].step != step:
        steps = sorted({each.step for each in kept})
        raise CheckpointError(
            f"{run_dir} has no snapshot of step {step}, where its average would end; there are: "
            f"{', '.join(map(str, steps))}"
        )
    wanted = Profile(step, width)
    solution = reconstruct(used, wanted)
    # Of the widths that were kept a checkpoint has the average in full precision.
    checkpoint = CheckpointDir.at(run_dir, step)
    if wanted in used and checkpoint.exists and not checkpoint.problem():
        weights = named_weights(checkpoint, state_key(width))
        return Average(wanted, weights, solution, len(used))

    # What is not trained is in no snapshot.
    weights = fixed_weights(find_checkpoint(run_dir))
    for each, coefficient in zip(used, solution.coefficients.tolist(), strict=True):
        if abs(coefficient) > _NEGLIGIBLE:
            _add(weights, _read(path_of(run_dir, each)), coefficient)
    return Average(wanted, weights, solution, len(used))


def _add(total: dict[str, Tensor], weights: dict[str, Tensor], coefficient: float) -> None:
    """Add weights times a number to a sum of weights, in float32."""
    for name, value in weights.items():
        if name in total:
            total[name].add_(value.float(), alpha=coefficient)
        else:
            total[name] = value.float() * coefficient


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the snapshot {path} cannot be read ({error}); remove it, and the others are used"
        ) from error
