"""The paper's figures, and how its rows stand."""

from pathlib import Path

from eval.reproduction.found_runs import find_runs
from eval.reproduction.progress import survey
from eval.reproduction.rows import Scale

PUBLISHED = {  # the paper's table A: FID, IS, precision, recall
    "cosine, vanilla": (30.27, 60.06, 0.55, 0.52),
    "cosine, curriculum": (22.22, 75.98, 0.62, 0.52),
    "linear, vanilla": (16.99, 83.62, 0.68, 0.53),
    "linear, curriculum": (16.03, 87.66, 0.69, 0.53),
}


def standing(scale: Scale, root: Path) -> dict[str, str]:
    """Row, cell -> how it stands."""
    return {f"{c.row.name}, {c.cell.name}": c.standing.text for c in survey(scale, find_runs(root))}
