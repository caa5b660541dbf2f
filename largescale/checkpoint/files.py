"""The files of a checkpoint, read without DeepSpeed (and without torch, except for tensors).

RUN/checkpoints/step_00001000/           a checkpoint, once it holds a manifest, which is written
                                         last
    manifest.json                        step, world size, files with sizes and hashes, and a
                                         copy of our state: config, curriculum, counters
    mp_rank_00_model_states.pt           DeepSpeed's: weights in the compute dtype, and
                                         client_state
    [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt
                                         DeepSpeed's: rank R's fp32 master weights, moments and
                                         EMA
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from largescale.errors import (
    CheckpointError,
    LargescaleError,
    NewerVersionError,
    StorageError,
    usable,
)
from largescale.host.files import from_json, sha256

if TYPE_CHECKING:
    from torch import Tensor

# DeepSpeed merges client_state flat over its own keys, so ours has all its values under one.
CLIENT_KEY = "largescale"
MODEL_FILE = "mp_rank_00_model_states.pt"
MANIFEST = "manifest.json"
_SEAL = ',\n "sha256": '
# All that a checkpoint's folder holds, finished or not.
_OURS = re.compile(
    r"manifest\.json(\.tmp)?|mp_rank_\d+_model_states\.pt"
    r"|(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_optim_states\.pt"
)
# Pauses before files that could not be read are tried again.
READ_AGAIN_S = (1.0, 5.0)
# In format 1 the manifest had no hash of itself. Every later one must be sealed as 2 is, so that a
# newer version can be distinguished from damage.
FORMAT = 2


class UnseenError(CheckpointError):
    """A file that is missing, or of another size; or it is new, and a network file system does not
    show it here yet."""


@dataclass(frozen=True)
class CheckpointDir:
    """The folder of one checkpoint, which may be missing, unfinished or damaged."""

    path: Path
    step: int

    @classmethod
    def at(cls, run_dir: Path, step: int) -> "CheckpointDir":
        return cls(run_dir / "checkpoints" / f"step_{step:08d}", step)

    @property
    def exists(self) -> bool:
        """Whether there is a checkpoint: a folder without a manifest is a write that did not
        finish."""
        return (self.path / MANIFEST).exists()

    def only_ours(self) -> bool:
        """Whether the folder holds nothing but files of a checkpoint."""
        return all(map(_is_ours, self.path.iterdir()))

    def remove(self) -> None:
        """Remove the checkpoint, and leave what others have put into its folder; of a link, remove
        the link only. Raises OSError where it is still a checkpoint afterwards."""
        if self.path.is_symlink():
            self.path.unlink()
            return
        # The manifest goes first: from then on the checkpoint does not exist.
        with contextlib.suppress(IsADirectoryError):
            (self.path / MANIFEST).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for path in filter(_is_ours, list(self.path.iterdir())):
                # A folder in the place of a file would block the next checkpoint of this step.
                with contextlib.suppress(OSError):
                    path.rmdir() if path.is_dir() else path.unlink()
            self.path.rmdir()

    def manifest(self) -> dict[str, Any]:
        """The manifest, verified by its own hash.

        Raises CheckpointError where it is missing or damaged, or a newer version's
        (NewerVersionError); StorageError where it cannot be read at present.
        """
        path = self.path / MANIFEST
        try:
            content = path.read_bytes()
            manifest: dict[str, Any] = from_json(content)
            self._require_usable(manifest, content)
            return manifest
        # A new file may not be visible here yet, so "missing" is another error than "damaged".
        except FileNotFoundError as error:
            raise UnseenError(f"{path} is missing") from error
        except OSError as error:
            raise StorageError(f"{path} cannot be read at present: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def _require_usable(self, manifest: dict[str, Any], content: bytes) -> None:
        """Raise CheckpointError where the manifest is damaged, a newer version's or that of another
        step. `content`: the file's bytes."""
        path = self.path / MANIFEST
        # Before anything else in it is believed.
        version = manifest["format"]
        if (version != 1 or "sha256" in manifest) and not _is_sealed(content):
            raise CheckpointError(f"{path} does not have the content that was written")

        if version > FORMAT:
            raise NewerVersionError(
                f"{path} has format {version}, this version reads 1 to {FORMAT}: it was made by a "
                "newer version; update largescale, or start another run with --output DIR"
            )
        if version not in (1, FORMAT):
            raise CheckpointError(f"{path} has format {version}, which does not exist")
        if manifest.get("step", self.step) != self.step:
            raise CheckpointError(
                f"{path} is that of step {manifest['step']}; rename the folder to its old name"
            )

    def optimizer_state(self, rank: int) -> dict[str, Any]:
        """What DeepSpeed's ZeRO optimizer saved on that rank."""
        # DeepSpeed's name depends on the precision.
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        path = self.path / name
        path = path if path.exists() else self.path / f"bf16_{name}"
        with usable(path):
            state: dict[str, Any] = load(path)["optimizer_state_dict"]
            return state

    def problem(self, part: slice = slice(None)) -> str | None:
        """What is wrong with the files, or None. Hashes `part` of them, so that ranks can share the
        work.

        Raises StorageError where they cannot be read, which does not mean that they are damaged,
        and NewerVersionError.
        """
        error = self.check(part)
        if isinstance(error, StorageError | NewerVersionError):
            raise error
        return str(error) if error else None

    def check(self, part: slice = slice(None)) -> CheckpointError | StorageError | None:
        """The error of the files, or None: as `problem`, but an error of any kind is returned."""
        for pause in (*READ_AGAIN_S, None):
            try:
                self._require_complete(part)
                return None
            except CheckpointError as error:
                return error
            # A manifest that is not of the expected shape.
            except (LookupError, TypeError, AttributeError) as error:
                return CheckpointError(f"{self.path}: {error!r}")
            # A file system that failed may answer later.
            except OSError as error:
                if pause is None:
                    if isinstance(error, StorageError):
                        return error
                    return StorageError(f"{self.path} cannot be read at present: {error}")
                time.sleep(pause)
        raise AssertionError

    def _require_complete(self, part: slice) -> None:
        files = sorted(self.manifest()["files"].items())
        # The size of every file is cheap to compare; the hashes of a part are what takes time.
        for name, expected in files:
            path = self.path / name
            if not path.exists():
                raise UnseenError(f"{path} is missing")
            if path.stat().st_size != expected["bytes"]:
                raise UnseenError(
                    f"{path} has {path.stat().st_size} bytes, not {expected['bytes']}"
                )
        for name, expected in files[part]:
            if sha256(self.path / name) != expected["sha256"]:
                raise CheckpointError(
                    f"{self.path / name} does not have the content that was written"
                )


