"""The model card of an export: README.md, as the hub shows it, and the sample grid beside it."""

import math
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from largescale.errors import CheckpointError, usable
from largescale.host.files import from_json, visible, write_atomically
from largescale.interop.card_text import GRID, MARK, CardFacts, card_text

CARD = "README.md"
# What eval.score and eval.sample leave in a folder of samples.
RESULTS = "results.jsonl"
PROVENANCE = "provenance.json"
# Where a run's sample sets may lie, below its folder.
SETS = ("*", "*/*", "*/*/*")


def sample_sets(run: Path) -> list[Path]:
    """Folders below a run, or an export, that hold scores or a grid."""
    found = set()
    for pattern in SETS:
        for name in (RESULTS, GRID):
            found |= {path.parent for path in run.glob(f"{pattern}/{name}")}
    # A card's own grid is of no new samples.
    return sorted(folder for folder in found if not (folder / CARD).exists())


def read_scores(folders: Iterable[Path], step: int | None) -> tuple[dict[str, Any], ...]:
    """The rows with figures in these folders' results, in order; those of `step` only, if it is
    given."""
    rows = []
    for folder in folders:
        for line in _lines(folder / RESULTS):
            row = _score(line)
            if row is not None and step in (None, row["step"]):
                rows.append(row)
    return tuple(rows)


def find_grid(folders: Iterable[Path], step: int | None) -> Path | None:
    """The first grid in these folders, of samples of `step` only, if it is given."""
    for folder in folders:
        if (folder / GRID).is_file() and step in (None, _step_of_samples(folder)):
            return folder / GRID
    return None


def _step_of_samples(folder: Path) -> int | None:
    with suppress(OSError, CheckpointError), usable(folder):
        return int(from_json((folder / PROVENANCE).read_bytes())["step"])
    return None


def _lines(path: Path) -> list[bytes]:
    with suppress(FileNotFoundError, NotADirectoryError):
        return path.read_bytes().splitlines()
    return []


def _score(line: bytes) -> dict[str, Any] | None:
    """What a card says of one row of results; None for what is no row with figures."""
    # A crash can cut a line short, and other programs' rows have no figures.
    with suppress(ValueError, CheckpointError), usable("a row"):
        row = from_json(line)
        drawn = row.get("drawn") or row.get("protocol") or {}
        figures = {}
        for name, figure in row["figures"].items():
            value = float(figure["value"])
            # YAML and people have no use for a score that is not a number.
            if math.isfinite(value):
                figures[str(name)] = (value, float(figure["error"]))
        # eval.curve's rows have the step themselves.
        step = row["step"] if "step" in row else drawn.get("step")
        reference = row.get("reference") or {}
        return {
            "step": step,
            "n": int(row["n"]),
            "sampler": drawn.get("sampler"),
            "steps": drawn.get("steps"),
            "cfg_scale": drawn.get("cfg_scale"),
            "figures": figures,
            "reference": Path(str(reference.get("path", ""))).name,
        }
    return None


def only_card(folder: Path) -> bool:
    """Whether the folder holds nothing but a card of ours, and its grid."""
    there = {path.name for path in visible(folder)} if folder.is_dir() else set()
    return CARD in there and there <= {CARD, GRID} and is_our_card(folder / CARD)


def is_our_card(path: Path) -> bool:
    """Whether a README.md is one that an export wrote."""
    with suppress(OSError, UnicodeDecodeError):
        return MARK in path.read_text(encoding="utf-8")
    return False


def remove_card(folder: Path) -> None:
    """Remove our card, and its grid, from a folder whose weights are others now."""
    if is_our_card(folder / CARD):
        (folder / CARD).unlink()
        (folder / GRID).unlink(missing_ok=True)


def write_card(folder: Path, facts: CardFacts, grid: Path | None) -> bool:
    """Write README.md, and a copy of the grid, into the folder; returns False, and writes nothing,
    where somebody else's README.md lies there. Raises OSError."""
    card = folder / CARD
    if card.exists() and not is_our_card(card):
        return False
    if grid is None:
        # That of an earlier card is of other weights.
        (folder / GRID).unlink(missing_ok=True)
    else:
        # The grid of an earlier card may be the one that is given.
        with suppress(shutil.SameFileError):
            shutil.copyfile(grid, folder / GRID)
    write_atomically(card, card_text(facts))
    return True