def _is_ours(path: Path) -> bool:
    return _OURS.fullmatch(path.name) is not None


def seal(manifest: dict[str, Any]) -> str:
    """A manifest as text, whose last line is the hash of those before."""
    # The manifest has the hash of every other file, so nothing else can verify it.
    lines = json.dumps(manifest, indent=1, allow_nan=False).removesuffix("\n}")
    return f'{lines}{_SEAL}"{hashlib.sha256(lines.encode()).hexdigest()}"\n}}'


def _is_sealed(content: bytes) -> bool:
    lines, _, last = content.rpartition(_SEAL.encode())
    return last == f'"{hashlib.sha256(lines).hexdigest()}"\n}}'.encode()


def step_folders(run_dir: Path) -> list[CheckpointDir]:
    """The folders of a run's checkpoints, newest first, also those whose writing did not finish."""
    found = []
    # Files and folders with other names are not ours.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in (run_dir / "checkpoints").iterdir():
            match = re.fullmatch(r"step_(\d{8,})", path.name)
            if match and not path.is_file():
                checkpoint = CheckpointDir.at(run_dir, int(match[1]))
                # Of more than eight digits, none is a leading zero.
                if checkpoint.path.name == path.name:
                    found.append(checkpoint)
    return sorted(found, key=lambda c: -c.step)


def checkpoints(run_dir: Path) -> list[CheckpointDir]:
    """A run's checkpoints, newest first."""
    return [folder for folder in step_folders(run_dir) if folder.exists]


def is_run(folder: Path) -> bool:
    """Whether a run was trained in the folder: it holds the record of a start, or a checkpoint, also
    a damaged one."""
    # What may not be listed, such as a folder of all users' runs, is not taken for a run.
    with contextlib.suppress(PermissionError):
        return any((folder / "starts").glob("start_*.json")) or bool(checkpoints(folder))
    return False


def require_outside_checkpoints(path: Path, option: str) -> None:
    """Raise CheckpointError where what `option` names lies in the checkpoints of a run, which
    removes old ones."""
    # As it is written and where it leads: the run, its checkpoints, or one of them may be a link.
    for place in (Path(os.path.abspath(path)), Path(os.path.realpath(path))):
        for folder in (place, *place.parents):
            if folder.name == "checkpoints" and is_run(folder.parent):
                raise CheckpointError(
                    f"{path} lies in the checkpoints of the run {folder.parent}, which removes old "
                    f"ones; give a folder outside of {folder} with {option}"
                )


def newest_valid(
    run_dir: Path,
    found: Iterable[CheckpointDir],
    report: Callable[[str], None],
    check: Callable[[CheckpointDir], LargescaleError | None] = CheckpointDir.check,
) -> tuple[CheckpointDir | None, set[int]]:
    """The newest of `found` in which `check` finds no error, and the steps of those before it,
    which are reported and skipped.

    None where nothing was found. Raises NewerVersionError at the first of a newer version, so that
    nothing of it is trained again or overwritten; where there are checkpoints and none can be used,
    StorageError if some may be later, else CheckpointError.
    """
    errors: dict[int, LargescaleError] = {}
    for checkpoint in found:
        error = check(checkpoint)
        if error is None:
            return checkpoint, set(errors)
        if isinstance(error, NewerVersionError):
            error.agreed = True
            raise error
        errors[checkpoint.step] = error
        # What cannot be read at present may not be damaged.
        kind = "checkpoint" if isinstance(error, StorageError) else "damaged checkpoint"
        report(f"skipping a {kind}: {error}")
    if errors:
        raise _none_usable(run_dir, list(errors.values()))
    return None, set()


def _none_usable(run_dir: Path, errors: list[LargescaleError]) -> LargescaleError:
    """The error that none of a run's checkpoints can be used, with the error of each."""
    # One that cannot be read at present may be readable later, so the same command is worth a try.
    later = any(isinstance(error, StorageError) for error in errors)
    remedy = "try again later, restore one from a copy" if later else "restore one from a copy"
    text = (
        f"none of the {len(errors)} checkpoints in {run_dir} can be used:\n  "
        + "\n  ".join(map(str, errors))
        + f"\n{remedy}, or start again in another folder with --output DIR"
    )
    error = StorageError(text) if later else CheckpointError(text)
    error.agreed = True
    return error


def load(path: Path) -> dict[str, Any]:
    """Load a file of tensors and plain values. Raises CheckpointError for anything else."""
    import torch

    # weights_only: a file from elsewhere cannot run code. mmap: only what is used is read.
    with usable(path):
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return state


def client_state(checkpoint: CheckpointDir) -> dict[str, Any]:
    """Our own part of DeepSpeed's file: the run's identity and its training state."""
    with usable(checkpoint.path / MODEL_FILE):
        state: dict[str, Any] = load(checkpoint.path / MODEL_FILE)[CLIENT_KEY]
        return state


def find_checkpoint(run_dir: Path, step: int | None = None) -> CheckpointDir:
    """The newest valid checkpoint of a run, or that of `step`, verified."""
    if step is not None:
        return _checkpoint_of_step(run_dir, step)
    newest, _ = newest_valid(
        run_dir, checkpoints(run_dir), report=lambda text: print(text, file=sys.stderr)
    )
    if newest is None:
        what = "is a file" if run_dir.is_file() else "holds no checkpoint"
        raise CheckpointError(f"{run_dir} {what}; give the folder of a run, such as runs/digits")
    return newest


def _checkpoint_of_step(run_dir: Path, step: int) -> CheckpointDir:
    checkpoint = CheckpointDir.at(run_dir, step)
    if not checkpoint.exists:
        steps = ", ".join(str(found.step) for found in checkpoints(run_dir)) or "none"
        raise CheckpointError(f"{run_dir} has no checkpoint of step {step}; there are: {steps}")
    # Unlike the newest one, it is never replaced silently by another.
    if problem := checkpoint.problem():
        raise CheckpointError(
            f"{problem}; choose another --step, or leave it out for the newest valid one"
        )
    return checkpoint


def flat_state(
    checkpoint: CheckpointDir, kind: str, group: int, world_size: int
) -> Iterator["Tensor"]:
    """The flat fp32 pieces of one state tensor ('master', 'exp_avg', 'exp_avg_sq', 'ema') in rank
    order.

    Joined and cut to the parameters' size they are complete: DeepSpeed stores master weights
    without the padding at the end, the optimizer's tensors with it.
    """
    # A generator, so that one rank's file is mapped at a time.
    for rank in range(world_size):
        state = checkpoint.optimizer_state(rank)
        if kind == "master":
            yield state["single_partition_of_fp32_groups"][group]
        else:
            yield state["base_optimizer_state"]["state"][group][kind]


def named_weights(checkpoint: CheckpointDir, kind: str = "ema") -> dict[str, "Tensor"]:
    """The model's weights by name, in fp32: the EMA, or the 'master' weights."""
    # The optimizer has no state at step 0, where the EMA is the master weights.
    with usable(checkpoint.path):
        return _named_weights(checkpoint, "master" if checkpoint.step == 0 else kind)


def _named_weights(checkpoint: CheckpointDir, kind: str) -> dict[str, "Tensor"]:
    import torch

    model = load(checkpoint.path / MODEL_FILE)
    world_size = checkpoint.manifest()["world_size"]
    weights: dict[str, Tensor] = {}
    for group, shapes in enumerate(model["param_shapes"]):
        pieces = flat_state(checkpoint, kind, group, world_size)
        flat = torch.cat([piece.reshape(-1) for piece in pieces])
        # A parameter may cross the border between two ranks' pieces.
        offset = 0
        for name, shape in shapes.items():
            count = int(torch.Size(shape).numel())
            # A copy, so that the weights do not keep the flat tensor alive.
            weights[name] = flat[offset : offset + count].view(tuple(shape)).clone()
            offset += count

    return weights | _fixed(model)


def fixed_weights(checkpoint: CheckpointDir) -> dict[str, "Tensor"]:
    """The weights that are not trained, such as position embeddings, by name, in fp32."""
    with usable(checkpoint.path):
        return _fixed(load(checkpoint.path / MODEL_FILE))


def _fixed(model: dict[str, Any]) -> dict[str, "Tensor"]:
    # No optimizer has them.
    fragments = model.get("frozen_param_fragments") or {}
    return {name: value.float() for name, value in fragments.items()}
